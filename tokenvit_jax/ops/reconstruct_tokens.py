"""Maps refined cluster centres back to the original tokens (Liang et al. 2022, Eq. 4).

A reconstructed token is a weighted mean of the refined values of its nearest centres.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from tokenvit_jax.kernels.chunked import map_queries
from tokenvit_jax.kernels.platforms import by_platform
from tokenvit_jax.ops.center_tiles import (
    check_grid,
    check_temperature,
    check_tokens,
    check_window,
    make_tiles,
    mix_rows_and_columns,
    near_weights,
    per_map,
    product,
    take_all,
)
from tokenvit_jax.ops.counted import counted_as
from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.ops.precise_product import precise_product
from tokenvit_jax.ops.selection import smallest_k

MODES = ("soft", "hard", "window", "bilinear")
NORMS = ("sum", "l2")


def reconstruct_tokens(
    tokens: Float[Array, "B N C"],
    centers: Float[Array, "B S C"],
    refined: Float[Array, "B S D"],
    *,
    neighbors: int = 20,
    temperature: float | Float[Array, " B"] = 50.0,
    normalize: str = "sum",
    mode: str = "soft",
    grid: tuple[int, int] | None = None,
    clusters: tuple[int, int] | None = None,
    window: int = 5,
) -> Float[Array, "B N D"]:
    """Maps refined cluster centres back to the original tokens.

    Modes:
      * "soft": the mean of the refined values of the ``neighbors`` nearest centres, weighted by the
        softmax of -d^2 / temperature. Ties go to the lowest centre.
      * "hard": the refined value of the nearest centre.
      * "window": like "soft", with the centres around the home cell as in
        :func:`cluster_superpixels`; needs ``grid`` and ``clusters``.
      * "bilinear": the map of refined values, resized regardless of the tokens; needs ``grid`` and
        ``clusters``.

    The result is computed in float32 (float64 for float64 tokens).

    Args:
      tokens: (B, N, C), the input of the clustering.
      centers: (B, S, C), the output of the clustering.
      refined: values of the centres after further layers (B, S, D).
      neighbors: number of nearest centres, at least 1; at most S are used.
      temperature: tau, above 0; one number, or one for each map (B,).
      normalize: "sum": the weights of a token sum to 1; "l2": their squares sum to 1, as in the
        released code, which makes a token up to sqrt(neighbors) times as large.
      mode: one of the modes above.
      grid: (H, W), rows and columns of the tokens.
      clusters: (h, w), rows and columns of the centres.
      window: rows and columns of the neighbourhood in mode "window", odd.

    Returns:
      (B, N, D) in the type of ``refined``.

    Raises:
      ValueError: the shapes do not fit together, the mode or norm is unknown, a number is out of
        range, or the mode needs ``grid`` and ``clusters``.

    References:
      Liang et al. 2022, Eq. 4.
    """
    _check_reconstruction(tokens, centers, refined, neighbors, temperature, normalize, mode)
    if mode in ("window", "bilinear"):
        _check_grids(tokens, centers, grid, clusters, mode)
        check_window(window)
    return _reconstruct(
        tokens, centers, refined, temperature, neighbors, normalize, mode, grid, clusters, window
    )


# The temperature is traced: a search tries many, and compiles once.
@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7, 8, 9))
def _reconstruct(
    tokens, centers, refined, temperature, neighbors, normalize, mode, grid, clusters, window
):
    _, length, dim = tokens.shape
    num_centers, out_dim = refined.shape[1:]
    match mode:
        case "soft":
            k = min(neighbors, num_centers)
            macs = length * (num_centers * dim + k * out_dim)
            run = functools.partial(_by_nearest, k=k, normalize=normalize)
        case "hard":
            macs = length * num_centers * dim
            run = functools.partial(_by_nearest, k=1, normalize=normalize)
        case "window":
            tiles = make_tiles(grid, clusters, window)
            macs = tiles.pairs * (dim + out_dim)
            run = functools.partial(_by_window, tiles=tiles, normalize=normalize)
        case "bilinear":
            macs = 2 * grid[0] * (clusters[1] + grid[1]) * out_dim
            run = functools.partial(_bilinear, grid=grid, clusters=clusters)

    def reconstruct(tokens, centers, refined, temperature):
        dtype = softmax_dtype(tokens.dtype)
        x, keys, values = (array.astype(dtype) for array in (tokens, centers, refined))
        mean = x.mean(1, keepdims=True)
        return run(x - mean, keys - mean, values, temperature).astype(refined.dtype)

    counted = counted_as("reconstruct_tokens", macs, reconstruct)
    return counted(tokens, centers, refined, temperature)


def _by_nearest(x, centers, refined, temperature, *, k, normalize):
    """Reconstructs from the k nearest centres: (B, N, C), (B, S, C), (B, S, D) -> (B, N, D)."""
    form = functools.partial(_from_nearest, k=k, normalize=normalize)

    def in_chunks(x, *centers_and_values):
        run = lambda x: form(x[:, 0], *centers_and_values)[:, None]  # noqa: E731
        return map_queries(run, centers.shape[1], x[:, None])[:, 0]

    at_once = functools.partial(form, multiply=precise_product)
    temperature = jnp.broadcast_to(per_map(temperature, x), (x.shape[0], 1, 1))
    return by_platform(
        "reconstruction", x, centers, refined, temperature, cpu=in_chunks, default=at_once
    )


def _from_nearest(x, centers, refined, temperature, *, k, normalize, multiply=product):
    # Squared distances without |x|^2, which is the same for all centres.
    square = jnp.sum(centers**2, -1)[..., None]
    distances = square - 2 * multiply("bsc,bnc->bsn", centers, x)
    if k == centers.shape[1]:
        weights = _normalize(_exps(distances, temperature), normalize)
        return product("bsn,bsd->bnd", weights, refined)
    index = _nearest(lax.stop_gradient(distances), k)  # (B, k, N)
    distances = jnp.take_along_axis(distances, index, 1, mode="clip")
    weights = _normalize(_exps(distances, temperature), normalize)
    return _weighted_rows(refined, weights, index)


def _nearest(distances, k):
    """Returns the k nearest centres (B, k, N) for distances (B, S, N), ties to the lowest."""
    by_rounds = lambda distances: smallest_k(distances, k)[1]  # noqa: E731
    by_top_k = functools.partial(_nearest_by_top_k, k=k)
    return by_platform(
        "reconstruction, nearest centers", distances, default=by_rounds, cuda=by_top_k
    )


def _nearest_by_top_k(distances, k):
    return lax.top_k(-distances.swapaxes(1, 2), k)[1].swapaxes(1, 2)


@jax.custom_vjp
def _weighted_rows(rows, weights, index):
    """Adds up rows (B, S, D) at index (B, k, N) with weights (B, k, N): (B, N, D).

    XLA compiles this to one loop, which on CPU takes 1 / 7 to 1 / 30 of the time of the product
    with all rows. The derivative of the loop would add to rows in any order; it took 1.2 to 3.5
    times as long as the products that the backward pass uses here.
    """
    at = jax.vmap(lambda rows, index: jnp.take(rows, index, 0, mode="clip"))
    each = zip(weights.swapaxes(0, 1), index.swapaxes(0, 1), strict=True)
    return sum(weight[..., None] * at(rows, i) for weight, i in each)


def _weighted_rows_forward(rows, weights, index):
    return _weighted_rows(rows, weights, index), (rows, weights, index)


def _weighted_rows_backward(residuals, dy):
    rows, weights, index = residuals
    zeros = jnp.zeros_like(weights, shape=(rows.shape[1], weights.shape[2]))
    put = lambda index, weight: zeros.at[index, jnp.arange(zeros.shape[1])].add(weight)  # noqa: E731
    d_rows = product("bsn,bnd->bsd", jax.vmap(put)(index, weights), dy)
    d_weights = jnp.take_along_axis(product("bsd,bnd->bsn", rows, dy), index, 1, mode="clip")
    return d_rows, d_weights, None


_weighted_rows.defvjp(_weighted_rows_forward, _weighted_rows_backward)


def _exps(distances, temperature):
    """Returns the weights (B, S, N) for squared distances; each token's largest weight is 1."""
    nearest = lax.stop_gradient(distances.min(1, keepdims=True))
    return jnp.exp((nearest - distances) / temperature)


