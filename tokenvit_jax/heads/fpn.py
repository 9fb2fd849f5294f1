"""Feature pyramids: maps of equal channels, with the coarse ones added to the fine ones."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import xavier_uniform

from tokenvit_jax.layers import Conv
from tokenvit_jax.ops import resize_nearest


def pyramid_levels(
    maps: Sequence[jax.Array], conv: Callable[[int, str], Callable[[jax.Array], jax.Array]]
) -> list[jax.Array]:
    """Returns a level for each map (B, h, w, C).

    A level is a 1 x 1 convolution of its map plus the coarser level, repeated to its size, and
    then a 3 x 3 convolution.

    Args:
      maps: the maps, the finest first.
      conv: returns a convolution with a kernel size and a name.

    References:
      Lin et al. 2017, "Feature Pyramid Networks for Object Detection".
    """
    levels = [conv(1, f"lateral_{i}")(x) for i, x in enumerate(maps, 1)]
    for i in reversed(range(len(levels) - 1)):
        levels[i] += resize_nearest(levels[i + 1], levels[i].shape[1:3])
    return [conv(3, f"output_{i}")(x) for i, x in enumerate(levels, 1)]


class FeaturePyramid(nn.Module):
    """Maps (B, h, w, Ci), the finest first -> levels (B, h, w, C), with coarser ones at the end.

    Attributes:
      channels: C.
      num_subsampled: further levels, each every second row and column of the one before.
      num_convolved: further levels, each a 3 x 3 convolution with stride 2 of the one before, the
        first of them of the last map.
      dtype: type of the computation.
    """

    channels: int
    num_subsampled: int = 0
    num_convolved: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        def conv(kernel_size, name, stride=1):
            return Conv(
                self.channels, kernel_size, init=xavier_uniform(), dtype=self.dtype, stride=stride,
                name=name,
            )  # fmt: skip

        levels = pyramid_levels(maps, conv)
        for _ in range(self.num_subsampled):
            levels.append(levels[-1][:, ::2, ::2])
        coarsest = maps[-1]
        for i in range(self.num_convolved):
            coarsest = conv(3, f"coarser_{i + 1}", stride=2)(coarsest)
            levels.append(coarsest)
        return levels
