"""Colours and image operations that pictures share."""

import colorsys
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

# Okabe and Ito 2008: colours that are distinct for any colour vision, also on photographs.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# For names of files and classes: a $ in them does not begin a formula.
PLAIN = {"parse_math": False}

_MAX_ASPECT = 4.0  # of a panel; a longer image gets a panel that it does not fill
_MAX_SIDE = 1024  # pixels of an image that a panel can show
_CHARACTER = 0.6  # width / size of an average character of a title


def as_rgb(image: np.ndarray) -> np.ndarray:
    """Returns an image as RGB (H, W, 3): grey stays grey, and alpha shows a white ground.

    Args:
      image: (H, W, C) uint8 with 1, 3 or 4 channels.
    """
    if image.shape[-1] == 4:
        alpha = image[..., 3:] / 255
        return (alpha * image[..., :3] + (1 - alpha) * 255).round().astype(np.uint8)
    return np.broadcast_to(image, (*image.shape[:2], 3))


def panel_aspect(image: np.ndarray) -> float:
    """Returns width / height of the panel for an image (H, W, C); strips get a wider panel."""
    return float(np.clip(image.shape[1] / image.shape[0], 1 / _MAX_ASPECT, _MAX_ASPECT))


def shrink(image: np.ndarray) -> np.ndarray:
    """Returns every n-th pixel of an image (H, W, ...), as many as a panel can show."""
    step = -(-max(image.shape[:2]) // _MAX_SIDE)
    return image[::step, ::step]


def write_title(axis: Axes, text: str, width: float, size: float = 8) -> None:
    """Writes a title, without its middle if it is longer than the panel is wide.

    Args:
      axis: the panel.
      text: title.
      width: of the panel [inches].
      size: of the characters [points].
    """
    room = max(8, int(72 * width / (_CHARACTER * size)))
    if len(text) > room:
        text = f"{text[: room // 2 - 1]}…{text[len(text) - room // 2 + 2 :]}"
    axis.set_title(text, fontsize=size, pad=3, **PLAIN)


def show_image(axis: Axes, image: np.ndarray) -> None:
    """Shows an image (H, W, 3) uint8 without ticks or frame."""
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=(), yticks=())
    axis.spines[:].set_visible(False)


def distinct_colors(count: int) -> np.ndarray:
    """Returns colours (count, 3) uint8; successive ones differ most."""
    # Hues step by the golden ratio, starting at blue: the first label is often the background.
    colors = [
        colorsys.hsv_to_rgb((0.6 + 0.61803399 * i) % 1, 0.85, 0.6 + 0.4 * (i % 2))
        for i in range(count)
    ]
    return (255 * np.array(colors)).round().astype(np.uint8)


def color_labels(image: np.ndarray, labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Colours the pixels of an image by their labels.

    Args:
      image: (H, W, 3) uint8.
      labels: (H, W) int, in [0, num_labels).
      num_labels: number of possible labels.

    Returns:
      (H, W, 3) uint8.
    """
    grey = image.mean(-1, keepdims=True)
    return _blend(grey, distinct_colors(num_labels)[labels]).astype(np.uint8)


def tint(
    image: np.ndarray, tokens: np.ndarray, grid: tuple[int, int], color: str | Sequence[float]
) -> np.ndarray:
    """Colours some tokens of an image and fades the others.

    Args:
      image: (H, W, 3) uint8.
      tokens: indices of tokens, row by row.
      grid: rows and columns of tokens.
      color: a colour of matplotlib: "#RRGGBB", or three numbers from 0 to 1.

    Returns:
      (H, W, 3) uint8.
    """
    chosen = np.zeros(grid, bool)
    chosen.flat[tokens] = True
    mask = pixels_of(chosen, image.shape[:2])[..., None]
    rgb = np.rint(255 * np.array(to_rgb(color)))
    grey = image.mean(-1, keepdims=True)
    return np.where(mask, _blend(grey, rgb), 0.5 * grey + 0.5 * 255).astype(np.uint8)


def _blend(grey, colors):
    """Returns colours through which a grey image shows, the same in all pictures."""
    return 0.45 * grey + 0.55 * colors


def pixels_of(tokens: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the value of the token at each pixel: (h, w) -> (H, W) = size."""
    rows, columns = (
        np.arange(side) * count // side for side, count in zip(size, tokens.shape, strict=True)
    )
    return tokens[rows[:, None], columns]
