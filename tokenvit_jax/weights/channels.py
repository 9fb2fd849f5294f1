"""Adapts the first layer of a network to images with another number of channels."""

import numpy as np


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Returns the kernel of a convolution on RGB images for another number of input channels.

    One channel gets the sum over red, green and blue, so that a grey image gives the output of the
    RGB image with three equal channels. Any other number gets the three kernels in turn, scaled by
    3 / channels, so that the outputs keep their size (timm's rule).

    Args:
      kernel: (rows, columns, 3, C).
      channels: number of input channels.

    Returns:
      (rows, columns, channels, C).
    """
    if channels == 1:
        return kernel.sum(2, keepdims=True)
    return kernel[:, :, np.arange(channels) % 3] * np.asarray(3 / channels, kernel.dtype)
