"""Recipes of DeiT (Touvron et al. 2021), also with Token Pooling (Marin et al. 2021).

Token Pooling trains in three stages: the plain model; PoWER-BERT's search for the number of tokens
that every block needs; and the model that keeps this number of tokens.
"""

import dataclasses

from ml_collections import ConfigDict

from tokenvit_jax.published import TOKEN_POOLING
from tokenvit_jax.recipes import choose_config
from tokenvit_jax.recipes.digits import digits_config
from tokenvit_jax.recipes.imagenet import ImageNetRecipe

# Settings of every DeiT here, listed so that the command line can change them.
COMMON = {"remat": False, "qk_norm": "none"}

SEARCH_EPOCHS = 30  # the paper's


def deit_config(model: str, arg: str, *, drop_path: float, recipe: ImageNetRecipe) -> ConfigDict:
    """Returns the configuration of a DeiT, with a teacher or for one stage of Token Pooling.

    Args:
      model: name of the model.
      arg: "": DeiT on ImageNet-1K, stage 1; "search": stage 2; "pooled": stage 3 with the number of
        tokens that a search found; "level0" to "level7": stage 3 with the paper's numbers, for the
        models that it reports; "distilled": DeiT with a distillation token and a teacher; "digits",
        "digits_search", "digits_pooled", "digits_distilled": the same with a small model on the
        embedded digits.
      drop_path: rate of stochastic depth on ImageNet-1K.
      recipe: training on ImageNet-1K.
    """
    overrides = {"drop_path": drop_path, **COMMON}
    search = dataclasses.replace(recipe, epochs=SEARCH_EPOCHS)
    configs = {
        "": lambda: recipe.make_config(model, overrides),
        "search": lambda: _search(search.make_config(model, overrides), penalty=1e-3),
        "pooled": lambda: _pooled(recipe.make_config(model, overrides)),
        "distilled": lambda: _distilled(recipe.make_config(model, overrides)),
        "digits": lambda: deit_digits_config(model),
        "digits_search": lambda: _search(deit_digits_config(model), penalty=3e-3),
        "digits_pooled": lambda: _pooled(deit_digits_config(model)),
        "digits_distilled": lambda: _distilled(deit_digits_config(model)),
    }
    for number, level in enumerate(TOKEN_POOLING.get(model, ())):
        configs[f"level{number}"] = lambda keep=level.keep: _pooled(
            recipe.make_config(model, overrides), keep
        )
    return choose_config(arg, configs)


def deit_digits_config(model: str) -> ConfigDict:
    """Returns the configuration of a small DeiT on the embedded digits, with 64 patches."""
    overrides = {
        "dim": 64, "depth": 6, "num_heads": 4, "patch_size": 8, "position_size": (64, 64),
        "init_std": 0.1, "drop_path": 0.0, **COMMON,
    }  # fmt: skip
    return digits_config(model, overrides)


def _distilled(config: ConfigDict) -> ConfigDict:
    """Adds the distillation token and its loss with the teacher's classes (DeiT, Eq. 3)."""
    config.model_overrides.distilled = True
    config.distillation.kind = "hard"
    config.distillation.weight = 0.5
    return config


def _search(config: ConfigDict, penalty: float) -> ConfigDict:
    """Adds the search for numbers of tokens; a larger penalty keeps fewer tokens."""
    config.model_overrides.token_reducer = {
        "method": "soft_extract", "diagonal": True, "penalty": penalty,
        "learning_rate_factor": 10.0,
    }  # fmt: skip
    return config


def _pooled(config: ConfigDict, keep: tuple[int, ...] = ()) -> ConfigDict:
    """Adds Token Pooling.

    Args:
      config: configuration of the plain model.
      keep: number of tokens that each block keeps; (): the numbers that a search found.
    """
    config.model_overrides.token_reducer = {
        "keep": keep, "method": "weighted_kmedoids", "initial": "score", "carry": False,
        "diagonal": True,
    }  # fmt: skip
    return config
