"""Recipes of DGT (Liu et al. 2022, Dynamic Group Transformer)."""

import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tokenvit_jax.recipes import choose_config
from tokenvit_jax.recipes.digits import digits_config
from tokenvit_jax.recipes.fashion_mnist import fashion_mnist_config
from tokenvit_jax.recipes.imagenet import ImageNetRecipe

# Settings of every DGT here, listed so that the command line can change them.
COMMON = {"centroid_rule": "constant", "centroid_old_weight": 0.9, "remat": False}

# Blocks of Table 4(c), in place of DGT's own: no groups and no centroids.
OTHER_BLOCKS = ("swin", "cswin", "cmt")
_OF_GROUPS = ("num_groups", "top_k", "centroid_rule", "centroid_old_weight")

# A small DGT for images of 64 x 64 pixels and less.
SMALL = {
    "stem_dim": 16, "dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8),
    "depths": (1, 1, 2, 1), "head_dim": 128,
    # Groups matter in stages 1 (256 tokens of 64 x 64 pixels) and 2 (64 tokens).
    "num_groups": 8, "top_k": 24,
    "drop_path": 0.0, **COMMON,
}  # fmt: skip


def dgt_config(
    model: str,
    arg: str,
    *,
    drop_path: float,
    recipe: ImageNetRecipe,
    other_blocks: tuple[str, ...] = (),
) -> ConfigDict:
    """Returns the configuration of a DGT.

    Args:
      model: name of the model.
      arg: "": on ImageNet-1K; "digits": a small model on the embedded digits;
        "fashion_mnist": the same model on Fashion-MNIST; "swin_block" and the like: with one of
        ``other_blocks`` on ImageNet-1K.
      drop_path: rate of stochastic depth on ImageNet-1K.
      recipe: training on ImageNet-1K.
      other_blocks: blocks of Table 4(c) that may replace DGT's.
    """
    overrides = {
        "num_groups": 48, "top_k": 98,  # the paper's
        "drop_path": drop_path, **COMMON,
    }  # fmt: skip
    return choose_config(
        arg,
        {
            "": lambda: recipe.make_config(model, overrides),
            "digits": lambda: dgt_digits_config(model),
            "fashion_mnist": lambda: fashion_mnist_config(model, SMALL),
        }
        | {
            f"{block}_block": functools.partial(
                recipe.make_config, model, with_block(overrides, block)
            )
            for block in other_blocks
        },
    )


def with_block(overrides: Mapping[str, Any], block: str) -> dict[str, Any]:
    """Returns overrides of a DGT with another block, without the settings of groups."""
    return {k: v for k, v in overrides.items() if k not in _OF_GROUPS} | {"block": block}


def dgt_digits_config(model: str, block: str = "dgt") -> ConfigDict:
    """Returns the configuration of a small DGT on the embedded digits.

    Args:
      model: name of the model.
      block: "dgt", or one of :data:`OTHER_BLOCKS`.
    """
    return digits_config(model, SMALL if block == "dgt" else with_block(SMALL, block))
