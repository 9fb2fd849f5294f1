"""Pads maps and divides them into windows of adjacent or interlaced tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


def whole_windows(size: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """Returns how many rows and columns of windows cover a map.

    Args:
      size: (H, W).
      window: (h, w), rows and columns of a window.
    """
    return -(-size[0] // window[0]), -(-size[1] // window[1])


def pad_map(x: Float[Array, "B H W C"], size: tuple[int, int]) -> Float[Array, "B H2 W2 C"]:
    """Pads a map with zeros below and on the right.

    Args:
      x: (B, H, W, C).
      size: height and width of the padded map, at least (H, W).
    """
    below, right = size[0] - x.shape[1], size[1] - x.shape[2]
    return jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0)))


def pad_to_windows(
    x: Float[Array, "B H W C"], window: tuple[int, int]
) -> Float[Array, "B H2 W2 C"]:
    """Pads a map with zeros below and on the right to whole windows.

    Args:
      x: (B, H, W, C).
      window: (h, w), rows and columns of a window.
    """
    rows, columns = whole_windows(x.shape[1:3], window)
    return pad_map(x, (rows * window[0], columns * window[1]))


def to_windows(
    x: Shaped[Array, "B H W ..."], window: tuple[int, int], *, interlaced: bool = False
) -> Shaped[Array, "B rows columns h w ..."]:
    """Divides a map into windows.

    Args:
      x: (B, H, W, ...), a JAX or NumPy array.
      window: (h, w), rows and columns of a window; they divide H and W.
      interlaced: False: a window is h adjacent rows and w adjacent columns. True: window (i, j) is
        the rows i, i + H / h, i + 2 H / h, ... and the columns j, j + W / w, ...

    Returns:
      (B, H / h, W / w, h, w, ...).
    """
    height, width = window
    count = x.shape[1] // height, x.shape[2] // width
    if interlaced:
        x = x.reshape(x.shape[0], height, count[0], width, count[1], *x.shape[3:])
        return x.transpose(0, 2, 4, 1, 3, *range(5, x.ndim))
    x = x.reshape(x.shape[0], count[0], height, count[1], width, *x.shape[3:])
    return x.transpose(0, 1, 3, 2, 4, *range(5, x.ndim))


def to_map(
    windows: Shaped[Array, "B rows columns h w ..."], *, interlaced: bool = False
) -> Shaped[Array, "B H W ..."]:
    """Puts windows together again; undoes :func:`to_windows`.

    Args:
      windows: (B, rows, columns, h, w, ...).
      interlaced: as in :func:`to_windows`.

    Returns:
      (B, rows h, columns w, ...).
    """
    batch, rows, columns, height, width, *rest = windows.shape
    order = (0, 3, 1, 4, 2) if interlaced else (0, 1, 3, 2, 4)
    x = windows.transpose(*order, *range(5, windows.ndim))
    return x.reshape(batch, rows * height, columns * width, *rest)
