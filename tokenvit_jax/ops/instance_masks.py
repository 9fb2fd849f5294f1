"""Masks of objects: targets for a mask head, and pasting of its predictions into an image.

The mask of an object is an array over a frame, which is its box or the whole image; the cells of
the array divide the frame evenly.

References:
  He et al. 2017, "Mask R-CNN", section 3.1; MMDetection Contributors, "MMDetection" (2018).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num, UInt8

# Samples of a target's cell along an axis, at most. With 28 cells across a whole box, four samples
# visit each of 112 rows of a mask.
MAX_SAMPLES = 4


def unpack_masks(bits: UInt8[Array, "*n h w"]) -> Bool[Array, "*n h w_8"]:
    """Returns masks (..., h, 8 w) for rows packed by `numpy.packbits`, (..., h, w) uint8."""
    places = jnp.arange(7, -1, -1, dtype=jnp.uint8)
    unpacked = (bits[..., None] >> places) & 1
    return unpacked.reshape(*bits.shape[:-1], -1).astype(bool)


def mask_targets(
    masks: Num[Array, "n h w"],
    frames: Float[Array, "n 4"],
    rois: Float[Array, "n 4"],
    *,
    size: int = 28,
    max_samples: int = MAX_SAMPLES,
) -> Bool[Array, "n s s"]:
    """Returns the masks of objects within regions, (n, size, size).

    A cell belongs to the object where at least half of it does, by the mean of bilinear samples of
    the mask, one per pixel of the image along both axes.

    Args:
      masks: masks (n, h, w), 0 or 1.
      frames: boxes that the masks fill (n, 4) [x1 y1 x2 y2, pixels]; outside of them, masks are 0.
      rois: regions (n, 4).
      size: rows and columns of a target.
      max_samples: largest number of samples of a cell along an axis.
    """
    height, width = masks.shape[1:]
    rows = _sampling(frames[:, 1::2], rois[:, 1::2], height, size, max_samples)
    columns = _sampling(frames[:, ::2], rois[:, ::2], width, size, max_samples)
    values = jnp.einsum(
        "nsh,nhw,ntw->nst", rows, masks.astype(jnp.float32), columns, precision="highest"
    )
    return values >= 0.5


def paste_masks(
    probabilities: Float[Array, "n m m"], boxes: Float[Array, "n 4"], size: tuple[int, int]
) -> Float[Array, "n H W"]:
    """Returns the probability of every pixel of an image, (n, H, W) float32.

    The masks are interpolated at the centres of the pixels (bilinear), with zeros around them. A
    box without height or width has no pixel.

    Args:
      probabilities: masks in the frame of their box (n, m, m).
      boxes: (n, 4) [x1 y1 x2 y2, pixels].
      size: height H and width W of the image [pixels].
    """
    cells = probabilities.shape[1]
    rows, columns = (
        _interpolation(boxes[:, i], boxes[:, i + 2], jnp.arange(side) + 0.5, cells)
        for i, side in ((1, size[0]), (0, size[1]))
    )
    probabilities = probabilities.astype(jnp.float32)
    return jnp.einsum("nhm,nmk,nwk->nhw", rows, probabilities, columns, precision="highest")


def _sampling(frame, roi, cells, size, max_samples):
    """Returns the share of every cell of a mask in the cells of a region, (n, size, cells).

    Args:
      frame: low and high end of the mask along an axis (n, 2) [pixels].
      roi: low and high end of the region (n, 2).
      cells: cells of the mask.
      size: cells of the region.
      max_samples: as in :func:`mask_targets`.
    """
    side = (roi[:, 1] - roi[:, 0]) / size
    samples = jnp.clip(jnp.ceil(side), 1, max_samples)[:, None, None]
    within = (jnp.arange(max_samples) + 0.5) / samples  # (n, 1, max_samples)
    position = roi[:, :1, None] + (jnp.arange(size)[:, None] + within) * side[:, None, None]
    position = _to_cells(frame[:, :1, None], frame[:, 1:, None], position, cells)
    # Like RoIAlign: what is less than a cell outside counts as the border.
    exists = (within < 1) & (position >= -1) & (position <= cells)
    weights = _bilinear(jnp.clip(position, 0, cells - 1), cells)
    return jnp.where(exists[..., None], weights, 0.0).sum(2) / samples


def _interpolation(low, high, position, cells):
    """Returns the bilinear weights of the cells of masks at positions, (n, positions, cells).

    Args:
      low: low end of the masks along an axis (n,) [pixels].
      high: high end (n,).
      position: (positions,) [pixels].
      cells: cells of a mask.
    """
    return _bilinear(_to_cells(low[:, None], high[:, None], position, cells), cells)


def _to_cells(low, high, position, cells):
    """Returns positions [pixels] in cells of a mask, from 0 at the centre of the first one."""
    side = high - low
    return jnp.where(side > 0, (position - low) / jnp.where(side > 0, side, 1) * cells - 0.5, -2.0)


def _bilinear(position, cells):
    """Returns bilinear weights (..., cells) at positions (...) in cells, with zeros around."""
    return jnp.maximum(1 - abs(position[..., None] - jnp.arange(cells)), 0)
