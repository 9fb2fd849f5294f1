"""Tiles of centres and their weights, for superpixel clustering and reconstruction.

The neighbourhoods of tokens do not form a regular pattern on the map of centres, because its sides
need not divide the sides of the map of tokens. Therefore the centres are divided into tiles of a
few cells. The tokens whose home cell is in a tile see only the window of this tile (the tile and
the cells around it), so a round is two matrix products per tile. Products outside a neighbourhood
are masked; their share does not grow with the map. All indices are known when a function is traced.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

# Least number of cells along a side of a tile.
TILE = 4

product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Tiles(NamedTuple):
    """Division of S centres into n tiles.

    Attributes:
      tokens: tokens whose home cell is in each tile (n, T), padded with other tokens.
      centers: centres in the window of each tile (n, K), padded with other centres.
      near: whether a token sees a centre of the window (n, K, T); False for all padding.
      homes: position of each token in the flattened tiles (N,).
      places: positions of each centre in the flattened windows (P, S).
      used: whether an entry of ``places`` is a position (P, S); the others are padding.
      pairs: number of (token, centre) pairs in which the token sees the centre.
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
    """Divides the centres of a map into tiles.

    Args:
      grid: (H, W), rows and columns of tokens.
      clusters: (h, w), rows and columns of centres.
      window: rows and columns of a token's neighbourhood, odd.
    """
    rows, columns = (_tile_axis(*s, window // 2) for s in zip(grid, clusters, strict=True))

    def number(i, j, width):  # indices in a map, row after row
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
    """Divides one axis: returns tokens (n, T), cells of windows (n, K), and near (n, K, T)."""
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
    """Returns the positions of each number in the flattened array, and which of them exist.

    Args:
      numbers: array of numbers below ``count``.
      used: False where a number is padding.
      count: number of different numbers.

    Returns:
      Positions and whether they exist, both (P, count), where P is the largest number of positions.
    """
    numbers = np.where(used, numbers, count).ravel()
    order = np.argsort(numbers, kind="stable")
    times = np.bincount(numbers, minlength=count)[:count]
    i = np.arange(times.max())[:, None]
    at = np.searchsorted(numbers[order], np.arange(count)) + i
    return order[np.minimum(at, len(order) - 1)], i < times


def take_all(x: Float[Array, "B N C"], index: np.ndarray) -> Float[Array, "B ..."]:
    """Returns the same tokens of every image: (B, N, C) at index (...) -> (B, ..., C)."""
    # One integer type with and without 64 bits: what was traced for one does not fit the other.
    return jnp.take(x, index.astype(np.int32), 1, mode="clip")


def add_windows(x: Float[Array, "B n K C"], tiles: Tiles) -> Float[Array, "B S C"]:
    """Adds up the entries of all windows for each centre: (B, n, K, C) -> (B, S, C)."""
    x = x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[-1])
    pairs = zip(tiles.places, tiles.used, strict=True)
    return sum(jnp.where(used[:, None], take_all(x, places), 0) for places, used in pairs)


def near_weights(
    x: Float[Array, "B n T C"],
    centers: Float[Array, "B S C"],
    tiles: Tiles,
    temperature: float | Float[Array, " B"],
) -> Float[Array, "B n K T"]:
    """Computes the softmax weights of the centres in each window for the tokens in its tile.

    Args:
      x: tokens of the tiles (B, n, T, C).
      centers: (B, S, C).
      tiles: division of the centres.
      temperature: tau, above 0; one number, or one for each map (B,).

    Returns:
      (B, n, K, T), whose sum over K is 1 for each token. The axis of centres precedes the axis of
      tokens, because a reduction over centres is then a vector loop on CPU.
    """
    windows = take_all(centers, tiles.centers)
    square = take_all(jnp.sum(centers**2, -1, keepdims=True), tiles.centers)
    # |x|^2 is the same for all centres that a token sees.
    logits = 2 * product("bnkc,bntc->bnkt", windows, x) - square
    logits = logits / per_map(temperature, logits)
    logits = jnp.where(tiles.near, logits, jnp.finfo(logits.dtype).min)
    exps = jnp.exp(logits - lax.stop_gradient(logits.max(2, keepdims=True)))
    weights = jnp.where(tiles.near, exps, 0)
    return weights / jnp.maximum(weights.sum(2, keepdims=True), 1)  # the largest weight is 1


def per_map(value: float | Float[Array, " B"], x: Float[Array, "B ..."]) -> Float[Array, "..."]:
    """Returns a number, or one number for each map (B,), in a shape and type that fit ``x``."""
    value = jnp.asarray(value, x.dtype)
    return value.reshape(*value.shape, *(1,) * (x.ndim - 1))


def mix_rows_and_columns(
    x: Float[Array, "B N C"],
    grid: tuple[int, int],
    rows: tuple[np.ndarray, np.ndarray],
    columns: tuple[np.ndarray, np.ndarray],
) -> Float[Array, "B M C"]:
    """Computes new rows as weighted sums of old rows, then new columns of old columns.

    Args:
      x: (B, H W, C).
      grid: (H, W).
      rows: index and weights, both (P, h): new row i is the sum over p of weights[p, i] times old
        row index[p, i].
      columns: index and weights of the columns, both (Q, w), with the same meaning.

    Returns:
      (B, h w, C).
    """
    x = x.reshape(x.shape[0], *grid, x.shape[-1])
    for axis, (index, weights) in ((1, rows), (2, columns)):
        weights = jnp.asarray(weights, x.dtype).reshape(*weights.shape, *(1,) * (3 - axis))
        # On CPU this is 4 to 20 times faster than a matrix product.
        x = sum(jnp.take(x, i, axis, mode="clip") * w for i, w in zip(index, weights, strict=True))
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[-1])


# ------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------


def check_tokens(name: str, x: Array) -> None:
    """Raises ValueError unless an array is (B, N, C)."""
    if x.ndim != 3:
        raise ValueError(f"{name} has shape {x.shape}; expected (batch, tokens, channels)")


def check_grid(name: str, x: Array, grid_name: str, grid: tuple[int, int]) -> None:
    """Raises ValueError unless an array (B, N, ...) is a map with ``grid`` rows and columns."""
    if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != x.shape[1]:
        raise ValueError(
            f"{grid_name} is {grid}; it must be (rows, columns) with the product {x.shape[1]} for "
            f"{name} of shape {x.shape}"
        )


def check_window(window: int) -> None:
    """Raises ValueError unless the side of a window is odd."""
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window}; it must be odd and at least 1")


def check_temperature(temperature: float | Float[Array, " B"]) -> None:
    """Raises ValueError unless a temperature is above 0 and finite; arrays are not checked."""
    if not isinstance(temperature, Array) and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be above 0 and finite")