def _normalize(weights, normalize):
    """Normalises weights (..., K, N) over K; each token's largest weight is at least 1 / K."""
    if normalize == "sum":
        return weights / weights.sum(-2, keepdims=True)
    return weights / jnp.sqrt(jnp.sum(weights**2, -2, keepdims=True))


def _by_window(x, centers, refined, temperature, *, tiles, normalize):
    weights = near_weights(take_all(x, tiles.tokens), centers, tiles, temperature)
    seen = tiles.near.any(1, keepdims=True)  # False: padding of a tile
    weights = jnp.where(seen, _normalize(jnp.where(seen, weights, 1), normalize), 0)
    y = product("bnkt,bnkd->bntd", weights, take_all(refined, tiles.centers))
    return take_all(y.reshape(y.shape[0], y.shape[1] * y.shape[2], y.shape[-1]), tiles.homes)


def _bilinear(x, centers, refined, temperature, *, grid, clusters):
    """Resizes (B, h w, D) to (B, H W, D); beyond the outermost centres values are constant."""
    del x, centers, temperature

    def mix(cells, length):
        at = np.clip((np.arange(length) + 0.5) * cells / length - 0.5, 0, cells - 1)
        low = at.astype(int)
        return np.stack([low, np.minimum(low + 1, cells - 1)]), np.stack([1 + low - at, at - low])

    return mix_rows_and_columns(
        refined, clusters, mix(clusters[0], grid[0]), mix(clusters[1], grid[1])
    )


def _check_reconstruction(tokens, centers, refined, neighbors, temperature, normalize, mode):
    for name, x in (("tokens", tokens), ("centers", centers), ("refined", refined)):
        check_tokens(name, x)
    if centers.shape[::2] != tokens.shape[::2]:
        raise ValueError(
            f"centers has shape {centers.shape}; expected ({tokens.shape[0]}, clusters, "
            f"{tokens.shape[2]}) for tokens of shape {tokens.shape}"
        )
    if refined.shape[:2] != centers.shape[:2]:
        raise ValueError(
            f"refined has shape {refined.shape}; expected ({centers.shape[0]}, {centers.shape[1]}, "
            f"channels) for centers of shape {centers.shape}"
        )
    if neighbors < 1:
        raise ValueError(f"neighbors is {neighbors}; it must be at least 1")
    check_temperature(temperature)
    for name, value, known in (("normalize", normalize, NORMS), ("mode", mode, MODES)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")


def _check_grids(tokens, centers, grid, clusters, mode):
    if grid is None or clusters is None:
        raise ValueError(f"grid is {grid} and clusters {clusters}; mode {mode!r} needs both")
    check_grid("tokens", tokens, "grid", grid)
    check_grid("centers", centers, "clusters", clusters)
