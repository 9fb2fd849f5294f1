"""Heat maps of keypoints: targets, the place of the maximum, and the mean with a mirrored image.

Keypoints are (x, y) in pixels of the heat map. Centres of pixels are whole numbers, from (0, 0) at
the top left.

References:
  Xiao et al. 2018, "Simple Baselines for Human Pose Estimation and Tracking", sections 2 and 3.1;
  Zhang et al. 2020, "Distribution-Aware Coordinate Representation for Human Pose Estimation"
  (DARK);
  Huang et al. 2020, "The Devil Is in the Details: Delving into Unbiased Data Processing for Human
  Pose Estimation" (UDP).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tokenvit_jax.ops.dtypes import softmax_dtype

QUARTER, QUARTER_BY_AXIS, DARK = REFINEMENTS = ("quarter", "quarter_by_axis", "dark")

_BLUR_SIDE = 11  # of DARK's Gaussian [pixels]
_BLUR_SIGMA = 2.0  # that OpenCV gives a Gaussian of 11 pixels
_LEAST = 1e-10  # DARK takes logarithms of heat maps from here on


class HeatmapTargets(NamedTuple):
    """Targets of a head that predicts heat maps.

    Attributes:
      maps: (B, H, W, K) float32, with peaks of 1.
      weights: (B, K) float32, 1 for the maps that count, else 0.
    """

    maps: Float[Array, "B H W K"]
    weights: Float[Array, "B K"]


class Keypoints(NamedTuple):
    """Keypoints read from heat maps.

    Attributes:
      points: (B, K, 2) float32, x and y [pixels of the heat map]; (-1, -1) where no value of the
        map is above 0.
      scores: (B, K) float32, the largest values.
    """

    points: Float[Array, "B K 2"]
    scores: Float[Array, "B K"]


def heatmap_targets(
    points: Float[Array, "B K 2"],
    labelled: Bool[Array, "B K"],
    size: tuple[int, int],
    *,
    sigma: float = 2.0,
    unbiased: bool = False,
) -> HeatmapTargets:
    """Returns a Gaussian around every keypoint.

    The Gaussian has its centre in the nearest pixel, and is 0 beyond three standard deviations
    along x or y. The unbiased one has its centre in the keypoint, and is not cut off. A map counts
    if its keypoint is labelled and the square of three standard deviations around it reaches or
    touches the map.

    Args:
      points: x and y of the keypoints (B, K, 2) [pixels of the heat map]; they may lie outside.
      labelled: whether a keypoint is known (B, K).
      size: height H and width W of the heat maps [pixels].
      sigma: standard deviation [pixels].
      unbiased: whether the centre is not rounded.
    """
    radius = int(3 * sigma)
    points = points.astype(jnp.float32)
    # The source rounds towards zero after adding a half.
    centres = points if unbiased else jnp.trunc(points + 0.5)

    def profile(centre, length):
        """Returns the Gaussian of every keypoint along one axis (B, length, K)."""
        distance = jnp.arange(length, dtype=jnp.float32)[:, None] - centre[:, None]
        values = jnp.exp(-(distance**2) / (2 * sigma**2))
        return values if unbiased else jnp.where(jnp.abs(distance) <= radius, values, 0.0)

    height, width = size
    columns, rows = profile(centres[..., 0], width), profile(centres[..., 1], height)
    sides = jnp.array([width, height], jnp.float32)
    near = ((centres - radius < sides) & (centres + radius + 1 >= 0)).all(-1)
    counted = labelled & near
    maps = rows[:, :, None] * columns[:, None] * counted[:, None, None]
    return HeatmapTargets(maps, counted.astype(jnp.float32))


def decode_heatmaps(heatmaps: Float[Array, "B H W K"], refinement: str = QUARTER) -> Keypoints:
    """Returns the place of the largest value of every heat map, between pixels.

    Args:
      heatmaps: (B, H, W, K).
      refinement: "quarter": a quarter of a pixel towards the larger neighbour along x and y, but
        not from the first two or the last row or column; "quarter_by_axis": the same, but a place
        near the border along one axis is still moved along the other one; "dark": one Newton step
        on the logarithm of the blurred map, but not from the first or last two rows or columns.

    Raises:
      ValueError: there is no such refinement.
    """
    if refinement not in REFINEMENTS:
        raise ValueError(f"refinement={refinement!r}; valid: {', '.join(REFINEMENTS)}")
    height, width = heatmaps.shape[1:3]
    maps = jnp.moveaxis(heatmaps, -1, 1).astype(softmax_dtype(heatmaps.dtype))  # (B, K, H, W)
    flat = maps.reshape(*maps.shape[:2], height * width)
    index, scores = flat.argmax(-1), flat.max(-1)
    x, y = index % width, index // width
    if refinement == DARK:
        offset = _newton_step(_log_blurred(maps), x, y)
        inside = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2)
        offset = jnp.where(inside[..., None], offset, 0.0)
    else:
        offset = _quarter(maps, x, y, by_axis=refinement == QUARTER_BY_AXIS)
    points = jnp.stack([x, y], -1) + offset
    return Keypoints(jnp.where(scores[..., None] > 0, points, -1.0), scores)


def _read(maps, x, y):
    """Returns the values of maps (B, K, H, W) at pixels (B, K); the border repeats outside."""
    height, width = maps.shape[2:]
    index = jnp.clip(y, 0, height - 1) * width + jnp.clip(x, 0, width - 1)
    flat = maps.reshape(*maps.shape[:2], height * width)
    return jnp.take_along_axis(flat, index[..., None], -1)[..., 0]


def _quarter(maps, x, y, *, by_axis):
    """Returns a quarter of a pixel along x and y towards the larger neighbour, or 0 (B, K, 2)."""
    height, width = maps.shape[2:]
    slope = jnp.stack(
        [
            _read(maps, x + 1, y) - _read(maps, x - 1, y),
            _read(maps, x, y + 1) - _read(maps, x, y - 1),
        ],
        -1,
    )
    inside = jnp.stack([(x > 1) & (x < width - 1), (y > 1) & (y < height - 1)], -1)
    if by_axis:  # along the other axis, only the border itself is left out
        others = jnp.stack([(y > 0) & (y < height), (x > 0) & (x < width)], -1)
        inside &= others
    else:
        inside = inside.all(-1, keepdims=True)
    return jnp.where(inside, 0.25 * jnp.sign(slope), 0.0)


def _log_blurred(maps):
    """Returns the logarithm of maps (B, K, H, W) after a Gaussian that keeps their maxima."""
    height, width = maps.shape[2:]
    rows, columns = (jnp.asarray(_blur(side), maps.dtype) for side in (height, width))
    blurred = jnp.einsum("yh,bkhw,xw->bkyx", rows, maps, columns, precision=lax.Precision.HIGHEST)
    old, new = (x.max((2, 3), keepdims=True) for x in (maps, blurred))
    return jnp.log(jnp.maximum(blurred * (old / jnp.where(new == 0, 1.0, new)), _LEAST))


def _blur(side: int) -> np.ndarray:
    """Returns the matrix (side, side) of a Gaussian along one axis, with zeros outside."""
    reach = _BLUR_SIDE // 2
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * _BLUR_SIGMA**2))
    distance = np.arange(side)[:, None] - np.arange(side)
    near = np.abs(distance) <= reach
    return np.where(near, weights[np.clip(distance + reach, 0, 2 * reach)], 0) / weights.sum()


def _newton_step(maps, x, y):
    """Returns the step from pixels to the maximum of a parabola through maps, (B, K, 2).

    It is 0 where the matrix of second derivatives has no inverse.
    """
    at = lambda right, down: _read(maps, x + right, y + down)  # noqa: E731
    middle = at(0, 0)
    dx, dy = (at(1, 0) - at(-1, 0)) / 2, (at(0, 1) - at(0, -1)) / 2
    dxx = (at(2, 0) - 2 * middle + at(-2, 0)) / 4
    dyy = (at(0, 2) - 2 * middle + at(0, -2)) / 4
    dxy = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / 4
    determinant = dxx * dyy - dxy**2
    step = jnp.stack([dxy * dy - dyy * dx, dxy * dx - dxx * dy], -1)
    regular = (determinant != 0)[..., None]
    return jnp.where(regular, step / jnp.where(regular, determinant[..., None], 1.0), 0.0)


def average_mirrored(
    heatmaps: Float[Array, "B H W K"],
    mirrored: Float[Array, "B H W K"],
    partners: Int[Array, " K"],
    *,
    shift: bool,
) -> Float[Array, "B H W K"]:
    """Returns the mean of the heat maps of images and those of the mirrored images.

    Args:
      heatmaps: heat maps of the images (B, H, W, K).
      mirrored: heat maps of the mirrored images (B, H, W, K).
      partners: the keypoint on the other side of the body, for every keypoint (K,); itself in the
        middle.
      shift: whether the heat maps that were mirrored back are moved by a pixel to the right, where
        their first column stays: heat maps whose pixels lie at multiples of the stride need it.
    """
    back = jnp.take(mirrored[:, :, ::-1], jnp.asarray(partners), axis=-1)
    if shift:
        back = jnp.concatenate([back[:, :, :1], back[:, :, :-1]], 2)
    return (heatmaps + back) / 2


def heatmap_loss(heatmaps: Float[Array, "B H W K"], targets: HeatmapTargets) -> Float[Array, " B"]:
    """Returns the mean over keypoints and pixels of weight times squared error, (B,) float32.

    Args:
      heatmaps: predictions (B, H, W, K).
      targets: their targets; weights may have any values.
    """
    error = heatmaps.astype(softmax_dtype(heatmaps.dtype)) - targets.maps
    return (targets.weights * (error**2).mean((1, 2))).mean(-1)


def to_heatmap(
    points: Float[Array, "*B 2"], input_size: tuple[int, int], size: tuple[int, int],
    *, unbiased: bool,
) -> Float[Array, "*B 2"]:  # fmt: skip
    """Maps points from pixels of the network's input to pixels of its heat maps.

    Args:
      points: x and y (..., 2) [pixels of the input].
      input_size: height and width of the input [pixels].
      size: height and width of the heat maps [pixels].
      unbiased: whether the first and last pixels of both lie on each other; otherwise the first
        pixels do, and pixels of heat maps are a stride apart.
    """
    return points / _pixels_per_cell(input_size, size, unbiased)


def from_heatmap(
    points: Float[Array, "*B 2"], input_size: tuple[int, int], size: tuple[int, int],
    *, unbiased: bool,
) -> Float[Array, "*B 2"]:  # fmt: skip
    """Undoes :func:`to_heatmap`."""
    return points * _pixels_per_cell(input_size, size, unbiased)


def _pixels_per_cell(input_size, size, unbiased):
    cut = int(unbiased)
    sides = zip(input_size[::-1], size[::-1], strict=True)
    return np.array([(pixels - cut) / (cells - cut) for pixels, cells in sides], np.float32)
