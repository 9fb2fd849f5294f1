"""The heads of detectors that read the features of regions: boxes with classes, and masks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, variance_scaling, xavier_uniform

from tokenvit_jax.layers import Conv, PatchConvTranspose, dense

BOX_SIZE, MASK_SIZE = 7, 14  # bins of the features of a region along an axis
# Kaiming's normal by the fan out; kernels are (rows, columns, in, out).
CONV_INIT = variance_scaling(2.0, "fan_out", "normal")


class BoxHead(nn.Module):
    """Features of regions (n, 7, 7, C) -> logits (n, K + 1) and deltas (n, K, 4) in float32.

    The last logit is the background's.

    Attributes:
      num_classes: K.
      hidden: channels of the hidden layers.
      num_convs: convolutions in front of one hidden layer; 0: there are two hidden layers instead.
      shared_deltas: whether all classes have the same deltas, (n, 1, 4).
      init_std: standard deviation of the initial weights of the logits; a tenth for the deltas.
      dtype: type of the computation.
    """

    num_classes: int
    hidden: int = 1024
    num_convs: int = 0
    shared_deltas: bool = False
    init_std: float = 0.01
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        channels, count = x.shape[-1], x.shape[0]
        for i in range(1, self.num_convs + 1):
            conv = Conv(channels, 3, init=CONV_INIT, dtype=self.dtype, name=f"conv{i}")
            x = nn.relu(conv(x))
        x = x.reshape(count, -1)
        for i in (1,) if self.num_convs else (1, 2):
            x = nn.relu(dense(self.hidden, self.dtype, f"fc{i}", xavier_uniform())(x))
        logits = dense(self.num_classes + 1, self.dtype, "logits", normal(self.init_std))(x)
        boxes = 1 if self.shared_deltas else self.num_classes
        deltas = dense(4 * boxes, self.dtype, "deltas", normal(self.init_std / 10))(x)
        deltas = deltas.reshape(count, boxes, 4)
        return logits.astype(jnp.float32), deltas.astype(jnp.float32)


class MaskHead(nn.Module):
    """Features of regions (n, 14, 14, C) -> logits of every class (n, 28, 28, K) in float32.

    Attributes:
      num_classes: K.
      channels: channels of the convolutions.
      num_convs: convolutions in front of the upsampling.
      has_flow: whether the head of the stage before, of the same shape, hands over its features.
      dtype: type of the computation.
    """

    num_classes: int
    channels: int = 256
    num_convs: int = 4
    has_flow: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        for i in range(1, self.num_convs + 1):
            setattr(self, f"conv{i}", self._conv(self.channels, 3))
        if self.has_flow:
            self.flow = self._conv(self.channels, 1)
        self.upsample = PatchConvTranspose(self.channels, 2, self.dtype, CONV_INIT)
        self.logits = self._conv(self.num_classes, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.predict(self.features(x))

    def features(self, x: jax.Array, before: jax.Array | None = None) -> jax.Array:
        """Returns what the convolutions make of the features of regions, (n, 14, 14, C).

        Args:
          x: (n, 14, 14, C).
          before: the same of the stage before (n, 14, 14, C), with `has_flow`.
        """
        if self.has_flow:
            x = x + nn.relu(self.flow(before))
        for i in range(1, self.num_convs + 1):
            x = nn.relu(getattr(self, f"conv{i}")(x))
        return x

    def predict(self, x: jax.Array) -> jax.Array:
        """Returns the logits for the result of :meth:`features`."""
        return self.logits(nn.relu(self.upsample(x))).astype(jnp.float32)

    def _conv(self, dim, kernel_size):
        return Conv(dim, kernel_size, init=CONV_INIT, dtype=self.dtype)
