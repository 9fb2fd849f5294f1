"""Layout of DINOv2's authors, github.com/facebookresearch/dinov2: backbones without a classifier.

The names are timm's, except for the registers. Here the class token has a position embedding.
"""

from typing import Any

import flax.linen as nn

from tokenvit_jax.weights import timm_vit
from tokenvit_jax.weights.rules import WITHOUT_BATCH, Arrays, Rule, size_of

_REGISTERS = "register_tokens"


def rules(model: nn.Module) -> list[Rule]:
    """Returns the rules of a plain vision transformer."""
    return [Rule("register_token", _REGISTERS, WITHOUT_BATCH), *timm_vit.rules(model)]


def model_overrides(arrays: Arrays) -> dict[str, Any]:
    """Returns the settings that the arrays determine; assumes square maps of positions.

    Raises:
      UserError: the model gates its MLP (SwiGLU).
    """
    found = timm_vit.model_overrides(arrays) | {"position_resize": "bicubic"}
    if _REGISTERS in arrays:  # models with registers resize with antialiasing
        found["num_registers"] = size_of(arrays, _REGISTERS, 1)
        found["position_resize"] = "bicubic_antialias"
    return found


LAYOUT = timm_vit.LAYOUT_DEIT._replace(
    marks=(*timm_vit.LAYOUT_DEIT.marks, "mask_token"),
    rules=rules,
    model_overrides=model_overrides,
    unused=("mask_token",),  # of the pretraining
)
