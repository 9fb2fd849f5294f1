"""Recipes of ClusTR: its Table A2, completed by the code of PVTv2, on which ClusTR builds."""

from ml_collections import ConfigDict

from tokenvit_jax.recipes import choose_config
from tokenvit_jax.recipes.digits import digits_config
from tokenvit_jax.recipes.imagenet import ImageNetRecipe

# Settings of every ClusTR here, listed so that the command line can change them.
COMMON = {
    "ratios": ((64, 16), (16, 4), (4, 1), (1,)),  # Table A1
    "aggregation": "clusters", "assign": "nearest", "adaptive": 0.0, "remat": False,
}  # fmt: skip


def clustr_config(model: str, arg: str, *, drop_path: float, recipe: ImageNetRecipe) -> ConfigDict:
    """Returns the configuration of a ClusTR.

    Args:
      model: name of the model.
      arg: "": on ImageNet-1K; "digits": a small model on the embedded digits.
      drop_path: rate of stochastic depth on ImageNet-1K.
      recipe: training on ImageNet-1K.
    """
    overrides = {"drop_path": drop_path, **COMMON}
    return choose_config(
        arg,
        {
            "": lambda: recipe.make_config(model, overrides),
            "digits": lambda: clustr_digits_config(model),
        },
    )


def clustr_digits_config(model: str) -> ConfigDict:
    """Returns the configuration of a small ClusTR on the embedded digits.

    It keeps the published token reductions: 256, 64 and 16 tokens become 4 and 16, or 4 and all.
    """
    overrides = {
        "dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8), "depths": (1, 1, 2, 1),
        "mlp_ratios": (4, 4, 4, 4), "drop_path": 0.0, **COMMON,
    }  # fmt: skip
    return digits_config(model, overrides)
