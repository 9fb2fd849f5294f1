"""Adapts the first layer of a network for RGB images to other numbers of channels."""

import numpy as np


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Returns the kernel of a convolution on RGB images for another number of input channels.

    One channel gets the sum over red, green and blue (timm's rule): grey images give what RGB
    images with three equal channels give, up to the different normalisation. More channels, such as
    alpha, get zeros: at first the network ignores them.

    Args:
      kernel: (rows, columns, 3, C).
      channels: number of input channels, 1 or at least 3.

    Returns:
      (rows, columns, channels, C).
    """
    if channels == 1:
        return kernel.sum(2, keepdims=True)
    return np.pad(kernel, ((0, 0), (0, 0), (0, channels - 3), (0, 0)))
