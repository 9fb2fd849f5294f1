"""Multi-head attention within windows of maps of any size (Swin Transformer)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tokenvit_jax import ops
from tokenvit_jax.layers.blocks import check_num_heads, dense
from tokenvit_jax.layers.conv import linear_init
from tokenvit_jax.layers.cosine import cosine_heads, logit_scale_init
from tokenvit_jax.ops.heads import merge_heads, split_heads
from tokenvit_jax.ops.windows import pad_to_windows

# Hidden channels of the MLP that computes position biases (Liu et al. 2022, Section 3.3).
CPB_CHANNELS = 512


class WindowAttention(nn.Module):
    """Self-attention (B, H, W, C) -> (B, H, W, C) within windows, with a table of position biases.

    The map is padded with zeros below and on the right to whole windows before queries, keys and
    values are computed. Tokens attend to padding as to other tokens, as in the published detection
    and segmentation models.

    Attributes:
      num_heads: N, a divisor of C.
      window_size: rows and columns of the largest window in the table.
      dtype: type of the computation.

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
        x: Float[Array, "B H W C"],
        window: tuple[int, int],
        shift: tuple[int, int],
        *,
        table_window: tuple[int, int] | None = None,
        mask_shift: tuple[int, int] | None = None,
    ) -> Float[Array, "B H W C"]:
        """Attends.

        Args:
          x: (B, H, W, C).
          window: rows and columns of a window, at most ``window_size``.
          shift: rows and columns, less than a window, by which the windows are moved down and
            right; parts of windows remain at the borders.
          table_window: window (rows, columns) whose position biases are resized to ``window``; its
            size is from ``window`` to ``window_size``. None: ``window``.
          mask_shift: shift that the mask assumes; None: ``shift``, which is correct.
        """
        _, height, width, channels = x.shape
        check_num_heads(self.num_heads, channels)
        x = pad_to_windows(x, window)
        x = jnp.roll(x, (-shift[0], -shift[1]), (1, 2)) if any(shift) else x
        # A split's gradient is one concatenation; slices would have a sum of padded maps.
        qkv = jnp.split(self._qkv(x), 3, axis=-1)
        heads = (split_heads(y, self.num_heads) for y in qkv)
        q, k, v, scale = self._logits_of(*heads)
        table = self._bias_table()
        if table_window is not None:
            table = resize_bias_table(table, table_window, window)
        bias = ops.relative_position_bias(table, window)
        mask_shift = shift if mask_shift is None else mask_shift
        y = ops.window_attention(
            q, k, v, bias, window=window, shift=mask_shift, scale=scale, joined=scale is None
        )
        y = merge_heads(y)
        y = jnp.roll(y, shift, (1, 2)) if any(shift) else y
        return dense(channels, self.dtype, "proj")(y[:, :height, :width])

    def _qkv(self, x):
        return dense(3 * x.shape[-1], self.dtype, "qkv")(x)

    def _logits_of(self, q, k, v):
        """Returns queries, keys, values, and the factor of their products; None: as usual."""
        return q, k, v, None

    def _bias_table(self):
        """Returns the bias for every offset (2 K - 1, 2 K - 1, N), K = ``window_size``."""
        side = 2 * self.window_size - 1
        return self.param("relative_position_bias", linear_init, (side, side, self.num_heads))


class CosineWindowAttention(WindowAttention):
    """Window attention of Swin v2: cosines of queries and keys, position biases from an MLP.

    Attributes:
      pretrained_window_size: side of the windows in pretraining, which is the unit of the offsets.
        The other attributes are inherited from :class:`WindowAttention`.

    References:
      Liu et al. 2022, "Swin Transformer V2", Eqs. 2 to 4.
    """

    pretrained_window_size: int = 8

    def _qkv(self, x):
        channels = x.shape[-1]
        qkv = dense(3 * channels, self.dtype, "qkv", use_bias=False)(x)
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
    table: Float[Array, "A B N"], window: tuple[int, int], smaller: tuple[int, int]
) -> Float[Array, "a b N"]:
    """Resizes the table of a window to a smaller window that covers the same area.

    The resizing is bilinear and not antialiased; offset 0 stays in the middle.

    Args:
      table: (2 a - 1, 2 b - 1, N), the bias for each offset; offset 0 is in the middle.
      window: (K, L), rows and columns of a window, at most (a, b).
      smaller: (k, l), rows and columns of the smaller window, at most (K, L).

    Returns:
      (2 k - 1, 2 l - 1, N).

    References:
      Liang et al. 2022, "Expediting Large-Scale Vision Transformer": the released code for Swin.
    """
    rows, columns = (
        slice(n // 2 + 1 - side, n // 2 + side)
        for n, side in zip(table.shape[:2], window, strict=True)
    )
    shape = (2 * smaller[0] - 1, 2 * smaller[1] - 1, table.shape[-1])
    return jax.image.resize(table[rows, columns], shape, "bilinear", antialias=False)


class PositionBiasMlp(nn.Module):
    """Computes biases from offsets: (..., 2) -> (..., num_heads), between 0 and 16.

    Attributes:
      num_heads: N.
    """

    num_heads: int

    @nn.compact
    def __call__(self, offsets: Float[Array, "... 2"]) -> Float[Array, "... N"]:
        x = nn.relu(nn.Dense(CPB_CHANNELS, kernel_init=linear_init, name="fc1")(offsets))
        x = nn.Dense(self.num_heads, use_bias=False, kernel_init=linear_init, name="fc2")(x)
        return 16 * nn.sigmoid(x)
