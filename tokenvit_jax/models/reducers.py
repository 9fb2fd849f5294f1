"""Reducers of the tokens of plain hosts, between attention and MLP of a block.

Token Pooling (Marin et al. 2021) and the selections it is compared with (Section 5).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.ops.selection import top_indices

CLUSTERINGS = ("kmeans", "weighted_kmeans", "kmedoids", "weighted_kmedoids")
SELECTIONS = ("powerbert", "random", "importance")
INITIAL = ("score", "random")


@dataclasses.dataclass(frozen=True)
class TokenReducer:
    """How many patches go on after every block, and which.

    Attributes:
      keep: K of every block; a block that has no more patches than that keeps all. 0: the class
        token (and the distillation token) go on alone.
      method: a clustering, whose centres take the place of the patches: "kmeans", "kmedoids" and,
        weighted by score, "weighted_kmeans", "weighted_kmedoids"; or a selection: "powerbert", the
        highest scores (Goyal et al. 2020), "importance", drawn by score, "random", drawn evenly.
        The score of a patch is the attention that it receives, of all heads and queries.
      initial: first centres of a clustering: the highest "score", or "random".
      carry: whether the number of patches in a cluster weighs it in the attention of later blocks
        (Supplement E), for models that were trained without the reducer.
    """

    keep: tuple[int, ...]
    method: str = "weighted_kmedoids"
    initial: str = "score"
    carry: bool = False

    def check(self, depth: int) -> None:
        """Raises UserError unless the settings fit a model of ``depth`` blocks."""
        for name, valid in (("method", CLUSTERINGS + SELECTIONS), ("initial", INITIAL)):
            value = getattr(self, name)
            if value not in valid:
                raise UserError(
                    f"token_reducer.{name}={value!r} is not valid; valid: {', '.join(valid)}"
                )
        if len(self.keep) != depth or min(self.keep) < 0:
            raise UserError(
                f"token_reducer.keep={self.keep} is not valid; valid: {depth} numbers from 0, one "
                "for every block"
            )


def make_reducer(settings: Any, depth: int) -> TokenReducer | None:
    """Returns the reducer of a model of ``depth`` blocks; None for None, or no settings.

    Args:
      settings: a TokenReducer, or its attributes by name, as a configuration holds them.
      depth: number of blocks.

    Raises:
      UserError: an unknown attribute, or a value that is not valid.
    """
    if not settings:
        return None
    if isinstance(settings, Mapping):
        valid = [field.name for field in dataclasses.fields(TokenReducer)]
        for name in settings:
            if name not in valid:
                raise UserError(f"token_reducer has no {name!r}; valid: {', '.join(valid)}")
        if "keep" not in settings:
            raise UserError(
                "token_reducer.keep is missing: numbers of patches, one for every block"
            )
        settings = TokenReducer(**dict(settings))
    settings.check(depth)
    return settings


def reduce_tokens(
    x: jax.Array,
    score: jax.Array,
    size: jax.Array,
    num_kept: int,
    reducer: TokenReducer,
    rng: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns ``num_kept`` tokens in order of falling score of the tokens they come from.

    Args:
      x: tokens (B, N, C).
      score: (B, N), at least 0; carries no gradient.
      size: patches that each token stands for (B, N).
      num_kept: K, from 1 to N.
      reducer: its method and initial.
      rng: a key per image (B,), for what is drawn.

    Returns:
      Tokens (B, K, C) and their sizes (B, K). A selection drops sizes with the tokens.
    """
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
        return _take(x, chosen), _take(size, chosen)
    weights = score if reducer.method.startswith("weighted") else None
    if reducer.method.endswith("kmeans"):
        centers, assignment, _ = ops.kmeans(x, chosen, weights)
    else:
        indices, assignment, _ = ops.kmedoids(x, chosen, weights)
        centers = _take(x, indices)
    return centers, _sizes(size, assignment, num_kept)


def _draw(draw, rng, like):
    return jax.vmap(lambda key, row: draw(key, row.shape, row.dtype))(rng, like)


def _take(x, index):
    index = index if x.ndim == 2 else index[..., None]
    return jnp.take_along_axis(x, index, 1, mode="promise_in_bounds")


def _sizes(size, assignment, num_clusters):
    member = assignment[:, None] == jnp.arange(num_clusters)[:, None]  # (B, K, N)
    return jnp.where(member, size[:, None], 0).sum(-1)
