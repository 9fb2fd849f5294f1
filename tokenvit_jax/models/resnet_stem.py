"""The ResNet in front of a hybrid vision transformer: maps of convolutions with fixed statistics.

Kernels are standardised and maps pass GroupNorm, so that the network depends on no batch. The
names are those of timm's `ResNetV2` with post-activation, which the hybrids of Dosovitskiy et al.
2021 use (Kolesnikov et al. 2020, "Big Transfer").
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import GroupNorm, StandardizedConv
from tokenvit_jax.models.settings import BLOCKS, CHANNELS, Checked, Rules
from tokenvit_jax.valid import Several, whole

LEAST_BOTTLENECK = 8


@dataclasses.dataclass(frozen=True)
class ResNetStem(Checked):
    """Settings of the ResNet; its defaults are ResNet-50 without the last stage.

    Attributes:
      first: channels of the first convolution.
      widths: channels of the stages; the bottlenecks have a quarter of them, at least 8.
      depths: number of blocks of the stages.
      num_groups: groups of channels of every GroupNorm.
    """

    prefix: ClassVar[str] = "stem."
    valid: ClassVar[Rules] = {
        "first": CHANNELS,
        "widths": Several(CHANNELS, empty=False),
        "depths": Several(whole(1, BLOCKS), empty=False),
        "num_groups": CHANNELS,
    }

    first: int = 64
    widths: tuple[int, ...] = (256, 512, 1024)
    depths: tuple[int, ...] = (3, 4, 9)
    num_groups: int = 32

    @property
    def stride(self) -> int:
        """Stride of the last map [pixels]; the first stage has stride 4."""
        return 2 ** (len(self.widths) + 1)

    def bottleneck(self, stage: int) -> int:
        """Returns the channels of the 3 x 3 convolutions of a stage."""
        return max(self.widths[stage] // 4, LEAST_BOTTLENECK)

    def check(self, depth: int) -> None:
        """Raises UserError unless the settings fit together; ``depth`` is ignored."""
        del depth
        if len(self.depths) != len(self.widths):
            raise UserError(
                f"stem.depths={self.depths} is not valid with stem.widths={self.widths}; valid: "
                f"{len(self.widths)} numbers of blocks"
            )
        stages = range(len(self.widths))
        for channels in (self.first, *self.widths, *map(self.bottleneck, stages)):
            if channels % self.num_groups:
                raise UserError(
                    f"stem.num_groups={self.num_groups} does not divide {channels} channels of the "
                    f"stem; valid: divisors of {channels}"
                )


class ResNet(nn.Module):
    """Images (B, H, W, 3) -> the map of every stage, with strides 4, 8 and so on.

    Attributes:
      settings: the architecture.
      remat: whether to recompute the blocks in the backward pass.
      dtype: type of the computation.
    """

    settings: ResNetStem
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        settings = self.settings
        x = StandardizedConv(settings.first, 7, 2, self.dtype, name="conv")(x)
        x = nn.relu(GroupNorm(settings.num_groups, dtype=self.dtype, name="norm")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        block, maps = nn.remat(Bottleneck) if self.remat else Bottleneck, []
        for stage, depth in enumerate(settings.depths):
            for number in range(depth):
                name = f"block_{stage}_{number}"
                stride = 2 if stage > 0 and number == 0 else 1
                x = block(settings, stage, stride, number == 0, self.dtype, name=name)(x)
            maps.append(x)
        return maps


class Bottleneck(nn.Module):
    """ReLU(shortcut + convolutions 1 x 1, 3 x 3, 1 x 1): (B, H, W, C) -> (B, h, w, width).

    GroupNorm follows each convolution, and ReLU all but the last of them.

    Attributes:
      settings: the architecture.
      stage: number of the stage, from 0.
      stride: stride of the 3 x 3 convolution.
      project: whether the shortcut is a 1 x 1 convolution with GroupNorm.
      dtype: type of the computation.
    """

    settings: ResNetStem
    stage: int
    stride: int
    project: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(x, dim, kernel_size, stride, name, scale=nn.initializers.ones):
            conv = StandardizedConv(dim, kernel_size, stride, self.dtype, name=f"conv{name}")
            norm = GroupNorm(
                self.settings.num_groups, dtype=self.dtype, scale_init=scale, name=f"norm{name}"
            )
            return norm(conv(x))

        width, inner = self.settings.widths[self.stage], self.settings.bottleneck(self.stage)
        shortcut = conv(x, width, 1, self.stride, "_shortcut") if self.project else x
        x = nn.relu(conv(x, inner, 1, 1, 1))
        x = nn.relu(conv(x, inner, 3, self.stride, 2))
        # A block starts as its shortcut, as in timm.
        return nn.relu(conv(x, width, 1, 1, 3, nn.initializers.zeros) + shortcut)
