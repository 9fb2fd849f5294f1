"""Reduces the patches of a block to fewer tokens."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.models.reducers.settings import (
    CLUSTERINGS,
    DYNAMICVIT,
    EVIT,
    MERGING,
    SELECTIONS,
    TokenReducer,
)
from tokenvit_jax.ops.counted import counted
from tokenvit_jax.ops.gather import take
from tokenvit_jax.ops.merge_tokens import cluster_sums
from tokenvit_jax.ops.selection import top_indices


class Patches(NamedTuple):
    """The patches of a block after its attention.

    Attributes:
      x: tokens (B, N, C).
      score: attention that each token received (B, N), at least 0; with "dynamicvit" the logarithm
        of the probability that it stays; None if the method reads none.
      keys: attention keys of the tokens, averaged over the heads (B, N, D); only "tome" reads them.
      size: number of patches of the image that each token stands for (B, N).
    """

    x: jax.Array
    score: jax.Array | None
    keys: jax.Array | None
    size: jax.Array


class Reduced(NamedTuple):
    """The tokens that go on.

    Attributes:
      x: tokens (B, K, C).
      size: number of patches of the image that each token stands for (B, K).
      home: the token that stands for each patch (B, N) int32 in [0, K); None if not requested.
    """

    x: jax.Array
    size: jax.Array
    home: jax.Array | None


def reduce_tokens(
    patches: Patches,
    num_kept: int,
    reducer: TokenReducer,
    rng: jax.Array,
    restorable: bool = False,
) -> Reduced:
    """Returns ``num_kept`` tokens, for the methods that read ``keep``.

    Args:
      patches: N patches; keys carry no gradient, and scores carry one only with "evit".
      num_kept: K, from 1 to N.
      reducer: settings of the reducer, of which ``method`` and ``initial`` are read.
      rng: one key per image (B,), for the random methods.
      restorable: whether to return ``home``. If patches are dropped, this requires a search for the
        nearest token.

    Returns:
      Reduced(x, size, home). The tokens of clusterings and selections are in order of falling score
      of the tokens that they come from; a selection drops the sizes of dropped tokens. The fused
      token of "evit" is last. The home of a patch is its cluster. The home of a dropped or fused
      patch is the token nearest to it (squared distance; ties to the first), including the fused
      token: this is the reconstruction of Expedite (Liang, W. et al. 2022) with k = 1.
    """
    if reducer.method == MERGING:
        return _merge_alike(patches, num_kept)
    if reducer.method == EVIT:
        return _fuse_others(patches, num_kept, restorable)
    x, score, _, size = patches
    score = jax.lax.stop_gradient(score)
    by_chance = reducer.initial == "random" and reducer.method in CLUSTERINGS
    match "random" if by_chance else reducer.method:
        case "random":
            rank = _draw(jax.random.uniform, rng, size)
        case "importance":  # Gumbel's trick: draws without replacement, in proportion to the scores
            rank = jnp.log(score) + _draw(jax.random.gumbel, rng, score)
        case _:
            rank = score
    chosen = top_indices(rank, num_kept)  # (B, K)
    if reducer.method in (*SELECTIONS, DYNAMICVIT):
        home = _nearest(x, chosen) if restorable else None
        return Reduced(take(x, chosen), take(size, chosen), home)
    weights = score if reducer.method.startswith("weighted") else None
    if reducer.method.endswith("kmeans"):
        centers, assignment, _ = ops.kmeans(x, chosen, weights)
    else:
        indices, assignment, _ = ops.kmedoids(x, chosen, weights)
        centers = take(x, indices)
    return Reduced(centers, cluster_sums(size[..., None], assignment, num_kept)[..., 0], assignment)


def _merge_alike(patches, num_kept):
    """Merges in rounds of matching; each round can halve the number of tokens."""
    x, _, keys, size = patches
    values = jnp.concatenate([x, keys], -1).astype(size.dtype)
    home = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    while values.shape[1] > num_kept:
        num_merged = min(values.shape[1] - num_kept, values.shape[1] // 2)
        assignment = ops.bipartite_matching(values[..., x.shape[-1] :], num_merged)
        if values.shape[1] - num_merged == num_kept:  # no later round reads the keys
            values = values[..., : x.shape[-1]]
        ones = jnp.ones_like(values[..., :1])
        weighted = jnp.concatenate([values, ones], -1) * size[..., None]
        sums = cluster_sums(weighted, assignment, values.shape[1] - num_merged)
        values, size = sums[..., :-1] / sums[..., -1:], sums[..., -1]
        home = take(assignment, home)
    return Reduced(values[..., : x.shape[-1]].astype(x.dtype), size, home)


def _fuse_others(patches, num_kept, restorable):
    """Keeps the best patches, and fuses all others into their sum weighted by score.

    As in the code of EViT (youweiliang/evit), the sum is not divided by the sum of the scores, the
    gradient flows through the scores, and the fused token is a patch in later blocks.
    """
    x, score, _, size = patches
    chosen = top_indices(jax.lax.stop_gradient(score), num_kept - 1)
    drop = lambda row, at: row.at[at].set(0, mode="promise_in_bounds")  # noqa: E731
    of_others = lambda row: jax.vmap(drop)(row, chosen)  # noqa: E731
    fused = (of_others(score)[..., None] * x).sum(1, keepdims=True).astype(x.dtype)
    x = jnp.concatenate([x, fused], 1)
    size = jnp.concatenate([size, of_others(size).sum(1, keepdims=True)], 1)
    last = jnp.full_like(chosen, score.shape[1], shape=(x.shape[0], 1))
    chosen = jnp.concatenate([chosen, last], 1)  # (B, K)
    home = _nearest(x, chosen)[:, :-1] if restorable else None
    return Reduced(take(x, chosen), take(size, chosen), home)


def _nearest_macs(inputs, outputs):
    """Counts N K C: the distance of every token to every chosen token."""
    batch, length, dim = inputs[0]
    return batch * length * inputs[1][1] * dim


@counted(_nearest_macs)
def _nearest(x, chosen):
    """Returns the chosen token (B, K) nearest to each token (B, N); a chosen token is its own."""
    home = ops.kmeans(x, chosen, iterations=0).assignment
    own = jnp.arange(chosen.shape[1], dtype=jnp.int32)
    put = lambda row, at: row.at[at].set(own, unique_indices=True)  # noqa: E731
    return jax.vmap(put)(home, chosen)


def _draw(draw, rng, like):
    return jax.vmap(lambda key, row: draw(key, row.shape, row.dtype))(rng, like)


class HalveMap(nn.Module):
    """Convolution of 2 x 2 tokens with stride 2, which keeps the channels (Supplement D).

    Maps (B, H W, C) to (B, (H // 2) (W // 2), C); the last one of an odd number of rows or columns
    is left out. The initial convolution is the mean of the four tokens, which suits a trained host.

    Attributes:
      dtype: type of the computation.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        if min(grid) < 2:
            raise UserError(
                f"token_reducer.blocks: the map is {grid[0]} x {grid[1]} before one of them; "
                "valid: fewer blocks, or larger images"
            )
        channels = x.shape[-1]
        x = x.reshape(x.shape[0], *grid, channels)
        mean = {"dtype": self.dtype, "kernel_init": _mean_init, "name": "conv"}
        x = nn.Conv(channels, (2, 2), (2, 2), "VALID", **mean)(x)
        return x.reshape(x.shape[0], -1, channels)


def _mean_init(key, shape, dtype=jnp.float32):
    del key
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype) / 4, shape)
