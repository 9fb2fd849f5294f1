"""RoIAlign on a pyramid of maps, with as many samples as a region has cells, and its gradient.

All maps of all images are one array of cells. Regions are sorted by their number of samples and
processed in chunks; a chunk takes as many turns as its largest region has samples in a bin, and a
turn reads the four cells around one sample of every bin.

References:
  He et al. 2017, "Mask R-CNN"; torchvision's `roi_align` with `aligned=True`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from tokenvit_jax.kernels.platforms import by_platform, num_devices, on_each_device

CPU_CHUNK = 16  # regions: their bins and the cells that they read stay in the cache
# On accelerators, chunks have at least so many regions, because every turn has launches, and there
# are at most so many chunks.
LEAST_CHUNK, MOST_CHUNKS = 256, 8
FINEST = 56  # square root of the area up to which regions read the finest map [pixels]


class Regions(NamedTuple):
    """Regions (R, ...) in cells of the map that each of them reads.

    Attributes:
      start: upper left corner (R, 2), row and column; 0 is the centre of the first cell.
      bin: height and width of a bin (R, 2).
      samples: samples of a bin along both axes (R, 2).
      total: samples of a bin (R,).
      limits: rows and columns of the map (R, 2).
      first: number of the map's first cell among all cells (R,).
    """

    start: Float[Array, "R 2"]
    bin: Float[Array, "R 2"]
    samples: Int32[Array, "R 2"]
    total: Int32[Array, " R"]
    limits: Int32[Array, "R 2"]
    first: Int32[Array, " R"]


def roi_levels(
    boxes: Float[Array, "*n 4"], num_levels: int, finest: float = FINEST
) -> Int32[Array, "*n"]:
    """Returns the map that each region reads: floor(log2(sqrt(area) / finest)), within the maps.

    Args:
      boxes: (..., 4) [x1 y1 x2 y2, pixels].
      num_levels: number of maps, of which each has twice the stride of the one before.
      finest: square root of the area at which regions change to the second map, halved [pixels].

    References:
      Lin et al. 2017, "Feature Pyramid Networks", Eq. 1.
    """
    sides = boxes[..., 2:] - boxes[..., :2]
    scale = jnp.sqrt(jnp.maximum(sides[..., 0] * sides[..., 1], 0.0))
    level = jnp.floor(jnp.log2(scale / finest + 1e-6))
    return jnp.clip(level, 0, num_levels - 1).astype(jnp.int32)


def roi_align(
    maps: Sequence[Float[Array, "B h w C"]],
    strides: Sequence[int],
    boxes: Float[Array, "B R 4"],
    *,
    size: int,
    sampling_ratio: int = 0,
    finest: float = FINEST,
) -> Float[Array, "B R s s C"]:
    """Returns the features of regions, averages of bilinear samples, (B, R, size, size, C).

    The gradient reaches the maps and not the boxes.

    Args:
      maps: the pyramid, the finest map first.
      strides: strides of the maps [pixels].
      boxes: regions (B, R, 4) [x1 y1 x2 y2, pixels]. One without height or width gives zeros.
      size: bins along an axis.
      sampling_ratio: samples of a bin along an axis; 0: as many as it has cells, rounded up.
      finest: as in :func:`roi_levels`.

    Returns:
      In the type of the maps; sums are float32.
    """

    def pool(maps, boxes):
        batch, count = boxes.shape[:2]
        shapes = tuple(x.shape[1:3] for x in maps)
        flat = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in maps])
        regions = _regions(boxes, shapes, strides, size, sampling_ratio, finest)
        pooled = _pool(flat, lax.stop_gradient(regions), size, flat.shape[0])
        return pooled.reshape(batch, count, size, size, -1).astype(maps[0].dtype)

    # The cells of all images are one array: every device has its own.
    batch, maps = boxes.shape[0], tuple(maps)
    if batch == 0:
        return jnp.zeros((*boxes.shape[:2], size, size, maps[0].shape[-1]), maps[0].dtype)
    if not isinstance(batch, int):  # an exported program takes any number, image by image
        return lax.map(
            lambda image: pool(*jax.tree.map(lambda x: x[None], image))[0], (maps, boxes)
        )
    return (pool if batch % num_devices() else on_each_device(pool))(maps, boxes)


def _regions(boxes, shapes, strides, size, sampling_ratio, finest):
    """Returns the regions of all images, image by image."""
    batch, count = boxes.shape[:2]
    level = roi_levels(boxes, len(shapes), finest)
    limits = jnp.array(shapes, jnp.int32)[level]
    cells = [height * width for height, width in shapes]
    before = jnp.array([sum(cells[:i]) for i in range(len(cells))], jnp.int32)  # in an image
    image = jnp.arange(batch, dtype=jnp.int32)[:, None]
    first = batch * before[level] + image * jnp.array(cells, jnp.int32)[level]
    scale = (1 / jnp.array(strides, jnp.float32))[level]
    corners = boxes.astype(jnp.float32) * scale[..., None]
    start = corners[..., 1::-1] - 0.5
    bins = (corners[..., :1:-1] - corners[..., 1::-1]) / size
    samples = sampling_ratio if sampling_ratio else jnp.maximum(jnp.ceil(bins), 0)
    samples = jnp.broadcast_to(samples, bins.shape).astype(jnp.int32)
    regions = Regions(start, bins, samples, samples.prod(-1), limits, first)
    return jax.tree.map(lambda x: x.reshape(batch * count, *x.shape[2:]), regions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _pool(flat, regions, size, cells):
    """Returns features (R, size, size, C) float32 of regions in cells (P, C); P is ``cells``."""
    del cells  # the gradient needs it
    pool = functools.partial(_pool_in_chunks, size=size)
    return by_platform(
        "roi align",
        flat,
        regions,
        cpu=functools.partial(pool, chunk=CPU_CHUNK),
        default=functools.partial(pool, chunk=_large_chunk(regions.first.shape[0])),
    )


def _pool_fwd(flat, regions, size, cells):
    like = jnp.zeros((0, *flat.shape[1:]), flat.dtype)
    return _pool(flat, regions, size, cells), (like, regions)


def _pool_bwd(size, cells, saved, gradient):
    like, regions = saved
    spread = functools.partial(_spread_in_chunks, size=size, cells=cells)
    flat = by_platform(
        "roi align gradient",
        gradient,
        regions,
        cpu=functools.partial(spread, chunk=CPU_CHUNK),
        default=functools.partial(spread, chunk=_large_chunk(regions.first.shape[0])),
    )
    return flat.astype(like.dtype), None


_pool.defvjp(_pool_fwd, _pool_bwd)


def _large_chunk(count):
    return max(LEAST_CHUNK, -(-count // MOST_CHUNKS))


def _pool_in_chunks(flat, regions, size, chunk):
    """Pools chunks of regions one after another; a chunk has regions of about as many samples."""

    def step(pooled, part):
        places, regions = part
        return pooled.at[places].set(_pool_chunk(flat, regions, size), mode="drop"), None

    shape = regions.first.shape[0], size, size, flat.shape[-1]
    return lax.scan(step, jnp.zeros(shape, jnp.float32), _chunks(regions, chunk))[0]


def _pool_chunk(flat, regions, size):
    """Returns the features (R, size, size, C) of one chunk."""

    def turn(number, total):
        for index, weight in _corners(regions, number, size):
            total += weight[..., None] * flat[index]
        return total

    zeros = jnp.zeros((regions.first.shape[0], size, size, flat.shape[-1]), jnp.float32)
    return lax.fori_loop(0, regions.total.max(), turn, zeros) / _counts(regions)


def _spread_in_chunks(gradient, regions, size, cells, chunk):
    """Returns the gradient of the cells (P, C) float32."""

    def step(total, part):
        places, regions = part
        own = gradient.at[places].get(mode="fill", fill_value=0).astype(jnp.float32)
        own /= _counts(regions)

        def turn(number, total):
            for index, weight in _corners(regions, number, size):
                total = total.at[index].add(weight[..., None] * own)
            return total

        return lax.fori_loop(0, regions.total.max(), turn, total), None

    zeros = jnp.zeros((cells, gradient.shape[-1]), jnp.float32)
    return lax.scan(step, zeros, _chunks(regions, chunk))[0]


def _chunks(regions, chunk):
    """Returns places and regions (n, chunk, ...), by samples; those at the end do not exist."""
    count = regions.first.shape[0]
    order = jnp.argsort(regions.total)

    def in_chunks(x, fill=0):
        x = jnp.pad(x, ((0, -count % chunk), *((0, 0),) * (x.ndim - 1)), constant_values=fill)
        return x.reshape(-1, chunk, *x.shape[1:])

    return in_chunks(order, count), jax.tree.map(lambda x: in_chunks(x[order]), regions)


def _counts(regions):
    """Returns the samples of a bin (R, 1, 1, 1), at least 1."""
    return jnp.maximum(regions.total, 1).astype(jnp.float32)[:, None, None, None]


def _corners(regions, number, size):
    """Returns cells and weights (R, size, size) around one sample of every bin, for each corner."""
    per_row = jnp.maximum(regions.samples[:, 1], 1)
    place = jnp.stack([number // per_row, number % per_row], 1)
    rows, columns = (_neighbors(regions, place, axis, size) for axis in (0, 1))
    exists = number < regions.total
    width = regions.limits[:, 1, None, None]
    for row, row_weight in rows:
        for column, column_weight in columns:
            index = regions.first[:, None, None] + row[:, :, None] * width + column[:, None]
            weight = row_weight[:, :, None] * column_weight[:, None]
            yield index, jnp.where(exists[:, None, None], weight, 0.0)


def _neighbors(regions, place, axis, size):
    """Returns the cells on both sides of a sample along an axis, with their weights, (R, size)."""
    start, side = regions.start[:, axis, None], regions.bin[:, axis, None]
    samples = jnp.maximum(regions.samples[:, axis, None], 1)
    limit = regions.limits[:, axis, None]
    within = (place[:, axis, None] + 0.5) * side / samples
    position = start + jnp.arange(size) * side + within
    inside = (position >= -1) & (position <= limit)  # a cell around the map counts as its border
    position = jnp.clip(position, 0, limit - 1)
    low = jnp.floor(position).astype(jnp.int32)
    fraction = position - low
    high = jnp.minimum(low + 1, limit - 1)
    return (low, jnp.where(inside, 1 - fraction, 0.0)), (high, jnp.where(inside, fraction, 0.0))
