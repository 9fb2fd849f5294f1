"""Draws keypoints and the limbs between them over an image."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw

from tokenvit_jax.pictures.draw import COLORS, as_rgb

MIN_SCORE = 0.2  # of keypoints that are drawn
_LEFT, _RIGHT, _MIDDLE = (
    tuple(round(255 * level) for level in to_rgb(color)) for color in (COLORS[1], *COLORS[:3:2])
)
_DOT = (255, 255, 255)
_LONG_SIDE = 768  # a smaller image is enlarged to about this length [pixels]
_THICKEST = 80  # size of a person / width of its longest limbs
_THINNEST = 5  # length of a limb / its width: limbs of faces and fingers are thin


def draw_skeletons(
    image: np.ndarray,
    keypoints: np.ndarray,
    limbs: Sequence[tuple[int, int]],
    names: Sequence[str],
    min_score: float = MIN_SCORE,
) -> np.ndarray:
    """Returns an image with skeletons: left limbs are blue, right ones orange, others green.

    Args:
      image: (H, W, C) uint8.
      keypoints: (n, K, 3), x, y [pixels] and score (or visibility) of the points of n persons, the
        last one on top.
      limbs: pairs of keypoints.
      names: one per keypoint; limbs of two points with "left" or "right" in their names are such.
      min_score: points up to this score are left out, with their limbs.

    Returns:
      (s H, s W, 3) uint8: a small image is enlarged by a whole number s, so that fingers are seen.
    """
    scale = max(1, round(_LONG_SIDE / max(image.shape[:2])))
    canvas = Image.fromarray(np.ascontiguousarray(as_rgb(image)))
    canvas = canvas.resize((scale * canvas.width, scale * canvas.height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)
    for person in np.asarray(keypoints, np.float64):
        # Whole numbers: Pillow would cut off fractions.
        places = np.rint((person[:, :2] + 0.5) * scale - 0.5).astype(int)
        _draw(pen, places, person[:, 2] > min_score, limbs, names)
    return np.asarray(canvas)


def _draw(
    pen: ImageDraw.ImageDraw,
    points: np.ndarray,
    shown: np.ndarray,
    limbs: Sequence[tuple[int, int]],
    names: Sequence[str],
) -> None:
    """Draws a person: places (K, 2) of the points, and which of them are shown (K,)."""
    if not shown.any():
        return
    thickest = max(1.0, np.ptp(points[shown], axis=0).max() / _THICKEST)
    for limb in limbs:
        if shown[[*limb]].all():
            ends = points[[*limb]]
            width = min(thickest, np.linalg.norm(ends[1] - ends[0]) / _THINNEST)
            color = _side_color([names[point] for point in limb])
            pen.line([*map(tuple, ends.tolist())], fill=color, width=max(1, round(width)))
    radius = round(thickest / 4)
    for x, y in points[shown].tolist():
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_DOT)


def _side_color(names: Sequence[str]) -> tuple[int, int, int]:
    for side, color in {"left": _LEFT, "right": _RIGHT}.items():
        if all(side in name for name in names):
            return color
    return _MIDDLE
