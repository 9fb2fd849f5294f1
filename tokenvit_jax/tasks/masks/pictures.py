"""Draws segments over the image: filled, with outlines and names."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from tokenvit_jax.data.segments import id_pixels
from tokenvit_jax.pictures.draw import (
    PLAIN,
    as_rgb,
    distinct_colors,
    panel_aspect,
    show_image,
    write_title,
)
from tokenvit_jax.tasks.task import NUM_NAMED, Picture

SHOWN_SCORE = 0.3  # least score of an object that a picture and a text show
_OPACITY = 0.5  # of a segment
_HEIGHT = 4.5  # of the picture [inches]


def describe(names: Sequence[str], classes: np.ndarray) -> str:
    """Returns a line with the number of segments of the most frequent classes.

    Args:
      names: names of all classes.
      classes: classes of the shown segments (n,).
    """
    counts = Counter(names[label] for label in classes)
    found = [f"{count} x {name}" for name, count in counts.most_common(NUM_NAMED)]
    more = f", {len(counts) - NUM_NAMED} more classes" if len(counts) > NUM_NAMED else ""
    return ", ".join(found) + more if found else "no segment"


def draw(
    image: np.ndarray,
    masks: np.ndarray,
    classes: np.ndarray,
    names: Sequence[str],
    caption: str,
    scores: np.ndarray | None = None,
) -> Figure:
    """Draws an image with its segments.

    Args:
      image: (H, W, C) uint8.
      masks: (n, H, W) bool; the first ones are drawn last.
      classes: their classes (n,).
      names: names of all classes.
      caption: title of the picture.
      scores: scores of the segments (n,); None: there are none.
    """
    image = as_rgb(image)
    width = _HEIGHT * panel_aspect(image)
    figure = Figure(figsize=(width, _HEIGHT + 0.3), layout="constrained")
    axis = figure.subplots()
    # Segments of a class differ in brightness.
    colors, seen, pixels = distinct_colors(len(names)), Counter(), image.astype(np.float64)
    for i in reversed(range(len(masks))):
        label = classes[i]
        shade = 1 - 0.2 * (seen[label] % 4)
        seen[label] += 1
        mask, color = masks[i], shade * colors[label]
        pixels[mask] = (1 - _OPACITY) * pixels[mask] + _OPACITY * color
        pixels[_outline(mask)] = color
    show_image(axis, pixels.round().astype(np.uint8))
    for i in reversed(range(len(masks))):
        text = names[classes[i]] if scores is None else f"{names[classes[i]]} {scores[i]:.2f}"
        _write(axis, masks[i], text, colors[classes[i]] / 255)
    write_title(axis, caption, width)
    return figure


def id_image(ids: np.ndarray) -> Image.Image:
    """Returns identifiers (H, W) as an image in COCO's panoptic format: R + 256 G + 65,536 B."""
    return Image.fromarray(id_pixels(ids))


def shown_objects(found: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the places of the objects whose score is at least :data:`SHOWN_SCORE`."""
    return np.flatnonzero(found["scores"] >= SHOWN_SCORE)


def pictures_of_segments(
    image: np.ndarray, ids: np.ndarray, classes: np.ndarray, names: Sequence[str], caption: str
) -> dict[str, Picture]:
    """Returns the pictures "segments" and "ids" of one image.

    Args:
      image: (H, W, C) uint8.
      ids: identifier of the segment of every pixel (H, W); 0: none.
      classes: classes of the segments 1, 2, ... (n,).
      names: names of all classes.
      caption: title of the picture.
    """
    masks = ids == np.arange(1, len(classes) + 1)[:, None, None]
    return {"segments": draw(image, masks, classes, names, caption), "ids": id_image(ids)}


def pictures_of_objects(
    image: np.ndarray, found: Mapping[str, np.ndarray], names: Sequence[str], caption: str
) -> dict[str, Picture]:
    """Returns the picture "objects" of one image.

    Args:
      image: (H, W, C) uint8.
      found: "masks" (n, H, W) bool, "classes" (n,) and "scores" (n,).
      names: names of all classes.
      caption: title of the picture.
    """
    shown = shown_objects(found)
    masks, classes, scores = (found[name][shown] for name in ("masks", "classes", "scores"))
    return {"objects": draw(image, masks, classes, names, caption, scores)}


def _outline(mask: np.ndarray) -> np.ndarray:
    """Returns the pixels of a mask (H, W) next to one outside of it."""
    wide = np.pad(mask, 1)
    return mask & ~(wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:])


def _write(axis: Axes, mask: np.ndarray, text: str, color: np.ndarray) -> None:
    """Writes a name on the pixel of a mask that is nearest to the middle of its pixels."""
    rows, columns = np.nonzero(mask)
    if len(rows) == 0:
        return
    middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    dark = color @ (0.299, 0.587, 0.114) < 0.5
    label = axis.text(
        columns[middle], rows[middle], text, fontsize=6, ha="center", va="center",
        color="white" if dark else "black", clip_on=True, **PLAIN,
    )  # fmt: skip
    label.set_bbox({"facecolor": color, "edgecolor": "none", "pad": 0.8})
