"""PoWER-BERT's search for the number of tokens of every block (Goyal et al. 2020)."""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from tokenvit_jax.errors import UserError
from tokenvit_jax.models.reducers.settings import SEARCH
from tokenvit_jax.ops.selection import top_indices

_RETENTION = "retention"


class SoftExtract(nn.Module):
    """Scales every token by a parameter of its rank: (B, N, C), (B, N) -> (B, N, C).

    Tokens are ranked by falling score. The parameters start at 1; training keeps them in [0, 1] and
    shrinks the parameters of ranks that are not needed.

    Attributes:
      num_tokens: N.
      penalty: weight of the sum of the parameters in the loss; None: no loss.

    References:
      Goyal et al. 2020, PoWER-BERT, Section 3.3.
    """

    num_tokens: int
    penalty: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array, score: jax.Array, train: bool = False) -> jax.Array:
        if x.shape[1] != self.num_tokens:
            raise UserError(
                f"token_reducer.method={SEARCH!r} ranks the {self.num_tokens} patches of images of "
                f"position_size; these have {x.shape[1]}"
            )
        retention = self.param(_RETENTION, nn.initializers.ones, (self.num_tokens,))
        if train and self.penalty is not None and not self.is_initializing():
            self.sow("losses", "retention_penalty", self.penalty * retention.sum())
        order = top_indices(jax.lax.stop_gradient(score), self.num_tokens)
        scale = lambda at: jnp.zeros_like(retention).at[at].set(retention, unique_indices=True)  # noqa: E731
        return x * jax.vmap(scale)(order)[..., None].astype(x.dtype)


def is_retention(path: tuple) -> bool:
    """Returns whether a path of `jax.tree_util` leads to retention parameters."""
    return path[-1].key == _RETENTION


def retention_mass(params: Mapping[str, Any]) -> jax.Array:
    """Returns the sum of the retention parameters of every block (depth,), first block first.

    Args:
      params: parameters of a model with the reducer "soft_extract"; the result is empty for others.
    """
    found = {
        int(re.search(r"\d+", path)[0]): leaf.sum()
        for path, leaf in flatten_dict(params, sep="/").items()
        if path.endswith(f"/{_RETENTION}")
    }
    return jnp.array([found[block] for block in sorted(found)])


def clip_retention(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters with every retention parameter clipped to [0, 1]."""
    clip = lambda path, x: jnp.clip(x, 0, 1) if is_retention(path) else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(clip, params)


def searched_keep(params: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the K that a search found for every block, the integer part of its retention mass."""
    # Sums of many ones may fall short of an integer by rounding.
    return tuple(int(mass + 1e-3) for mass in retention_mass(params))
