"""Multi-head attention of all tokens with all tokens, for plain hosts and their heads."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import truncated_normal
from jaxtyping import Array, Float, Shaped

from tokenvit_jax import ops
from tokenvit_jax.layers.blocks import DenseParts, check_num_heads, dense
from tokenvit_jax.layers.cosine import unit_length
from tokenvit_jax.ops.gather import take
from tokenvit_jax.ops.heads import merge_heads, split_heads

WEIGHTS = "attention_weights"  # collection that receives the weights where it is mutable


class Attended(NamedTuple):
    """Output of attention, with the attention scores and keys that token reducers read.

    Attributes:
      y: output (B, T, C).
      received: attention that each token received (B, T), or None.
      keys: mean of the keys over the heads (B, T, D).
    """

    y: Float[Array, "B T C"]
    received: Float[Array, "B T"] | None
    keys: Float[Array, "B T D"]


class Attention(nn.Module):
    """Multi-head attention of all tokens.

    Attributes:
      num_heads: number of heads, a divisor of C.
      qk_norm: "none"; "fixed": queries and keys have length 1, and their products are the logits;
        "learned": these logits are multiplied by a parameter that starts at 1 (Supplement F of
        Token Pooling).
      init_std: standard deviation of the initial kernels.
      dtype: type of the computation.

    If the collection :data:`WEIGHTS` is mutable, it receives the entry "weights", the attention of
    all heads (B, num_heads, T, T).

    Raises:
      UserError: num_heads does not divide C.
    """

    num_heads: int
    qk_norm: str
    init_std: float
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T C"],
        scored_by: str | None = None,
        diagonal: bool = True,
        size: Shaped[Array, "B T"] | None = None,
        prototypes: int | None = None,
        num_alone: int = 0,
    ) -> Attended:
        """Attends.

        Args:
          x: tokens (B, T, C).
          scored_by: queries whose attention to each token is reported. "all": the sum over all
            heads and queries; "class": the class token's attention, averaged over the heads; None:
            nothing is reported.
          diagonal: whether the sum includes the attention of a token to itself.
          size: number of patches that each token stands for (B, T); None: all 1.
          prototypes: largest number of clusters of queries per head that attend in place of the
            queries (ACT); None: every query attends. Excludes ``scored_by`` and ``size``.
          num_alone: number of tokens in front whose queries are not clustered.
        """
        channels = x.shape[-1]
        check_num_heads(self.num_heads, channels)
        init = truncated_normal(self.init_std)
        qkv = DenseParts(3 * channels, 3, self.dtype, init, name="qkv")(x)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv)
        scale, received = None, None
        if self.qk_norm != "none":
            q, k = (unit_length(part).astype(self.dtype) for part in (q, k))
            scale = 1.0
        if self.qk_norm == "learned":
            q = q * self.param("alpha", nn.initializers.ones, ()).astype(q.dtype)
        if prototypes is not None:
            assignment = ops.hash_clusters(q[:, num_alone:], prototypes)
            y = ops.clustered_attention(q, k, v, assignment, prototypes, scale=scale)
            if self._notes_weights():
                means = ops.query_prototypes(q[:, num_alone:], assignment, prototypes)
                means = take(means.swapaxes(1, 2), assignment).swapaxes(1, 2)
                q = jnp.concatenate([q[:, :num_alone], means], 1)
        elif scored_by == "all" or size is not None:
            y, received = ops.scored_attention(q, k, v, size, scale=scale, diagonal=diagonal)
        else:
            y = ops.dot_product_attention(q, k, v, scale=scale)
        if scored_by == "class":  # computing one more row is cheaper than keeping all rows
            row = ops.scored_attention(q[:, :1], k, v, size, scale=scale)
            received = row.received / self.num_heads
        if self._notes_weights():
            self._note_weights(q, k, size, scale)
        y = dense(channels, self.dtype, "proj", init)(merge_heads(y))
        return Attended(y, received, k.mean(2))

    def _notes_weights(self):
        """Returns whether the caller asks for the attention weights."""
        return self.is_mutable_collection(WEIGHTS) and not self.is_initializing()

    def _note_weights(self, q, k, size, scale):
        weights = ops.attention_weights(q, k, size, scale=scale)
        self.sow(WEIGHTS, "weights", weights, init_fn=tuple, reduce_fn=lambda _, new: new)
