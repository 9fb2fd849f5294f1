"""The ResNet in front of a hybrid vision transformer: maps of convolutions with fixed statistics.

Kernels are standardised and maps pass GroupNorm, so that the network depends on no batch. The
names are those of timm's `ResNetV2` with post-activation, which the hybrids of Dosovitskiy et al.
2021 use (Kolesnikov et al. 2020, "Big Transfer").
"""

import dataclasses
import itertools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import GroupNorm
from tokenvit_jax.layers.conv import Weights, conv_init, convolve_same
from tokenvit_jax.models.settings import BLOCKS, CHANNELS, Checked, Rules
from tokenvit_jax.ops import standardize_kernels
from tokenvit_jax.valid import Several, whole

LEAST_BOTTLENECK = 8
EPSILON = 1e-8  # added to the variance of kernels, as in timm from version 0.4.12


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
      dtype: type of the computation; kernels are standardised in float32.
    """

    settings: ResNetStem
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        settings, dtype, blocks = self.settings, self.dtype, self._blocks()
        shape = (7, 7, x.shape[-1], settings.first)
        weights, _ = Weights(shape, conv_init, use_bias=False, name="conv")()
        # All kernels at once: they are many, and small.
        kernels = [weights, *(kernel for block in blocks for kernel in block.kernels())]
        kernels = iter(standardize_kernels(kernels, EPSILON, dtype))
        x = convolve_same(x.astype(dtype), next(kernels), 2)
        x = nn.relu(GroupNorm(settings.num_groups, dtype=dtype, name="norm")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        maps = []
        for block in blocks:
            if block.project and block.stage > 0:
                maps.append(x)
            x = block(x, list(itertools.islice(kernels, block.num_kernels)))
        return [*maps, x]

    def _blocks(self):
        settings, cls = self.settings, nn.remat(Bottleneck) if self.remat else Bottleneck
        inputs, blocks = settings.first, []
        for stage, depth in enumerate(settings.depths):
            for number in range(depth):
                name = f"block_{stage}_{number}"
                blocks.append(cls(settings, stage, inputs, number == 0, self.dtype, name=name))
                inputs = settings.widths[stage]
        return blocks


class Bottleneck(nn.Module):
    """ReLU(shortcut + convolutions 1 x 1, 3 x 3, 1 x 1): (B, H, W, inputs) -> (B, h, w, width).

    GroupNorm follows each convolution, and ReLU all but the last of them. The first block of every
    stage but the first one has stride 2.

    Attributes:
      settings: the architecture.
      stage: number of the stage, from 0.
      inputs: number of input channels.
      project: whether this is the first block of the stage, whose shortcut is a 1 x 1 convolution
        with GroupNorm.
      dtype: type of the computation.
    """

    settings: ResNetStem
    stage: int
    inputs: int
    project: bool
    dtype: Any

    def setup(self):
        width, inner = self.settings.widths[self.stage], self.settings.bottleneck(self.stage)

        def conv(side, inputs, outputs):
            return Weights((side, side, inputs, outputs), conv_init, use_bias=False)

        def norm(scale=nn.initializers.ones):
            return GroupNorm(self.settings.num_groups, dtype=self.dtype, scale_init=scale)

        self.conv1, self.norm1 = conv(1, self.inputs, inner), norm()
        self.conv2, self.norm2 = conv(3, inner, inner), norm()
        # A block starts as its shortcut, as in timm.
        self.conv3, self.norm3 = conv(1, inner, width), norm(nn.initializers.zeros)
        if self.project:
            self.conv_shortcut, self.norm_shortcut = conv(1, self.inputs, width), norm()

    @property
    def num_kernels(self) -> int:
        return 3 + self.project

    def kernels(self) -> list[jax.Array]:
        """Returns the kernels, before they are standardised."""
        shortcut = [self.conv_shortcut] if self.project else []
        return [weights()[0] for weights in (self.conv1, self.conv2, self.conv3, *shortcut)]

    def __call__(self, x: jax.Array, kernels: list[jax.Array]) -> jax.Array:
        """Computes the block with the standardised :meth:`kernels`."""
        stride, shortcut = 2 if self.project and self.stage > 0 else 1, x
        if self.project:
            shortcut = self.norm_shortcut(convolve_same(x, kernels[3], stride))
        x = nn.relu(self.norm1(convolve_same(x, kernels[0], 1)))
        x = nn.relu(self.norm2(convolve_same(x, kernels[1], stride)))
        return nn.relu(self.norm3(convolve_same(x, kernels[2], 1)) + shortcut)
