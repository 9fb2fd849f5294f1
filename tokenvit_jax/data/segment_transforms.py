"""Views of an image for training with segments: random scale and crop, on a canvas of one size.

Images are resized bilinearly, with an antialiasing filter; segments and masks take the nearest
pixel. A view lies at the top left of its canvas; the rest of the image has one colour, and the rest
of the segments is void.

References:
  Ghiasi et al. 2021, "Simple Copy-Paste is a Strong Data Augmentation Method for Instance
  Segmentation" (large-scale jitter); Cheng et al. 2022, "Masked-attention Mask Transformer for
  Universal Image Segmentation", whose released code these transforms follow.
"""

from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image

from tokenvit_jax.data.box_transforms import View, fitted_size, source_pixels, view_pixels
from tokenvit_jax.data.dense_transforms import Pixel, distort_colors, pad, scaled_size
from tokenvit_jax.data.pixel_ops import from_array, to_array
from tokenvit_jax.data.record import Instances, Segments
from tokenvit_jax.run_lengths import decode_mask

Example = dict[str, np.ndarray]
NO_SEGMENT = -1  # class at places of the padded list that hold no segment
LAYERS = 4  # maps of objects that overlap: as many lie over one pixel
GREY = 128  # of the padding in the recipes, before pixels are normalised


# ------------------------------------------------------------------------------------------------
# Views
# ------------------------------------------------------------------------------------------------


def jittered_view(
    size: tuple[int, int],
    canvas: tuple[int, int],
    scale_range: Sequence[float],
    *,
    flip: float,
    rng: np.random.Generator,
) -> View:
    """Draws a view by large-scale jitter.

    The image is mirrored, resized so that it fits into the canvas times a random factor, and
    cropped to the canvas where it is larger. One random number places the crop in both directions:
    crops lie on the diagonal of the resized image.

    Args:
      size: width and height of the image [pixels].
      canvas: height and width of the canvas [pixels].
      scale_range: lowest and highest factor.
      flip: probability that the view is mirrored.
      rng: source of all random numbers.
    """
    mirrored = _draw_flip(flip, rng)
    room = np.array(canvas[::-1]) * rng.uniform(*scale_range)
    resized = scaled_size(*size, float(min(room / size)))
    place = rng.random()
    corner = [
        round(max(whole - side, 0) * place)
        for whole, side in zip(resized, canvas[::-1], strict=True)
    ]
    return _crop(size, resized, corner, canvas, mirrored)


def cropped_view(
    size: tuple[int, int],
    canvas: tuple[int, int],
    short_sides: Sequence[int],
    long_side: int,
    *,
    flip: float,
    rng: np.random.Generator,
) -> View:
    """Draws a view of the size of the canvas from an image whose shorter side is drawn from a list.

    Args:
      size: width and height of the image [pixels].
      canvas: height and width of the canvas [pixels].
      short_sides: shorter sides of the resized image, one of which is drawn [pixels].
      long_side: largest longer side of the resized image.
      flip: probability that the view is mirrored.
      rng: source of all random numbers.
    """
    short_side = short_sides[rng.integers(len(short_sides))]
    resized = fitted_size(size, short_side, long_side)
    corner = [
        int(rng.integers(max(whole - side, 0), endpoint=True))
        for whole, side in zip(resized, canvas[::-1], strict=True)
    ]
    return _crop(size, resized, corner, canvas, _draw_flip(flip, rng))


def _draw_flip(probability: float, rng: np.random.Generator) -> bool:
    return bool(probability and rng.random() < probability)


def _crop(size, resized, corner, canvas, mirrored: bool) -> View:
    """Returns the view of a crop of the resized image, which was mirrored before.

    Only the crop is resized; up to rounding, its pixels equal a crop of the resized image.
    """
    sides = [min(whole, side) for whole, side in zip(resized, canvas[::-1], strict=True)]
    left, top = corner
    if mirrored:
        left = resized[0] - left - sides[0]
    x, y = size[0] / resized[0], size[1] / resized[1]
    right, bottom = min((left + sides[0]) * x, size[0]), min((top + sides[1]) * y, size[1])
    return View((left * x, top * y, right, bottom), tuple(sides), mirrored)


# ------------------------------------------------------------------------------------------------
# Examples
# ------------------------------------------------------------------------------------------------


