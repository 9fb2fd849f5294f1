"""Recipes of the Pale Transformer (Wu et al. 2022), without and with token labels."""

from ml_collections import ConfigDict

from tokenvit_jax.recipes import choose_config
from tokenvit_jax.recipes.digits import digits_config
from tokenvit_jax.recipes.imagenet import ImageNetRecipe

# Settings of every Pale Transformer here, listed so that the command line can change them.
COMMON = {
    "mode": "parallel", "position": "cpe", "mask_padding": False, "token_head": False,
    "remat": False,
}  # fmt: skip


def pale_config(model: str, arg: str, *, drop_path: float, recipe: ImageNetRecipe) -> ConfigDict:
    """Returns the configuration of a Pale Transformer.

    Args:
      model: name of the model.
      arg: "": on ImageNet-1K; "tokens": the paper's starred models, with MixToken and token labels;
        "digits" and "digits_tokens": small versions of both on the embedded digits.
      drop_path: rate of stochastic depth on ImageNet-1K.
      recipe: training on ImageNet-1K.
    """
    overrides = {"drop_path": drop_path, "pale_sizes": (7, 7, 7, 7), **COMMON}
    return choose_config(
        arg,
        {
            "": lambda: recipe.make_config(model, overrides),
            "tokens": lambda: _with_token_labels(recipe.make_config(model, overrides)),
            "digits": lambda: pale_digits_config(model),
            "digits_tokens": lambda: pale_digits_config(model, token_labels=True),
        },
    )


def pale_digits_config(model: str, *, token_labels: bool = False) -> ConfigDict:
    """Returns the configuration of a small Pale Transformer on the embedded digits.

    Args:
      model: name of the model.
      token_labels: whether to train with MixToken and token labels.
    """
    overrides = {
        "dims": (16, 32, 64, 128), "num_heads": (2, 2, 4, 8), "depths": (1, 1, 2, 1),
        # The maps have 16, 8, 4 and 2 rows and columns: 4, 4, 2 and 1 pales.
        "pale_sizes": (4, 2, 2, 2), "position_size": (64, 64), "drop_path": 0.0, **COMMON,
    }  # fmt: skip
    config = digits_config(model, overrides)
    return _with_token_labels(config) if token_labels else config


def _with_token_labels(config: ConfigDict) -> ConfigDict:
    """Replaces Mixup and CutMix with MixToken, and adds a dense loss (Jiang et al. 2021)."""
    config.mix.mixup, config.mix.cutmix, config.mix.mixtoken = 0.0, 0.0, 1.0
    config.token_labels.weight = 0.5
    config.model_overrides.token_head = True
    return config
