"""Clustering of the tokens of a map around a smaller map of centres, and the way back (Liang et al.
2022, "Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning").

Neither has parameters. A token belongs to the centres around its home cell, softly, and a centre
moves to the weighted mean of its tokens (Eqs. 2 and 3). After some layers of a network on the
centres, a token becomes a weighted mean of what the centres that were nearest to it have become
(Eq. 4).

The neighbourhoods of tokens are no regular parts of the map of centres, whose sides need not divide
those of the map of tokens. Therefore the centres are divided into tiles of a few cells. The tokens
at home in a tile see nothing but the window of the tile and what is around it, so that a round is
two matrix products per tile. What these compute outside of a neighbourhood is masked, and does not
grow with the map. All indices are known when a function is traced.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tokenvit_jax.ops.attention import map_queries, softmax_dtype
from tokenvit_jax.ops.counted import counted_as
from tokenvit_jax.ops.selection import smallest_k

MODES = ("soft", "hard", "window", "bilinear")
NORMS = ("sum", "l2")

# A centre whose tokens' weights have a smaller sum is drawn to 0.
EPSILON = 1e-16
# Cells on a side of a tile, at least.
TILE = 4

_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@functools.partial(
    jax.jit, static_argnames=("grid", "clusters", "window", "iterations", "temperature")
)
def cluster_superpixels(
    tokens: jax.Array,
    grid: tuple[int, int],
    clusters: tuple[int, int],
    *,
    window: int = 5,
    iterations: int = 5,
    temperature: float = 50.0,
) -> jax.Array:
    """Clusters the H x W tokens of a map around h x w centres.

    The first centres are adaptive averages: centre i of h is the mean of the rows of tokens from
    floor(i H / h) up to ceil((i + 1) H / h), exclusive, and of columns alike. Then, in every round,
    a token weights the centres around its home cell (floor(y h / H), floor(x w / W)) by the softmax
    of -d^2 / temperature, d being the distance of the features, and a centre becomes the weighted
    mean of its tokens. A centre that no token sees becomes 0.

    Computed in float32 (float64 for float64 tokens).

    Args:
      tokens: (B, H W, C), row after row.
      grid: (H, W).
      clusters: (h, w), at most H W cells; they need not divide H and W, one may even be larger.
      window: rows and columns of a neighbourhood, odd; cells beyond the border do not count.
      iterations: rounds, at least 0; 0: the adaptive averages.
      temperature: tau, above 0.

    Returns:
      The centres (B, h w, C), row after row, in the type of ``tokens``.

    Raises:
      ValueError: tokens that are no map of ``grid``, or a number that is out of range.

    References:
      Liang et al. 2022, Eqs. 2 and 3, with the division by the sum of the weights that their code
      adds to Eq. 3; Jampani et al. 2018, "Superpixel Sampling Networks".
    """
    _check_tokens("tokens", tokens)
    _check_grid("tokens", tokens, "grid", grid)
    _check_clusters(grid, clusters)
    _check_window(window)
    _check_temperature(temperature)
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}; it must be at least 0")
    batch, length, dim = tokens.shape
    tiles = _make_tiles(grid, clusters, window)

    def cluster(tokens):
        x = tokens.astype(softmax_dtype(tokens.dtype))
        mean = x.mean(1, keepdims=True)
        x = x - mean  # far from the origin digits are lost
        centers = _adaptive_average(x, grid, clusters)
        if iterations:
            centers = _move_centers(x, centers, mean, tiles, iterations, temperature)
        return (centers + mean).astype(tokens.dtype)

    macs = batch * (length + 2 * iterations * tiles.pairs) * dim
    return counted_as("cluster_superpixels", macs, cluster)(tokens)


@functools.partial(
    jax.jit,
    static_argnames=(
        "neighbors", "temperature", "normalize", "mode", "grid", "clusters", "window",
    ),
)  # fmt: skip
def reconstruct_tokens(
    tokens: jax.Array,
    centers: jax.Array,
    refined: jax.Array,
    *,
    neighbors: int = 20,
    temperature: float = 50.0,
    normalize: str = "sum",
    mode: str = "soft",
    grid: tuple[int, int] | None = None,
    clusters: tuple[int, int] | None = None,
    window: int = 5,
) -> jax.Array:
    """Gives every token of before the clustering its part of what the centres have become.

    Modes:
      * "soft": the mean of the refined values of the ``neighbors`` centres that were nearest to the
        token, weighted by the softmax of -d^2 / temperature. Ties go to the lowest centre.
      * "hard": the refined value of the nearest centre.
      * "window": like "soft", of the centres around the home cell as in
        :func:`cluster_superpixels`; needs ``grid`` and ``clusters``.
      * "bilinear": the refined values as a picture that is resized, whatever the tokens; needs
        ``grid`` and ``clusters``.

    Computed in float32 (float64 for float64 tokens).

    Args:
      tokens: (B, N, C), as they were clustered.
      centers: (B, S, C), as the clustering made them.
      refined: (B, S, D), what became of the centres.
      neighbors: at least 1; more than S are S.
      temperature: tau, above 0.
      normalize: "sum": the weights of a token have the sum 1; "l2": the sum of their squares is 1,
        as in the released code, which makes a token up to sqrt(neighbors) times as large.
      mode: see above.
      grid: (H, W) of the tokens.
      clusters: (h, w) of the centres.
      window: of "window", odd.

    Returns:
      (B, N, D) in the type of ``refined``.

    Raises:
      ValueError: shapes that do not fit, an unknown mode or norm, a number that is out of range, or
        no grids where they are needed.

    References:
      Liang et al. 2022, Eq. 4.
    """
    _check_reconstruction(tokens, centers, refined, neighbors, temperature, normalize, mode)
    batch, length, dim = tokens.shape
    num_centers, out_dim = refined.shape[1:]
    if mode in ("window", "bilinear"):
        _check_grids(tokens, centers, grid, clusters, mode)
        _check_window(window)
    match mode:
        case "soft":
            k = min(neighbors, num_centers)
            macs = length * (num_centers * dim + k * out_dim)
            run = functools.partial(_by_nearest, k=k, temperature=temperature, normalize=normalize)
        case "hard":
            macs = length * num_centers * dim
            run = functools.partial(_by_nearest, k=1, temperature=temperature, normalize=normalize)
        case "window":
            tiles = _make_tiles(grid, clusters, window)
            macs = tiles.pairs * (dim + out_dim)
            run = functools.partial(
                _by_window, tiles=tiles, temperature=temperature, normalize=normalize
            )
        case "bilinear":
            macs = 2 * grid[0] * (clusters[1] + grid[1]) * out_dim
            run = functools.partial(_bilinear, grid=grid, clusters=clusters)

    def reconstruct(tokens, centers, refined):
        dtype = softmax_dtype(tokens.dtype)
        x, keys, values = (array.astype(dtype) for array in (tokens, centers, refined))
        mean = x.mean(1, keepdims=True)
        return run(x - mean, keys - mean, values).astype(refined.dtype)

    return counted_as("reconstruct_tokens", batch * macs, reconstruct)(tokens, centers, refined)


# ------------------------------------------------------------------------------------------------
# Clustering
# ------------------------------------------------------------------------------------------------


def _adaptive_average(x, grid, clusters):
    """(B, H W, C) -> (B, h w, C)."""

    def mix(length, cells):
        start = np.arange(cells) * length // cells
        count = -(-np.arange(1, cells + 1) * length // cells) - start
        offset = np.arange(count.max())[:, None]
        return np.minimum(start + offset, length - 1), (offset < count) / count

    return _mix_rows_and_columns(x, grid, mix(grid[0], clusters[0]), mix(grid[1], clusters[1]))


def _move_centers(x, centers, mean, tiles, iterations, temperature):
    """Moves the centres (B, S, C) of tokens (B, N, C), both less their ``mean``."""
    x = _take(x, tiles.tokens)  # (B, n, T, C)

    def move(_, centers):
        weights = _weights(x, centers, tiles, temperature)
        sums = _add_windows(_product("bnkt,bntc->bnkc", weights, x), tiles)
        total = _add_windows(weights.sum(-1, keepdims=True), tiles)  # (B, S, 1)
        divisor = jnp.maximum(total, EPSILON)
        return sums / divisor - mean * (1 - total / divisor)

    return lax.fori_loop(0, iterations, move, centers)


def _weights(x, centers, tiles, temperature):
    """Returns the weights (B, n, K, T) of the centres of every window for the tokens of its tile.

    Those of a token have the sum 1. Centres lead: on CPU a reduction over them is a vector loop.
    """
    windows = _take(centers, tiles.centers)
    square = _take(jnp.sum(centers**2, -1, keepdims=True), tiles.centers)
    # |x|^2 is the same for all centres of a token.
    logits = (2 * _product("bnkc,bntc->bnkt", windows, x) - square) / temperature
    logits = jnp.where(tiles.near, logits, jnp.finfo(logits.dtype).min)
    exps = jnp.exp(logits - lax.stop_gradient(logits.max(2, keepdims=True)))
    weights = jnp.where(tiles.near, exps, 0)
    return weights / jnp.maximum(weights.sum(2, keepdims=True), 1)  # the largest is 1


# ------------------------------------------------------------------------------------------------
# Reconstruction
# ------------------------------------------------------------------------------------------------


def _by_nearest(x, centers, refined, *, k, temperature, normalize):
    """(B, N, C), (B, S, C), (B, S, D) -> (B, N, D), from the k nearest centres of all."""
    square = jnp.sum(centers**2, -1)[..., None]

    def run(x):
        # Less |x|^2, which is the same for all centres of a token.
        distances = square - 2 * _product("bsc,bnc->bsn", centers, x[:, 0])
        if k == centers.shape[1]:
            weights = _normalize(_exps(distances, temperature), normalize)
            return _product("bsn,bsd->bnd", weights, refined)[:, None]
        _, index = smallest_k(lax.stop_gradient(distances), k)  # (B, k, N)
        distances = jnp.take_along_axis(distances, index, 1, mode="clip")
        weights = _normalize(_exps(distances, temperature), normalize)
        return _weighted_rows(refined, weights, index)[:, None]

    return map_queries(run, centers.shape[1], x[:, None])[:, 0]


@jax.custom_vjp
def _weighted_rows(rows, weights, index):
    """Adds up rows (B, S, D) of given index and weights (B, k, N): (B, N, D).

    XLA makes one loop of it, which on CPU takes 1 / 7 to 1 / 30 of the time of the product with all
    rows. What differentiates the loop adds to rows in any order, and took 1.2 to 3.5 times as long
    as the products do that are used here.
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
    d_rows = _product("bsn,bnd->bsd", jax.vmap(put)(index, weights), dy)
    d_weights = jnp.take_along_axis(_product("bsd,bnd->bsn", rows, dy), index, 1, mode="clip")
    return d_rows, d_weights, None


