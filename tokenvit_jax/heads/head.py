"""The bases of all heads."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal

from tokenvit_jax.layers import ChannelDropout, Conv, ConvModule
from tokenvit_jax.models.settings import (
    BATCH_NORM,
    CHANNELS,
    CLASSES,
    COMPUTATION,
    RATE,
    Rules,
    norm_axis,
    rules_of,
)
from tokenvit_jax.valid import Number, check_all, whole

# Rule of the heads whose outputs are logits.
LOGITS: Rules = {"num_classes": whole(1, CLASSES)}


class Head(nn.Module):
    """A head whose attributes are checked when it is made, like the settings of a model.

    Attributes:
      reads: the input: "tokens", those of `Backbone.encode`; "maps", those of
        `Backbone.features`, of which a hierarchical backbone has four; or "taps", those of
        `Backbone.taps`.
      has_auxiliary: whether training adds the loss of an :class:`~tokenvit_jax.heads.FcnHead` on
        the third map; the head then has the setting ``auxiliary_channels``.
    """

    reads: ClassVar[str] = "tokens"
    has_auxiliary: ClassVar[bool] = False
    valid: ClassVar[Rules] = COMPUTATION

    def __post_init__(self):
        check_all("", vars(self), rules_of(type(self)))
        super().__post_init__()


class MapHead(Head):
    """A convolutional head with BatchNorm; its logits have the stride of the first map it reads.

    Attributes:
      num_classes: K.
      channels: channels of the convolutions.
      dropout: rate at which whole channels are dropped in front of the classifier.
      batch_norm: images that statistics are over in training, as in `BatchNormSettings`.
      init_std: standard deviation of the classifier's initial weights: 0.01 in mmsegmentation.
        Narrow heads that are trained from scratch need more: the rows of the classes have to
        differ before the layers in front learn to tell the classes apart.
      dtype: type of the computation; parameters and logits are float32.
      axis_name: mapped axis that the batch is split over, for pmap; None under jit.
    """

    reads = "maps"
    valid: ClassVar[Rules] = LOGITS | {
        "channels": CHANNELS, "dropout": RATE, "batch_norm": BATCH_NORM,
        "init_std": Number(1e-8, 10),
    }  # fmt: skip

    num_classes: int
    channels: int = 256
    dropout: float = 0.1
    batch_norm: str | int = "global"
    init_std: float = 0.01
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def block(self, kernel_size: int, name: str) -> ConvModule:
        """Returns a convolution to `channels`, BatchNorm and ReLU."""
        axis = norm_axis(self.batch_norm, self.axis_name)
        return ConvModule(self.channels, kernel_size, self.dtype, axis, name=name)

    def classify(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the logits (B, h, w, K) in float32 for a map (B, h, w, C)."""
        x = ChannelDropout(self.dropout, self.axis_name)(x, train)
        return Conv(self.num_classes, 1, init=normal(self.init_std), name="classifier")(x)
