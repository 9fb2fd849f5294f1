"""Settings of token reducers, and the numbers of tokens that other papers keep."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from tokenvit_jax.errors import UserError
from tokenvit_jax.models.settings import BLOCKS, Checked, Rules, check_unused
from tokenvit_jax.valid import Flag, Number, OneOf, Several, ZeroOr, whole

CLUSTERINGS = ("kmeans", "weighted_kmeans", "kmedoids", "weighted_kmedoids")
SELECTIONS = ("powerbert", "random", "importance")
EVIT = "evit"
DYNAMICVIT = "dynamicvit"
MERGING = "tome"
ACT = "act"
CONVOLUTION = "convolution"
SEARCH = "soft_extract"
_KEEPING = (*CLUSTERINGS, *SELECTIONS, EVIT, DYNAMICVIT, MERGING, ACT)  # methods that read `keep`
METHODS = (*_KEEPING, CONVOLUTION, SEARCH)
INITIAL = ("score", "random")


@dataclasses.dataclass(frozen=True)
class TokenReducer(Checked):
    """How many patches every block passes on, and how they are chosen.

    Attributes:
      keep: K of every block; a block with at most K patches keeps all. 0: only the class token (and
        the distillation token) go on. () for the methods that do not read it.
      method: one of these methods. Clusterings, whose centres replace the patches: "kmeans",
        "kmedoids" and, weighted by score, "weighted_kmeans" and "weighted_kmedoids". Selections:
        "powerbert" (the highest scores), "importance" (drawn in proportion to the scores) and
        "random" (drawn evenly). "evit": the patches with the K - 1 highest scores, and one token
        fused from all others. "dynamicvit": before the attention of each block that reduces the
        patches, a learned predictor selects the K patches that stay; see `KeepPredictor`. A block
        has one if its K, at least 1, is below the K of all blocks before it and below the number of
        patches of images of ``position_size``. "tome": means of patches with similar keys, found in
        pairs. "act": all patches stay, but the queries of each head are clustered by their hashes,
        and K prototypes attend in their place (ACT, Zheng et al. 2020); K is at least 1.
        "convolution": a convolution of 2 x 2 patches in some ``blocks``. "soft_extract": all
        patches stay, scaled by a learned parameter of their rank.
        The score of a patch is the attention that it receives from all heads and queries, or with
        "evit" from the class token, averaged over the heads.
      initial: first centres of a clustering: the highest "score", or "random".
      carry: whether later blocks weight a cluster in attention by its number of patches (Supplement
        E of Token Pooling), for models that were trained without the reducer.
      diagonal: whether the attention of a patch to itself counts in its score; it does not in the
        code of PoWER-BERT.
      neighbors: number of remaining tokens from which a patch of a map is reconstructed, if the
        method drops patches. 1: it is a copy of the token that was nearest when it was dropped.
        More: the weighted mean of the tokens that were nearest before the first reduction, as
        after Expedite's clustering (Liang, W. et al. 2022, Eq. 4). Training of "dynamicvit" always
        copies.
      blocks: the blocks with a convolution, counted from 1.
      penalty: weight of a loss. "soft_extract": block l, from 1, adds penalty * l * sum(retention
        of block l). "dynamicvit": every predictor adds penalty * (share of the patches that it
        keeps - K / N)^2, averaged over the images; 2 / 3 in the paper, with three predictors.
      learning_rate_factor: factor on the learning rate of the retention parameters.
    """

    prefix: ClassVar[str] = "token_reducer."
    valid: ClassVar[Rules] = {
        "keep": Several(whole(0, 2**24)),
        "method": OneOf(METHODS),
        "initial": OneOf(INITIAL),
        "carry": Flag(),
        "diagonal": Flag(),
        "neighbors": whole(1, 2**24),
        "blocks": Several(whole(1, BLOCKS)),
        "penalty": ZeroOr(Number(1e-12, 1e6)),
        "learning_rate_factor": ZeroOr(Number(1e-9, 1e6)),
    }

    keep: tuple[int, ...] = ()
    method: str = "weighted_kmedoids"
    initial: str = "score"
    carry: bool = False
    diagonal: bool = True
    neighbors: int = 1
    blocks: tuple[int, ...] = ()
    penalty: float = 0.0
    learning_rate_factor: float = 1.0

    def check(self, depth: int) -> None:
        """Raises UserError unless the settings fit a model of ``depth`` blocks."""
        check_unused(self.prefix, self, f"method={self.method!r}", self._unused())
        if reads_keep({"method": self.method}) and len(self.keep) != depth:
            self._refuse("keep", f"{depth} numbers from 0, one for every block")
        if self.method in (ACT, DYNAMICVIT) and 0 in self.keep:
            self._refuse("keep", f"with method={self.method!r}, {depth} numbers from 1")
        if self.method == CONVOLUTION:
            blocks = set(self.blocks)
            if not blocks or max(blocks) > depth or len(blocks) < len(self.blocks):
                self._refuse("blocks", f"one or more different numbers from 1 to {depth}")

    def _unused(self):
        """Returns the settings that the method does not read."""
        names = () if self.method in CLUSTERINGS else ("initial",)
        names += () if self.method == CONVOLUTION else ("blocks",)
        names += () if self.method in (SEARCH, DYNAMICVIT) else ("penalty",)
        names += () if self.method == SEARCH else ("learning_rate_factor",)
        names += () if reads_keep({"method": self.method}) else ("keep",)
        names += () if self.drops else ("neighbors",)
        names += ("carry",) if self.method in (ACT, CONVOLUTION, DYNAMICVIT, SEARCH) else ()
        return names if self.scored_by == "all" else (*names, "diagonal")

    def _refuse(self, name, valid):
        value = getattr(self, name)
        raise UserError(f"token_reducer.{name}={value!r} is not valid; valid: {valid}")

    def acts(self, block: int, num_patches: int) -> bool:
        """Returns whether a block, counted from 0, changes ``num_patches`` patches."""
        if self.method == CONVOLUTION:
            return self.halves(block)
        return self.method == SEARCH or self.keep[block] < num_patches

    def predicts(self, block: int, num_patches: int) -> bool:
        """Returns whether a block, counted from 0, predicts which patches stay.

        Args:
          block: the block.
          num_patches: number of patches of images of position_size.
        """
        if self.method != DYNAMICVIT:
            return False
        return self.keep[block] < min((num_patches, *self.keep[:block]))

    def check_map(self) -> None:
        """Raises UserError where a patch may have no token that stands for it."""
        if self.method == CONVOLUTION:
            self._refuse("method", "for a map, all others")
        if 0 in self.keep:
            self._refuse("keep", "for a map, numbers from 1")

    @property
    def drops(self) -> bool:
        """Whether patches are dropped, so that a map needs tokens to stand for them."""
        return self.method in (*SELECTIONS, EVIT, DYNAMICVIT)

    @property
    def scored_by(self) -> str | None:
        """Queries whose attention gives the scores: "all" or "class"; None: no scores."""
        by_chance = ("random",) if self.initial == "score" else ("random", "kmeans", "kmedoids")
        if self.method in (MERGING, ACT, CONVOLUTION, DYNAMICVIT, *by_chance):
            return None
        return "class" if self.method == EVIT else "all"

    def halves(self, block: int) -> bool:
        """Returns whether a block, counted from 0, halves the rows and columns of the map."""
        return block + 1 in self.blocks

    def penalty_of(self, block: int) -> np.float32 | None:
        """Returns the weight of a block's own loss, in float32; None: it has none."""
        factor = block + 1 if self.method == SEARCH else 1
        return np.float32(self.penalty) * np.float32(factor) if self.penalty else None