_weighted_rows.defvjp(_weighted_rows_forward, _weighted_rows_backward)


def _exps(distances, temperature):
    """Returns the weights (B, S, N) of squared distances; the largest of a token is 1."""
    nearest = lax.stop_gradient(distances.min(1, keepdims=True))
    return jnp.exp((nearest - distances) / temperature)


def _normalize(weights, normalize):
    """Normalises weights (..., K, N) over K; the largest of a token is no less than 1 / K."""
    if normalize == "sum":
        return weights / weights.sum(-2, keepdims=True)
    return weights / jnp.sqrt(jnp.sum(weights**2, -2, keepdims=True))


def _by_window(x, centers, refined, *, tiles, temperature, normalize):
    weights = _weights(_take(x, tiles.tokens), centers, tiles, temperature)
    seen = tiles.near.any(1, keepdims=True)  # False: fills a tile
    weights = jnp.where(seen, _normalize(jnp.where(seen, weights, 1), normalize), 0)
    y = _product("bnkt,bnkd->bntd", weights, _take(refined, tiles.centers))
    return _take(y.reshape(len(y), -1, y.shape[-1]), tiles.homes)


def _bilinear(x, centers, refined, *, grid, clusters):
    """(B, h w, D) -> (B, H W, D); what is beyond the outermost centres is constant."""
    del x, centers

    def mix(cells, length):
        at = np.clip((np.arange(length) + 0.5) * cells / length - 0.5, 0, cells - 1)
        low = at.astype(int)
        return np.stack([low, np.minimum(low + 1, cells - 1)]), np.stack([1 + low - at, at - low])

    return _mix_rows_and_columns(
        refined, clusters, mix(clusters[0], grid[0]), mix(clusters[1], grid[1])
    )


