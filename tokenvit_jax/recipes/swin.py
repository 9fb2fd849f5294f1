"""Recipes of the Swin Transformer, v1 (Liu et al. 2021) and v2 (Liu et al. 2022)."""

from ml_collections import ConfigDict

from tokenvit_jax.recipes import choose_config
from tokenvit_jax.recipes.digits import digits_config
from tokenvit_jax.recipes.imagenet import ImageNetRecipe


def swin_config(model: str, arg: str, *, drop_path: float, recipe: ImageNetRecipe) -> ConfigDict:
    """Returns the configuration of a Swin Transformer of either version.

    Args:
      model: name of the model.
      arg: "": on ImageNet-1K; "digits": a small model on the embedded digits.
      drop_path: rate of stochastic depth on ImageNet-1K.
      recipe: training on ImageNet-1K.
    """
    overrides = {"drop_path": drop_path, "remat": False}
    return choose_config(
        arg,
        {
            "": lambda: recipe.make_config(model, overrides),
            "digits": lambda: swin_digits_config(model),
        },
    )


def swin_digits_config(model: str) -> ConfigDict:
    """Returns the configuration of a small Swin Transformer on the embedded digits."""
    overrides = {
        "dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8),
        # Maps of 16, 8, 4 and 2 rows and columns: 16, 4, 1 and 1 windows. Every second block of the
        # first two stages shifts them.
        "depths": (2, 2, 2, 1), "window_size": 4, "drop_path": 0.0, "remat": False,
    }  # fmt: skip
    if model.startswith("swinv2"):
        overrides["pretrained_window_sizes"] = (4, 4, 4, 2)
    return digits_config(model, overrides)
