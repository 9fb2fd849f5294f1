"""What clustering around superpixels and the way back share: tiles of centres, and their weights.

The neighbourhoods of tokens are no regular parts of the map of centres, whose sides need not divide
those of the map of tokens. Therefore the centres are divided into tiles of a few cells. The tokens
at home in a tile see nothing but the window of the tile and what is around it, so that a round is
two matrix products per tile. What these compute outside of a neighbourhood is masked, and does not
grow with the map. All indices are known when a function is traced.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

# Cells on a side of a tile, at least.
TILE = 4

product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Tiles(NamedTuple):
    """Division of S centres into n tiles.

    tokens: those at home in a tile (n, T), and others to fill it.
    centers: those of a window (n, K), and others to fill it.
    near: which centres of the window a token sees (n, K, T); fillings see nothing and are not seen.
    homes: of every token its place in the tiles (N,), flat.
    places: of every centre its places in the windows (P, S), flat; used: which of them are any.
    pairs: number of tokens and centres that are near.
    """

    tokens: np.ndarray
    centers: np.ndarray
    near: np.ndarray
    homes: np.ndarray
    places: np.ndarray
    used: np.ndarray
    pairs: int


@functools.lru_cache
def make_tiles(grid: tuple[int, int], clusters: tuple[int, int], window: int) -> Tiles:
    """Divides the centres of a map; see :func:`tokenvit_jax.ops.cluster_superpixels`."""
    rows, columns = (_tile_axis(*s, window // 2) for s in zip(grid, clusters, strict=True))

    def number(i, j, width):  # of places in a map, row after row
        places = i[:, None, :, None] * width + j[None, :, None]
        return places.reshape(len(i) * len(j), -1)

    tokens = number(rows[0], columns[0], grid[1])
    centers = number(rows[1], columns[1], clusters[1])
    near = rows[2][:, None, :, None, :, None] & columns[2][None, :, None, :, None]
    near = near.reshape(*centers.shape, tokens.shape[1])
    homes, _ = _places(tokens, near.any(1), grid[0] * grid[1])
    places = _places(centers, near.any(2), clusters[0] * clusters[1])
    return Tiles(tokens, centers, near, homes[0], *places, int(near.sum()))


def _tile_axis(length, cells, reach):
    """Returns tokens (n, T), cells of windows (n, K), and which are near (n, K, T), of one axis."""
    size = max(TILE, 2 * reach)
    count = -(-cells // size) if cells > size + 2 * reach else 1
    size = -(-cells // count)
    halo = reach if count > 1 else 0
    home = np.arange(length) * cells // length
    tile = np.arange(-(-cells // size))[:, None]
    first, end = np.searchsorted(home, tile * size), np.searchsorted(home, (tile + 1) * size)
    token = first + np.arange((end - first).max())
    cell = tile * size + np.arange(-halo, size + halo)
    near = np.abs(cell[:, :, None] - home[np.minimum(token, length - 1)][:, None]) <= reach
    near &= ((cell >= 0) & (cell < cells))[:, :, None] & (token < end)[:, None]
    return np.minimum(token, length - 1), np.clip(cell, 0, cells - 1), near


def _places(numbers, used, count):
    """Returns where each of ``count`` numbers stands in an array, flat (P, count), and if at all.

    Args:
      numbers: below ``count``.
      used: False where a number does not count.
      count: of different numbers.
    """
    numbers = np.where(used, numbers, count).ravel()
    order = np.argsort(numbers, kind="stable")
    times = np.bincount(numbers, minlength=count)[:count]
    i = np.arange(times.max())[:, None]
    at = np.searchsorted(numbers[order], np.arange(count)) + i
    return order[np.minimum(at, len(order) - 1)], i < times


def take(x, index):
    """Returns tokens (B, ..., C) of (B, N, C)."""
    return jnp.take(x, index, 1, mode="clip")


def add_windows(x, tiles):
    """(B, n, K, C) -> (B, S, C): adds up what the windows say of a centre."""
    x = x.reshape(len(x), -1, x.shape[-1])
    pairs = zip(tiles.places, tiles.used, strict=True)
    return sum(jnp.where(used[:, None], take(x, places), 0) for places, used in pairs)


def near_weights(x, centers, tiles, temperature):
    """Returns the weights (B, n, K, T) of the centres of every window for the tokens of its tile.

    Those of a token have the sum 1. Centres lead: on CPU a reduction over them is a vector loop.
    """
    windows = take(centers, tiles.centers)
    square = take(jnp.sum(centers**2, -1, keepdims=True), tiles.centers)
    # |x|^2 is the same for all centres of a token.
    logits = (2 * product("bnkc,bntc->bnkt", windows, x) - square) / temperature
    logits = jnp.where(tiles.near, logits, jnp.finfo(logits.dtype).min)
    exps = jnp.exp(logits - lax.stop_gradient(logits.max(2, keepdims=True)))
    weights = jnp.where(tiles.near, exps, 0)
    return weights / jnp.maximum(weights.sum(2, keepdims=True), 1)  # the largest is 1


def mix_rows_and_columns(x, grid, rows, columns):
    """(B, H W, C) -> (B, h w, C): new rows are weighted sums of old ones, and columns alike.

    Args:
      x: (B, H W, C).
      grid: (H, W).
      rows: index and weights (P, h): row i is the sum over p of weights[p, i] x[index[p, i]].
      columns: the same of columns, (Q, w).
    """
    x = x.reshape(len(x), *grid, x.shape[-1])
    for axis, (index, weights) in ((1, rows), (2, columns)):
        weights = jnp.asarray(weights, x.dtype).reshape(*weights.shape, *(1,) * (3 - axis))
        # On CPU 4 to 20 times faster than a matrix product.
        x = sum(jnp.take(x, i, axis, mode="clip") * w for i, w in zip(index, weights, strict=True))
    return x.reshape(len(x), -1, x.shape[-1])


# ------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------


def check_tokens(name, x):
    """Raises ValueError unless an array is (B, N, C)."""
    if x.ndim != 3:
        raise ValueError(f"{name} has shape {x.shape}; expected (batch, tokens, channels)")


def check_grid(name, x, grid_name, grid):
    """Raises ValueError unless an array is a map of ``grid``, row after row."""
    if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != x.shape[1]:
        raise ValueError(
            f"{grid_name} is {grid}; it must be (rows, columns) with the product {x.shape[1]} for "
            f"{name} of shape {x.shape}"
        )


def check_window(window):
    """Raises ValueError unless a window has an odd side."""
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window}; it must be odd and at least 1")


def check_temperature(temperature):
    """Raises ValueError unless a temperature is above 0 and finite."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be above 0 and finite")
