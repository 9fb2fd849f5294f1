"""Draws depth maps in even steps of colour, with a scale in metres, and their errors."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from tokenvit_jax.models.backbone import backbone_of, backbone_variables
from tokenvit_jax.pictures import tokens
from tokenvit_jax.pictures.draw import as_rgb, panel_aspect, show_image, shrink, write_title
from tokenvit_jax.tasks.task import Picture

# Equal steps of depth look equally large in "viridis", also without colour; near is light.
COLORS = "viridis_r"
ERROR_COLORS = "magma"
UNKNOWN = "0.75"  # grey
STEPS = 256  # values per metre of the written depth map, as in KITTI; 16 bits reach 256 m


def superpixels_of(model: nn.Module, variables: Any, images: jax.Array) -> Any:
    """Returns the superpixels of images (B, H, W, C), normalised; None: nothing is clustered."""
    return tokens.superpixels(backbone_of(model), backbone_variables(model, variables), images)


def draw(
    image: np.ndarray,
    depth: np.ndarray,
    view: np.ndarray,
    superpixels: Callable[[], Any],
    caption: str,
) -> dict[str, Picture]:
    """Returns the pictures of one image by name.

    Args:
      image: (H, W, C) uint8.
      depth: (H, W) float32 [metres].
      view: (h, w, C) uint8, the image in the size that the model sees.
      superpixels: function that returns the superpixels of the view, or None.
      caption: name of the image.

    Returns:
      "depth" and "metres", and "superpixels" if the model clusters its tokens.
    """
    drawn = {"depth": plot_depth(as_rgb(image), depth, caption), "metres": depth_image(depth)}
    clustering = jax.device_get(superpixels())
    if clustering is not None:
        drawn["superpixels"] = tokens.plot_superpixels(
            as_rgb(view), clustering, caption, view.shape[:2]
        )
    return drawn


def plot_depth(
    image: np.ndarray, depth: np.ndarray, caption: str, truth: np.ndarray | None = None
) -> Figure:
    """Draws an image and its depth; if the truth is known, also the truth and the error.

    Prediction and truth share a scale. The error is the difference divided by the truth; pixels
    without truth are grey.

    Args:
      image: (H, W, 3) uint8.
      depth: (H, W) [metres].
      caption: title of the image.
      truth: (H, W) [metres], 0 where unknown; None: there is none.
    """
    if truth is not None and not (truth > 0).any():
        truth = None
    maps, known = [("prediction", shrink(depth))], depth
    if truth is not None:
        maps.append(("truth", np.ma.masked_equal(shrink(truth), 0)))
        known = np.concatenate([depth.ravel(), truth[truth > 0]])
    low, high = np.percentile(known, (1, 99))  # a few outliers do not take all colours
    image = shrink(image)
    panel = 3.2 * panel_aspect(image)
    count = len(maps) + 1 + (truth is not None)
    figure = Figure(figsize=(count * panel + 1.4 * (1 + (truth is not None)), 3.4),
                    layout="constrained")  # fmt: skip
    axes = figure.subplots(1, count)
    show_image(axes[0], image)
    write_title(axes[0], caption, panel)
    for axis, (title, values) in zip(axes[1:], maps, strict=False):
        shown = _show_map(axis, values, COLORS, low, high)
        write_title(axis, title, panel)
    _add_scale(figure, shown, axes[1 : len(maps) + 1], "depth [m]")
    if truth is not None:
        true = maps[1][1]
        error = 100 * np.abs(shrink(depth) - true) / true
        shown = _show_map(axes[-1], error, ERROR_COLORS, 0, np.percentile(error.compressed(), 99))
        write_title(axes[-1], f"error, mean {error.mean():.1f} %", panel)
        _add_scale(figure, shown, axes[-1:], "|prediction - truth| / truth [%]")
    return figure


def _show_map(axis: Axes, values: np.ndarray, colors: str, low: float, high: float) -> Any:
    axis.set_facecolor(UNKNOWN)
    shown = axis.imshow(values, cmap=colors, vmin=low, vmax=high, interpolation="nearest")
    axis.set(xticks=(), yticks=())
    axis.spines[:].set_visible(False)
    return shown


def _add_scale(figure: Figure, shown: Any, axes: Any, label: str) -> None:
    scale = figure.colorbar(shown, ax=list(axes), fraction=0.05, pad=0.02)
    scale.set_label(label, fontsize=8)
    scale.ax.tick_params(labelsize=8)


def depth_image(depth: np.ndarray) -> Image.Image:
    """Returns a depth map (H, W) as a grey image of 16 bits with `STEPS` values per metre."""
    return Image.fromarray((depth * STEPS).round().clip(0, 65535).astype(np.uint16))
