"""Colours and image operations that pictures share."""

import colorsys

import numpy as np
from matplotlib.axes import Axes

# Okabe and Ito 2008: colours that are distinct for any colour vision, also on photographs.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


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
    return (0.45 * grey + 0.55 * distinct_colors(num_labels)[labels]).astype(np.uint8)


def tint(image: np.ndarray, tokens: np.ndarray, grid: tuple[int, int], color: str) -> np.ndarray:
    """Colours some tokens of an image and fades the others.

    Args:
      image: (H, W, 3) uint8.
      tokens: indices of tokens, row by row.
      grid: rows and columns of tokens.
      color: "#RRGGBB".

    Returns:
      (H, W, 3) uint8.
    """
    chosen = np.zeros(grid, bool)
    chosen.flat[tokens] = True
    mask = pixels_of(chosen, image.shape[:2])[..., None]
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    grey = image.mean(-1, keepdims=True)
    return np.where(mask, 0.3 * grey + 0.7 * rgb, 0.5 * grey + 0.5 * 255).astype(np.uint8)


def pixels_of(tokens: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the value of the token at each pixel: (h, w) -> (H, W) = size."""
    rows, columns = (
        np.arange(side) * count // side for side, count in zip(size, tokens.shape, strict=True)
    )
    return tokens[rows[:, None], columns]