def reads_keep(settings: Mapping[str, Any]) -> bool:
    """Returns whether a reducer with these attributes, given by name, needs `keep`."""
    return settings.get("method", TokenReducer.method) in _KEEPING


def tome_keep(num_patches: int, depth: int, merged: int) -> tuple[int, ...]:
    """Returns K of every block when every block merges the same number of patches.

    Args:
      num_patches: N, number of patches of the image.
      depth: number of blocks.
      merged: r, number of patches per block that join another patch; a block merges at most half of
        its patches.

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
      num_patches: N, number of patches of the image.
      depth: number of blocks.
      rate: fraction of a block's patches, in (0, 1], that are kept besides the new fused token;
        earlier fused tokens count as patches, and the number is rounded up.
      blocks: the blocks that fuse, counted from 1; in the paper 4, 7 and 10 of 12.

    References:
      Liang, Y. et al. 2022, EViT, Section 3, and its code (youweiliang/evit). The code fuses even a
      single patch; here a single patch is kept unchanged.
    """
    keep = []
    for block in range(1, depth + 1):
        if block in blocks:
            num_patches = min(math.ceil(rate * num_patches) + 1, num_patches)
        keep.append(num_patches)
    return tuple(keep)


def dynamicvit_keep(
    num_patches: int, depth: int, rate: float, blocks: tuple[int, ...]
) -> tuple[int, ...]:
    """Returns K of every block when DynamicViT keeps a share of the patches in some blocks.

    Args:
      num_patches: N, number of patches of the image.
      depth: number of blocks.
      rate: fraction in (0, 1]; the i-th of the blocks keeps rate^i of all patches, rounded down,
        but at least 1.
      blocks: the blocks with a predictor, counted from 1; in the paper 4, 7 and 10 of 12.

    References:
      Rao et al. 2021, Section 4.1, and its code (raoyongming/DynamicViT).
    """
    keep, passed = [], 0
    for block in range(1, depth + 1):
        passed += block in blocks
        keep.append(max(1, math.floor(rate**passed * num_patches)))
    return tuple(keep)
