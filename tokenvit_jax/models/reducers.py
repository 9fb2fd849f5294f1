"""Reducers of the tokens of plain hosts, between attention and MLP of a block.

Token Pooling (Marin et al. 2021), what it is compared with (Section 5 and Supplement D), the search
of PoWER-BERT (Goyal et al. 2020) for the number of tokens, Token Merging (ToMe, Bolya et al. 2023)
and EViT (Liang, Y. et al. 2022).
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.ops.counted import counted
from tokenvit_jax.ops.gather import take
from tokenvit_jax.ops.merge_tokens import cluster_sums
from tokenvit_jax.ops.selection import top_indices

CLUSTERINGS = ("kmeans", "weighted_kmeans", "kmedoids", "weighted_kmedoids")
SELECTIONS = ("powerbert", "random", "importance")
EVIT = "evit"
MERGING = "tome"
CONVOLUTION = "convolution"
SEARCH = "soft_extract"
METHODS = (*CLUSTERINGS, *SELECTIONS, EVIT, MERGING, CONVOLUTION, SEARCH)
INITIAL = ("score", "random")

_RETENTION = "retention"


@dataclasses.dataclass(frozen=True)
class TokenReducer:
    """How many patches go on after every block, and which.

    Attributes:
      keep: K of every block; a block that has no more patches than that keeps all. 0: the class
        token (and the distillation token) go on alone. () for the methods that do not read it.
      method: a clustering, whose centres take the place of the patches: "kmeans", "kmedoids" and,
        weighted by score, "weighted_kmeans", "weighted_kmedoids"; a selection: "powerbert", the
        highest scores, "importance", drawn by score, "random", drawn evenly; "evit": the
        patches of the K - 1 highest scores, and one token made of all others; "tome": means of
        patches whose keys are alike, found in pairs; "convolution": of 2 x 2 patches, in some
        ``blocks``; "soft_extract": all patches stay, scaled by how much their rank is needed.
        The score of a patch is the attention that it receives: of all heads and queries, or with
        "evit" that of the class token, its mean over the heads.
      initial: first centres of a clustering: the highest "score", or "random".
      carry: whether the number of patches in a cluster weighs it in the attention of later blocks
        (Supplement E of Token Pooling), for models that were trained without the reducer.
      diagonal: whether the attention of a patch to itself counts in its score (not in the code of
        PoWER-BERT).
      blocks: of a convolution, from 1.
    """

    keep: tuple[int, ...] = ()
    method: str = "weighted_kmedoids"
    initial: str = "score"
    carry: bool = False
    diagonal: bool = True
    blocks: tuple[int, ...] = ()

    def check(self, depth: int) -> None:
        """Raises UserError unless the settings fit a model of ``depth`` blocks."""
        for name, valid in (("method", METHODS), ("initial", INITIAL)):
            if getattr(self, name) not in valid:
                self._refuse(name, ", ".join(valid))
        convolves = self.method == CONVOLUTION
        if not reads_keep({"method": self.method}):
            if self.keep:
                self._refuse("keep", f"() with method={self.method!r}")
        elif len(self.keep) != depth or min(self.keep) < 0:
            self._refuse("keep", f"{depth} numbers from 0, one for every block")
        if self.carry and not reads_keep({"method": self.method}):
            self._refuse("carry", f"False with method={self.method!r}")
        if not convolves and self.blocks:
            self._refuse("blocks", f"() with method={self.method!r}")
        if convolves and not (self.blocks and set(self.blocks) <= set(range(1, depth + 1))):
            self._refuse("blocks", f"one number or more from 1 to {depth}")

    def _refuse(self, name, valid):
        raise UserError(
            f"token_reducer.{name}={getattr(self, name)!r} is not valid; valid: {valid}"
        )

    def acts(self, block: int, num_patches: int) -> bool:
        """Whether a block, from 0, changes so many patches."""
        if self.method == CONVOLUTION:
            return self.halves(block)
        return self.method == SEARCH or self.keep[block] < num_patches

    def check_map(self) -> None:
        """Raises UserError if a patch may have no token that stands for it."""
        if self.method == CONVOLUTION:
            self._refuse("method", "for a map, all others")
        if 0 in self.keep:
            self._refuse("keep", "for a map, numbers from 1")

    @property
    def scored_by(self) -> str | None:
        """Whose attention to the patches the method reads: of "all" tokens or the "class" token."""
        if self.method in (MERGING, CONVOLUTION):
            return None
        return "class" if self.method == EVIT else "all"

    def halves(self, block: int) -> bool:
        """Whether a block, from 0, halves rows and columns of the map."""
        return block + 1 in self.blocks


def reads_keep(settings: Mapping[str, Any]) -> bool:
    """Whether the attributes of a reducer, by name, need `keep`."""
    return settings.get("method") not in (CONVOLUTION, SEARCH)


class Patches(NamedTuple):
    """The patches of a block after its attention.

    Attributes:
      x: tokens (B, N, C).
      score: attention that they received (B, N), at least 0; None if nobody reads it.
      keys: of their attention, mean over the heads (B, N, D).
      size: patches of the image that each stands for (B, N).
    """

    x: jax.Array
    score: jax.Array | None
    keys: jax.Array
    size: jax.Array


class Reduced(NamedTuple):
    """The tokens that go on.

    Attributes:
      x: tokens (B, K, C).
      size: patches of the image that each stands for (B, K).
      home: the token that stands for each patch (B, N) int32 in [0, K); None if nobody asked.
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
      patches: N of them; keys carry no gradient, and scores only with "evit".
      num_kept: K, from 1 to N.
      reducer: its method and initial.
      rng: a key per image (B,), for what is drawn.
      restorable: whether ``home`` is wanted, which takes a search of the nearest token where
        patches are dropped.

    Returns:
      Reduced(x, size, home). Clusterings and selections: in order of falling score of the tokens
      they come from; a selection drops sizes with the tokens. "evit": the fused token is last.
      A patch is at home in its cluster; one that is dropped or fused, in the token that is nearest
      to it (squared distance; ties to the first), the fused one included: the reconstruction of
      Expedite (Liang, W. et al. 2022) with k = 1.
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
            rank = _draw(jax.random.uniform, rng, score)
        case "importance":  # Gumbel's trick: without replacement, in proportion to the scores
            rank = jnp.log(score) + _draw(jax.random.gumbel, rng, score)
        case _:
            rank = score
    chosen = top_indices(rank, num_kept)  # (B, K)
    if reducer.method in SELECTIONS:
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
    """Rounds of matching, of which each can halve the number of tokens."""
    x, _, keys, size = patches
    values = jnp.concatenate([x, keys], -1).astype(size.dtype)
    home = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    while values.shape[1] > num_kept:
        num_merged = min(values.shape[1] - num_kept, values.shape[1] // 2)
        assignment = ops.bipartite_matching(values[..., x.shape[-1] :], num_merged)
        ones = jnp.ones_like(values[..., :1])
        weighted = jnp.concatenate([values, ones], -1) * size[..., None]
        sums = cluster_sums(weighted, assignment, values.shape[1] - num_merged)
        values, size = sums[..., :-1] / sums[..., -1:], sums[..., -1]
        home = take(assignment, home)
    return Reduced(values[..., : x.shape[-1]].astype(x.dtype), size, home)


def _fuse_others(patches, num_kept, restorable):
    """The best patches, and the sum of all others times their score.

    As in the code of EViT (youweiliang/evit), that sum is not divided by the sum of the scores; its
    gradient flows through them; and among the patches of a later block is the fused token.
    """
    x, score, _, size = patches
    chosen = top_indices(jax.lax.stop_gradient(score), num_kept - 1)
    drop = lambda row, at: row.at[at].set(0, mode="promise_in_bounds")  # noqa: E731
    of_others = lambda row: jax.vmap(drop)(row, chosen)  # noqa: E731
    fused = (of_others(score)[..., None] * x).sum(1, keepdims=True).astype(x.dtype)
    x = jnp.concatenate([x, fused], 1)
    size = jnp.concatenate([size, of_others(size).sum(1, keepdims=True)], 1)
    last = jnp.full_like(chosen, score.shape[1], shape=(len(x), 1))
    chosen = jnp.concatenate([chosen, last], 1)  # (B, K)
    home = _nearest(x, chosen)[:, :-1] if restorable else None
    return Reduced(take(x, chosen), take(size, chosen), home)


def _nearest_macs(inputs, outputs):
    """N K C: the distance of every token to every chosen one."""
    batch, length, dim = inputs[0]
    return batch * length * inputs[1][1] * dim


@counted(_nearest_macs)
def _nearest(x, chosen):
    """Returns which of the chosen tokens (B, K) is nearest to each (B, N): to itself, if chosen."""
    home = ops.kmeans(x, chosen, iterations=0).assignment
    own = jnp.arange(chosen.shape[1], dtype=jnp.int32)
    put = lambda row, at: row.at[at].set(own, unique_indices=True)  # noqa: E731
    return jax.vmap(put)(home, chosen)


def _draw(draw, rng, like):
    return jax.vmap(lambda key, row: draw(key, row.shape, row.dtype))(rng, like)


class HalveMap(nn.Module):
    """Convolution of 2 x 2 tokens with stride 2, as wide as before (Supplement D).

    (B, H W, C) -> (B, (H // 2) (W // 2), C): of an odd number of rows or columns the last is left.
    Starts as the mean of the four, which suits a host that is trained already.
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
        x = x.reshape(len(x), *grid, channels)
        mean = {"dtype": self.dtype, "kernel_init": _mean_init, "name": "conv"}
        x = nn.Conv(channels, (2, 2), (2, 2), "VALID", **mean)(x)
        return x.reshape(len(x), -1, channels)


def _mean_init(key, shape, dtype=jnp.float32):
    del key
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype) / 4, shape)


class SoftExtract(nn.Module):
    """Scales every token by a parameter of its rank: (B, N, C), (B, N) -> (B, N, C).

    Ranks are those of falling score. The parameters start at 1; training keeps them in [0, 1] and
    makes them small where they are not needed.

    Source: Goyal et al. 2020, PoWER-BERT, Section 3.3.
    """

    num_tokens: int

    @nn.compact
    def __call__(self, x: jax.Array, score: jax.Array) -> jax.Array:
        if x.shape[1] != self.num_tokens:
            raise UserError(
                f"token_reducer.method={SEARCH!r} ranks the {self.num_tokens} patches of images of "
                f"position_size; these have {x.shape[1]}"
            )
        retention = self.param(_RETENTION, nn.initializers.ones, (self.num_tokens,))
        order = top_indices(jax.lax.stop_gradient(score), self.num_tokens)
        scale = lambda at: jnp.zeros_like(retention).at[at].set(retention, unique_indices=True)  # noqa: E731
        return x * jax.vmap(scale)(order)[..., None].astype(x.dtype)


# ------------------------------------------------------------------------------------------------
# Numbers of patches that other papers use
# ------------------------------------------------------------------------------------------------


def tome_keep(num_patches: int, depth: int, merged: int) -> tuple[int, ...]:
    """Returns K of every block when all merge the same number of patches.

    Args:
      num_patches: of the image, N.
      depth: blocks.
      merged: r, patches that join another one in a block: at most half of those that are left.

    Source: Bolya et al. 2023, Section 3 ("Token Reduction").
    """
    keep = []
    for _ in range(depth):
        num_patches -= min(merged, num_patches // 2)
        keep.append(num_patches)
    return tuple(keep)


def evit_keep(
    num_patches: int, depth: int, rate: float, blocks: tuple[int, ...]
) -> tuple[int, ...]:
    """Returns K of every block when some keep a share of their patches and fuse the others.

    Args:
      num_patches: of the image, N.
      depth: blocks.
      rate: share, in (0, 1], of the patches of a block, earlier fused tokens among them, that go on
        beside the new fused token; rounded up.
      blocks: that do so, from 1; in the paper 4, 7 and 10 of 12.

    Source: Liang, Y. et al. 2022, EViT, Section 3, and its code (youweiliang/evit). There even a
    single patch is fused; here it goes on as it is.
    """
    keep = []
    for block in range(1, depth + 1):
        if block in blocks:
            num_patches = min(math.ceil(rate * num_patches) + 1, num_patches)
        keep.append(num_patches)
    return tuple(keep)


# ------------------------------------------------------------------------------------------------
# What the search found
# ------------------------------------------------------------------------------------------------


def is_retention(path: tuple) -> bool:
    """Whether a path of `jax.tree_util` leads to retention parameters."""
    return path[-1].key == _RETENTION


def retention_mass(params: Mapping[str, Any]) -> jax.Array:
    """Returns the sum of the retention parameters of every block (depth,), first block first.

    Args:
      params: of a model with the reducer "soft_extract"; of another one: (0,).
    """
    found = {
        int(re.search(r"\d+", path)[0]): leaf.sum()
        for path, leaf in flatten_dict(params, sep="/").items()
        if path.endswith(f"/{_RETENTION}")
    }
    return jnp.array([found[block] for block in sorted(found)])


def clip_retention(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns parameters whose retention parameters are moved into [0, 1]."""
    clip = lambda path, x: jnp.clip(x, 0, 1) if is_retention(path) else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(clip, params)


def searched_keep(params: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns K of every block that the search found: the integer part of its retention mass."""
    # Sums of many ones may fall short of an integer by rounding.
    return tuple(int(mass + 1e-3) for mass in retention_mass(params))