def view_canvas(
    image: Image.Image,
    view: View,
    canvas: tuple[int, int],
    fill: int | Pixel = GREY,
    *,
    color_rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Returns a view of an image at the top left of a canvas, (H, W, C) uint8.

    Args:
      image: image of any size.
      view: the view, at most as large as the canvas.
      canvas: height and width of the canvas [pixels].
      fill: colour of the rest.
      color_rng: changes the colours of the view at random, as :func:`distort_colors` does; None:
        they stay.
    """
    pixels = view_pixels(image, view)
    if color_rng is not None:
        pixels = to_array(distort_colors(from_array(pixels), color_rng))
    return pad(pixels, (*canvas, pixels.shape[-1]), fill)


def view_segments(
    segments: Segments,
    view: View,
    canvas: tuple[int, int],
    max_segments: int,
    *,
    classes: Collection[int] | None = None,
    keep_empty: bool = False,
) -> Example:
    """Returns the segments of a view as targets of training; crowds are void.

    Panoptic training keeps segments that are not in the view: their masks are trained towards zero.
    Instance training drops them and takes things only, semantic training has one segment per class
    that is seen (:func:`tokenvit_jax.data.segments.class_segments`).

    Args:
      segments: the segments of the image.
      view: the view, at most as large as the canvas.
      canvas: height and width of the canvas [pixels].
      max_segments: M; the largest in the view remain.
      classes: the classes that are targets, others being void; None: all.
      keep_empty: whether segments without pixels in the view are targets.

    Returns:
      `segments` (H, W) int16, the place of every pixel's segment in the list, from 1 on, or 0 for
      void; `classes` (M,) int32, the list, with `NO_SEGMENT` at its end; `segments_left_out` ()
      int32, the number of targets beyond M.
    """
    wanted = ~segments.crowd
    if classes is not None:
        wanted &= np.isin(segments.classes, list(classes))
    targets = np.flatnonzero(wanted)
    largest = max(int(segments.ids.max()), int(segments.numbers.max(initial=0)))
    place = np.zeros(largest + 1, np.int16)  # of an identifier
    place[segments.numbers[targets]] = np.arange(1, len(targets) + 1)
    rows, columns = source_pixels(segments.ids.shape[::-1], view)
    places = place[segments.ids.take(rows, 0).take(columns, 1)]
    areas = np.bincount(places.ravel(), minlength=len(targets) + 1)[1:]
    kept = _largest(areas, max_segments, keep_empty)
    again = np.zeros(len(targets) + 1, np.int16)
    again[kept + 1] = np.arange(1, len(kept) + 1)
    found = segments.classes[targets[kept]]
    left_out = (len(areas) if keep_empty else np.count_nonzero(areas)) - len(kept)
    return {
        "segments": pad(again[places], canvas, 0),
        **_padded_classes(found, max_segments, left_out),
    }


def view_instances(
    instances: Instances,
    size: tuple[int, int],
    view: View,
    canvas: tuple[int, int],
    max_segments: int,
) -> Example:
    """Returns the objects in a view as targets of training; they may overlap. Crowds are none.

    Args:
      instances: the objects of the image.
      size: width and height of the image [pixels].
      view: the view, at most as large as the canvas.
      canvas: height and width of the canvas [pixels].
      max_segments: M; the largest in the view remain.

    Returns:
      `segments` (LAYERS, H, W) int16: an object is in the first map where it overlaps no larger
      one; `classes` and `segments_left_out` as in :func:`view_segments`. Objects that overlap
      others in all maps are left out.
    """
    rows, columns = source_pixels(size, view)
    masks = {
        target: decode_mask(instances.masks[target], size[::-1]).take(rows, 0).take(columns, 1)
        for target in np.flatnonzero(~instances.crowd)
    }
    areas = {target: mask.sum() for target, mask in masks.items() if mask.any()}
    layers = np.zeros((LAYERS, *canvas), np.int16)
    kept = []
    for target in sorted(areas, key=lambda target: -areas[target]):
        mask = masks[target]
        height, width = mask.shape
        free = [not layer[:height, :width][mask].any() for layer in layers]
        if len(kept) == max_segments or not any(free):
            continue
        kept.append(target)
        layers[free.index(True), :height, :width][mask] = len(kept)
    left_out = len(areas) - len(kept)
    return {
        "segments": layers,
        **_padded_classes(instances.classes[kept], max_segments, left_out),
    }


def _largest(areas: np.ndarray, count: int, keep_empty: bool) -> np.ndarray:
    """Returns the places of the largest areas, in their order."""
    order = np.argsort(-areas, kind="stable")
    if not keep_empty:
        order = order[areas[order] > 0]
    return np.sort(order[:count])


def _padded_classes(classes: np.ndarray, count: int, left_out: int) -> Example:
    padded = np.full(count, NO_SEGMENT, np.int32)
    padded[: len(classes)] = classes
    return {"classes": padded, "segments_left_out": np.array(left_out, np.int32)}
