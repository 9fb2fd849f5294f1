"""Multi-head attention of all tokens with all, of plain hosts and of heads on their tokens."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import truncated_normal

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers.blocks import dense
from tokenvit_jax.layers.cosine import unit_length


class Attended(NamedTuple):
    """What attention returns.

    y: (B, T, C). received: attention that each token received (B, T), or None. keys: mean over the
    heads (B, T, D).
    """

    y: jax.Array
    received: jax.Array | None
    keys: jax.Array


class Attention(nn.Module):
    """Multi-head attention of all tokens.

    Attributes:
      num_heads: number of heads.
      qk_norm: "none"; "fixed": queries and keys of length 1, whose products are the logits;
        "learned": times a parameter that starts at 1 (Supplement F of Token Pooling).
      dtype: of the computation.
    """

    num_heads: int
    qk_norm: str
    init_std: float
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        scored_by: str | None = None,
        diagonal: bool = True,
        size: jax.Array | None = None,
    ) -> Attended:
        """Attends.

        Args:
          x: (B, T, C).
          scored_by: whose attention to each token to report: the sum over heads and queries of
            "all", or the mean over the heads of the "class" token; None: none.
          diagonal: whether that from itself is counted in the sum.
          size: number of patches that each token stands for (B, T); None: all 1.
        """
        channels = x.shape[-1]
        if channels % self.num_heads:
            raise UserError(f"num_heads={self.num_heads} does not divide {channels} channels")
        init = truncated_normal(self.init_std)
        qkv = dense(3 * channels, self.dtype, "qkv", init)(x)
        qkv = qkv.reshape(*x.shape[:2], 3, self.num_heads, channels // self.num_heads)
        q, k, v = jnp.moveaxis(qkv, 2, 0)  # (B, T, heads, D)
        scale, received = None, None
        if self.qk_norm != "none":
            q, k = (unit_length(part).astype(self.dtype) for part in (q, k))
            scale = 1.0
        if self.qk_norm == "learned":
            q = q * self.param("alpha", nn.initializers.ones, ()).astype(q.dtype)
        if scored_by == "all" or size is not None:
            y, received = ops.scored_attention(q, k, v, size, scale=scale, diagonal=diagonal)
        else:
            y = ops.dot_product_attention(q, k, v, scale=scale)
        if scored_by == "class":  # one row more is cheaper than all rows kept
            row = ops.scored_attention(q[:, :1], k, v, size, scale=scale)
            received = row.received / self.num_heads
        y = dense(channels, self.dtype, "proj", init)(y.reshape(x.shape))
        return Attended(y, received, k.mean(2))
