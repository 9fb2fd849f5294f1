"""Multi-head attention with dynamic query groups, and the update of the groups' centroids."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tokenvit_jax import ops
from tokenvit_jax.layers.blocks import check_num_heads, dense
from tokenvit_jax.layers.cosine import cosine_heads, logit_scale_init
from tokenvit_jax.ops.heads import merge_heads, split_qkv
from tokenvit_jax.ops.packed import map_rows


class DynamicGroupAttention(nn.Module):
    """Self-attention (B, L, C) -> (B, L, C) within dynamic groups, or global without groups.

    The collection "centroids" holds one set of centroids per head, in float32. A forward pass with
    ``train=True`` and a mutable collection adds the group sums of its batch to the collection and
    leaves the centroids unchanged; :func:`advance_centroids` moves them once per step. Thus the
    sums of several micro-batches add up, and rematerialization changes nothing.

    Attributes:
      num_heads: N, a divisor of C.
      num_groups: G; 0: global attention, no centroids.
      top_k: number of keys per group.
      cosine: whether queries and keys have unit norm and the logits a learned scale per head,
        instead of 1 / sqrt(D).
      dtype: type of the computation.

    Raises:
      UserError: num_heads does not divide C.

    References:
      Liu et al. 2022, "Dynamic Group Transformer", Section 3.1.
    """

    num_heads: int
    num_groups: int
    top_k: int
    cosine: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L C"], train: bool) -> Float[Array, "B L C"]:
        channels = x.shape[-1]
        check_num_heads(self.num_heads, channels)
        q, k, v = split_qkv(dense(3 * channels, self.dtype, "qkv")(x), self.num_heads)
        scale = None
        if self.cosine:
            logit_scale = self.param("logit_scale", logit_scale_init, (self.num_heads,))
            q, k = cosine_heads(q, k, logit_scale)
            scale = 1.0
        if self.num_groups == 0:
            y = ops.dot_product_attention(q, k, v, scale=scale)
        else:
            y = self._attend_in_groups(q, k, v, scale, train)
        return dense(channels, self.dtype, "proj")(merge_heads(y))

    def _attend_in_groups(self, q, k, v, scale, train):
        shape = (self.num_heads, self.num_groups, q.shape[-1])
        state = {
            "centroids": self.variable("centroids", "centroids", self._random_centroids, shape),
            "sums": self.variable("centroids", "sums", jnp.zeros, shape),
            "counts": self.variable("centroids", "counts", jnp.zeros, shape[:2]),
        }
        result = ops.group_attention(
            q, k, v, state["centroids"].value,
            top_k=self.top_k, scale=scale, joined=not self.cosine,
        )  # fmt: skip
        if train and self.is_mutable_collection("centroids") and not self.is_initializing():
            sums = ops.group_sums(q, result.groups, self.num_groups)
            state["sums"].value += sums.sums
            state["counts"].value += sums.counts
        self.sow("intermediates", "groups", result.groups)
        self.sow("intermediates", "keys", result.keys)
        return result.output

    def _random_centroids(self, shape):
        centroids = jax.random.normal(self.make_rng("params"), shape)
        # Not `unit_norm`, which rounds differently: a seed must keep giving the same centroids.
        return centroids / jnp.linalg.norm(centroids, axis=-1, keepdims=True)


def advance_centroids(
    collection: Mapping, old_weight: float | Float[Array, ""], axis_name: str | None = None
) -> dict:
    """Moves every centroid in a "centroids" collection once and clears the sums (Eqs. 3 and 4).

    Args:
      collection: nested dict with "centroids", "sums" and "counts" for each
        :class:`DynamicGroupAttention`.
      old_weight: weight of the old centroid, in [0, 1].
      axis_name: mapped axis over which the sums of all devices are added first; None: one device
        or jit.

    Returns:
      The collection after the step, with the same structure.
    """
    blocks, structure = jax.tree.flatten(collection, is_leaf=lambda node: "centroids" in node)
    sums = [ops.GroupSums(block["sums"], block["counts"]) for block in blocks]
    if axis_name is not None:
        sums = lax.psum(sums, axis_name)

    def move(centroids, sums, counts):
        moved = ops.move_centroids(centroids, ops.GroupSums(sums, counts), old_weight)
        return moved, jnp.zeros_like(sums), jnp.zeros_like(counts)

    advanced = map_rows(move, [block["centroids"] for block in blocks], *zip(*sums, strict=True))
    names = ("centroids", "sums", "counts")
    return structure.unflatten([dict(zip(names, block, strict=True)) for block in advanced])
