"""Settings of a token reducer, and the numbers of tokens that other papers keep."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tokenvit_jax.errors import UserError

CLUSTERINGS = ("kmeans", "weighted_kmeans", "kmedoids", "weighted_kmedoids")
SELECTIONS = ("powerbert", "random", "importance")
EVIT = "evit"
MERGING = "tome"
CONVOLUTION = "convolution"
SEARCH = "soft_extract"
METHODS = (*CLUSTERINGS, *SELECTIONS, EVIT, MERGING, CONVOLUTION, SEARCH)
INITIAL = ("score", "random")


@dataclasses.dataclass(frozen=True)
class TokenReducer:
    """How many patches go on after every block, and which.

    Attributes:
      keep: K of every block; a block that has no more patches than that keeps all. 0: the class
        token (and the distillation token) go on alone. () for the methods that do not read it.
      method: a clustering, whose centres replace the patches: "kmeans", "kmedoids" and, weighted
        by score, "weighted_kmeans", "weighted_kmedoids"; a selection: "powerbert", the highest
        scores, "importance", drawn by score, "random", drawn evenly; "evit": the patches with
        the K - 1 highest scores, and one token fused from all others; "tome": means of patches
        with similar keys, found in pairs; "convolution": of 2 x 2 patches, in some ``blocks``;
        "soft_extract": all patches stay, scaled by how much their rank is needed.
        The score of a patch is the attention that it receives: from all heads and queries, or with
        "evit" from the class token, its mean over the heads.
      initial: first centres of a clustering: the highest "score", or "random".
      carry: whether the number of patches in a cluster weighs it in the attention of later blocks
        (Supplement E of Token Pooling), for models that were trained without the reducer.
      diagonal: whether the attention of a patch to itself counts in its score (not in the code of
        PoWER-BERT).
      blocks: the blocks of a convolution, from 1.
      penalty: weight of the loss of "soft_extract", which grows with the retained tokens: block l,
        from 1, adds penalty * l * sum(retention of block l).
      learning_rate_factor: factor on the learning rate of the retention parameters.
    """

    keep: tuple[int, ...] = ()
    method: str = "weighted_kmedoids"
    initial: str = "score"
    carry: bool = False
    diagonal: bool = True
    blocks: tuple[int, ...] = ()
    penalty: float = 0.0
    learning_rate_factor: float = 1.0

    def check(self, depth: int) -> None:
        """Raises UserError unless the settings fit a model of ``depth`` blocks."""
        for name, valid in (("method", METHODS), ("initial", INITIAL)):
            if getattr(self, name) not in valid:
                self._refuse(name, ", ".join(valid))
        convolves, searches = self.method == CONVOLUTION, self.method == SEARCH
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
        for name, only in (("penalty", 0.0), ("learning_rate_factor", 1.0)):
            if not searches and getattr(self, name) != only:
                self._refuse(name, f"{only} with method={self.method!r}")
            if getattr(self, name) < 0:
                self._refuse(name, "numbers from 0")

    def _refuse(self, name, valid):
        raise UserError(
            f"token_reducer.{name}={getattr(self, name)!r} is not valid; valid: {valid}"
        )

    def acts(self, block: int, num_patches: int) -> bool:
        """Whether a block, counted from 0, changes ``num_patches`` patches."""
        if self.method == CONVOLUTION:
            return self.halves(block)
        return self.method == SEARCH or self.keep[block] < num_patches

    def check_map(self) -> None:
        """Raises UserError where a patch may have no token that stands for it."""
        if self.method == CONVOLUTION:
            self._refuse("method", "for a map, all others")
        if 0 in self.keep:
            self._refuse("keep", "for a map, numbers from 1")

    @property
    def scored_by(self) -> str | None:
        """Queries whose attention scores the patches: "all" or "class"; None: no scores."""
        if self.method in (MERGING, CONVOLUTION):
            return None
        return "class" if self.method == EVIT else "all"

    def halves(self, block: int) -> bool:
        """Whether a block, counted from 0, halves the rows and columns of the map."""
        return block + 1 in self.blocks

    def penalty_of(self, block: int) -> np.float32 | None:
        """Returns the weight of a block's retention in the loss, in float32; None: no penalty."""
        return np.float32(self.penalty) * np.float32(block + 1) if self.penalty else None


def reads_keep(settings: Mapping[str, Any]) -> bool:
    """Whether a reducer with these attributes, given by name, needs `keep`."""
    return settings.get("method") not in (CONVOLUTION, SEARCH)


def tome_keep(num_patches: int, depth: int, merged: int) -> tuple[int, ...]:
    """Returns K of every block when every block merges the same number of patches.

    Args:
      num_patches: N, patches of the image.
      depth: blocks.
      merged: r, patches that join another one in a block, at most half of the remaining ones.

    References:
      Bolya et al. 2023, Section 3 ("Token Reduction").
    """
    keep = []
    for _ in range(depth):
        num_patches -= min(merged, num_patches // 2)
        keep.append(num_patches)
    return tuple(keep)


def evit_keep(
    num_patches: int, depth: int, rate: float, blocks: tuple[int, ...]
) -> tuple[int, ...]:
    """Returns K of every block when some blocks keep a share of their patches and fuse the rest.

    Args:
      num_patches: N, patches of the image.
      depth: blocks.
      rate: share, in (0, 1], of a block's patches, earlier fused tokens among them, that go on
        beside the new fused token; rounded up.
      blocks: the blocks that fuse, from 1; in the paper 4, 7 and 10 of 12.

    References:
      Liang, Y. et al. 2022, EViT, Section 3, and its code (youweiliang/evit). There even a single
      patch is fused; here it goes on as it is.
    """
    keep = []
    for block in range(1, depth + 1):
        if block in blocks:
            num_patches = min(math.ceil(rate * num_patches) + 1, num_patches)
        keep.append(num_patches)
    return tuple(keep)
