"""Multi-head attention within windows, of Swin Transformers, on maps of any size."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers.blocks import dense
from tokenvit_jax.layers.conv import linear_init
from tokenvit_jax.layers.cosine import cosine_heads, logit_scale_init

CPB_CHANNELS = 512  # of the MLP that computes position biases (Liu et al. 2022, Section 3.3)


class WindowAttention(nn.Module):
    """Self-attention (B, H, W, C) -> (B, H, W, C) within windows, with a table of position biases.

    The map is padded with zeros below and on the right to whole windows, before queries, keys and
    values are computed. Padding is attended to like anything else, as in the published detection
    and segmentation models.

    Attributes:
      num_heads: N; C is a multiple of it.
      window_size: rows and columns of the windows that the table is for.

    Raises:
      UserError: num_heads does not divide C.

    References:
      Liu et al. 2021, "Swin Transformer", Section 3.2.
    """

    num_heads: int
    window_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        window: tuple[int, int],
        shift: tuple[int, int],
        *,
        table_window: tuple[int, int] | None = None,
        mask_shift: tuple[int, int] | None = None,
    ) -> jax.Array:
        """Attends.

        Args:
          x: (B, H, W, C).
          window: rows and columns of a window, at most ``window_size``.
          shift: rows and columns that the windows are moved down and right, less than a window;
            at the borders that leaves parts of windows.
          table_window: rows and columns of the window whose table of position biases is resized to
            that of ``window``, from ``window`` to ``window_size``; None: ``window``.
          mask_shift: what the mask takes for the shift; None: ``shift``, which is right.
        """
        _, height, width, channels = x.shape
        if channels % self.num_heads:
            raise UserError(f"num_heads={self.num_heads} does not divide {channels} channels")
        below, right = -height % window[0], -width % window[1]
        x = jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0)))
        x = jnp.roll(x, (-shift[0], -shift[1]), (1, 2)) if any(shift) else x
        # The gradient of a split is one concatenation; of slices it would be a sum of padded maps.
        qkv = jnp.split(self._qkv(x), 3, axis=-1)
        heads = (y.reshape(*x.shape[:3], self.num_heads, -1) for y in qkv)
        q, k, v, scale = self._logits_of(*heads)
        table = self._bias_table()
        if table_window is not None:
            table = resize_bias_table(table, table_window, window)
        bias = ops.relative_position_bias(table, window)
        mask_shift = shift if mask_shift is None else mask_shift
        y = ops.window_attention(q, k, v, bias, window=window, shift=mask_shift, scale=scale)
        y = y.reshape(x.shape)
        y = jnp.roll(y, shift, (1, 2)) if any(shift) else y
        return dense(channels, self.dtype, "proj")(y[:, :height, :width])

    def _qkv(self, x):
        return dense(3 * x.shape[-1], self.dtype, "qkv")(x)

    def _logits_of(self, q, k, v):
        return q, k, v, None

    def _bias_table(self):
        """Returns the bias of every offset (2 K - 1, 2 K - 1, N), K = ``window_size``."""
        side = 2 * self.window_size - 1
        return self.param("relative_position_bias", linear_init, (side, side, self.num_heads))


class CosineWindowAttention(WindowAttention):
    """Window attention of Swin v2: cosines of queries and keys, position biases of an MLP.

    Attributes, beside those of :class:`WindowAttention`:
      pretrained_window_size: side of the windows by which offsets are measured: that of the first
        training, whatever windows there are now.

    References:
      Liu et al. 2022, "Swin Transformer V2", Eqs. 2 to 4.
    """

    pretrained_window_size: int = 8

    def _qkv(self, x):
        channels = x.shape[-1]
        qkv = nn.Dense(
            3 * channels, use_bias=False, dtype=self.dtype, kernel_init=linear_init, name="qkv"
        )(x)
        q_bias, v_bias = (
            self.param(name, nn.initializers.zeros, (channels,)) for name in ("q_bias", "v_bias")
        )
        return qkv + jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(qkv.dtype)

    def _logits_of(self, q, k, v):
        logit_scale = self.param("logit_scale", logit_scale_init, (self.num_heads,))
        return *cosine_heads(q, k, logit_scale), v, 1.0

    def _bias_table(self):
        offsets = np.arange(1 - self.window_size, self.window_size)
        offsets = 8 * offsets / max(self.pretrained_window_size - 1, 1)
        offsets = np.sign(offsets) * np.log2(np.abs(offsets) + 1) / 3  # Eq. 4
        pairs = np.stack(np.meshgrid(offsets, offsets, indexing="ij"), -1)
        return PositionBiasMlp(self.num_heads, name="position_bias")(jnp.asarray(pairs))


def resize_bias_table(
    table: jax.Array, window: tuple[int, int], smaller: tuple[int, int]
) -> jax.Array:
    """Returns the biases of offsets in a smaller window that takes up the room of another one.

    Bilinear, not antialiased; the middle stays the middle.

    Args:
      table: (2 a - 1, 2 b - 1, N), the bias of each offset; no offset in the middle.
      window: (K, L), rows and columns of a window, at most (a, b).
      smaller: (k, l), rows and columns that take up its room, at most (K, L).

    Returns:
      (2 k - 1, 2 l - 1, N).

    References:
      Liang et al. 2022, "Expediting Large-Scale Vision Transformer", the code for Swin.
    """
    rows, columns = (
        slice(n // 2 + 1 - side, n // 2 + side)
        for n, side in zip(table.shape[:2], window, strict=True)
    )
    shape = (2 * smaller[0] - 1, 2 * smaller[1] - 1, table.shape[-1])
    return jax.image.resize(table[rows, columns], shape, "bilinear", antialias=False)


class PositionBiasMlp(nn.Module):
    """Biases from offsets: (..., 2) -> (..., num_heads), between 0 and 16, in the softmax type."""

    num_heads: int

    @nn.compact
    def __call__(self, offsets: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(CPB_CHANNELS, kernel_init=linear_init, name="fc1")(offsets))
        x = nn.Dense(self.num_heads, use_bias=False, kernel_init=linear_init, name="fc2")(x)
        return 16 * nn.sigmoid(x)