def _mix_rows_and_columns(x, grid, rows, columns):
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
# Tiles of centres, and the tokens at home in them
# ------------------------------------------------------------------------------------------------


class _Tiles(NamedTuple):
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
def _make_tiles(grid: tuple[int, int], clusters: tuple[int, int], window: int) -> _Tiles:
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
    return _Tiles(tokens, centers, near, homes[0], *places, int(near.sum()))


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


def _take(x, index):
    return jnp.take(x, index, 1, mode="clip")


def _add_windows(x, tiles):
    """(B, n, K, C) -> (B, S, C): adds up what the windows say of a centre."""
    x = x.reshape(len(x), -1, x.shape[-1])
    pairs = zip(tiles.places, tiles.used, strict=True)
    return sum(jnp.where(used[:, None], _take(x, places), 0) for places, used in pairs)


# ------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------


def _check_tokens(name, x):
    if x.ndim != 3:
        raise ValueError(f"{name} has shape {x.shape}; expected (batch, tokens, channels)")


def _check_grid(name, x, grid_name, grid):
    if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != x.shape[1]:
        raise ValueError(
            f"{grid_name} is {grid}; it must be (rows, columns) with the product {x.shape[1]} for "
            f"{name} of shape {x.shape}"
        )


def _check_clusters(grid, clusters):
    most = grid[0] * grid[1]
    if len(clusters) != 2 or min(clusters) < 1 or clusters[0] * clusters[1] > most:
        raise ValueError(
            f"clusters is {clusters}; it must be (rows, columns), each at least 1, with a product "
            f"of at most {most} for grid {grid}"
        )


def _check_window(window):
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window}; it must be odd and at least 1")


def _check_temperature(temperature):
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be above 0 and finite")


def _check_reconstruction(tokens, centers, refined, neighbors, temperature, normalize, mode):
    for name, x in (("tokens", tokens), ("centers", centers), ("refined", refined)):
        _check_tokens(name, x)
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
    _check_temperature(temperature)
    for name, value, known in (("normalize", normalize, NORMS), ("mode", mode, MODES)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")


def _check_grids(tokens, centers, grid, clusters, mode):
    if grid is None or clusters is None:
        raise ValueError(f"grid is {grid} and clusters {clusters}; mode {mode!r} needs both")
    _check_grid("tokens", tokens, "grid", grid)
    _check_grid("centers", centers, "clusters", clusters)
