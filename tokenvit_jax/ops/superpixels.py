"""Clusters a map of tokens around a smaller map of centres (Liang et al. 2022, Expedite).

A token belongs softly to the centres around its home cell, and a centre moves to the weighted mean
of its tokens (Eqs. 2 and 3 of "Expediting Large-Scale Vision Transformer for Dense Prediction
without Fine-tuning").
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from tokenvit_jax.ops.center_tiles import (
    add_windows,
    check_grid,
    check_temperature,
    check_tokens,
    check_window,
    make_tiles,
    mix_rows_and_columns,
    near_weights,
    product,
    take_all,
)
from tokenvit_jax.ops.counted import counted_as
from tokenvit_jax.ops.dtypes import softmax_dtype

# A centre whose weights have a smaller sum than this is pulled towards 0.
EPSILON = 1e-16


def cluster_superpixels(
    tokens: Float[Array, "B N C"],
    grid: tuple[int, int],
    clusters: tuple[int, int],
    *,
    window: int = 5,
    iterations: int = 5,
    temperature: float | Float[Array, " B"] = 50.0,
) -> Float[Array, "B S C"]:
    """Clusters the H x W tokens of a map around h x w centres.

    The initial centres are adaptive averages: centre i of h is the mean over the rows of tokens
    from floor(i H / h) to ceil((i + 1) H / h), exclusive, and likewise over columns. Then, in every
    round, a token weights the centres around its home cell (floor(y h / H), floor(x w / W)) by the
    softmax of -d^2 / temperature, where d is the distance between the features, and a centre
    becomes the weighted mean of its tokens. A centre that no token sees becomes 0.

    The result is computed in float32 (float64 for float64 tokens).

    Args:
      tokens: (B, H W, C), row after row.
      grid: (H, W).
      clusters: (h, w), at most H W cells. They need not divide H and W; one may even be larger.
      window: rows and columns of a token's neighbourhood of cells, odd; it is clipped at the
        border.
      iterations: number of rounds, at least 0; 0: the adaptive averages.
      temperature: tau, above 0; one number, or one for each map (B,).

    Returns:
      The centres (B, h w, C), row after row, in the type of ``tokens``.

    Raises:
      ValueError: the tokens are not a map of ``grid``, or a number is out of range.

    References:
      Liang et al. 2022, Eqs. 2 and 3, with the division by the sum of the weights that their code
      adds to Eq. 3. Jampani et al. 2018, "Superpixel Sampling Networks".
    """
    check_tokens("tokens", tokens)
    check_grid("tokens", tokens, "grid", grid)
    _check_clusters(grid, clusters)
    check_window(window)
    check_temperature(temperature)
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}; it must be at least 0")
    return _cluster(tokens, temperature, grid, clusters, window, iterations)


# The temperature is traced: a search tries many, and compiles once.
@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _cluster(tokens, temperature, grid, clusters, window, iterations):
    _, length, dim = tokens.shape
    tiles = make_tiles(grid, clusters, window)

    def cluster(tokens, temperature):
        x = tokens.astype(softmax_dtype(tokens.dtype))
        mean = x.mean(1, keepdims=True)
        x = x - mean  # far from the origin, digits are lost
        centers = _adaptive_average(x, grid, clusters)
        if iterations:
            centers = _move_centers(x, centers, mean, tiles, iterations, temperature)
        return (centers + mean).astype(tokens.dtype)

    macs = (length + 2 * iterations * tiles.pairs) * dim
    return counted_as("cluster_superpixels", macs, cluster)(tokens, temperature)


def _adaptive_average(x, grid, clusters):
    """Averages tokens (B, H W, C) in cells: (B, h w, C)."""

    def mix(length, cells):
        start = np.arange(cells) * length // cells
        count = -(-np.arange(1, cells + 1) * length // cells) - start
        offset = np.arange(count.max())[:, None]
        return np.minimum(start + offset, length - 1), (offset < count) / count

    return mix_rows_and_columns(x, grid, mix(grid[0], clusters[0]), mix(grid[1], clusters[1]))


def _move_centers(x, centers, mean, tiles, iterations, temperature):
    """Moves the centres (B, S, C) of tokens (B, N, C); ``mean`` is subtracted from both."""
    x = take_all(x, tiles.tokens)  # (B, n, T, C)

    def move(_, centers):
        weights = near_weights(x, centers, tiles, temperature)
        sums = add_windows(product("bnkt,bntc->bnkc", weights, x), tiles)
        total = add_windows(weights.sum(-1, keepdims=True), tiles)  # (B, S, 1)
        divisor = jnp.maximum(total, EPSILON)
        return sums / divisor - mean * (1 - total / divisor)

    return lax.fori_loop(0, iterations, move, centers)


def _check_clusters(grid, clusters):
    most = grid[0] * grid[1]
    if len(clusters) != 2 or min(clusters) < 1 or clusters[0] * clusters[1] > most:
        raise ValueError(
            f"clusters is {clusters}; it must be (rows, columns), each at least 1, with a product "
            f"of at most {most} for grid {grid}"
        )
