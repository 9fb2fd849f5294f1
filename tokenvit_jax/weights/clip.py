"""Layout of CLIP's image towers, github.com/openai/CLIP and open_clip: names "visual.*".

The text tower is not used. OpenAI's models use quick_gelu, most of open_clip's gelu.
"""

from typing import Any

import flax.linen as nn

from tokenvit_jax.weights import timm_vit
from tokenvit_jax.weights.rules import (
    KERNEL,
    SAME,
    TRANSPOSED,
    Arrays,
    Change,
    Layout,
    Rule,
    linear,
    norm,
    size_of,
)

# (C,) -> (1, C)
AS_ROW = Change(lambda x: x[None], lambda x: x[0])
# What all image towers of CLIP share.
OVERRIDES = {"pre_norm": True, "patch_bias": False, "norm_epsilon": 1e-5}
ACTIVATION = {"activation": "quick_gelu"}


def rules(model: nn.Module) -> list[Rule]:
    """Returns the rules of an image tower."""
    del model
    block = "visual.transformer.resblocks.{}"
    return [
        Rule("class_token", "visual.class_embedding", AS_ROW),
        Rule("position", "visual.positional_embedding", SAME),
        *linear("patches", "visual.conv1", KERNEL),
        *norm("pre_norm", "visual.ln_pre"),
        *norm("blocks_{}/norm1", f"{block}.ln_1"),
        Rule("blocks_{}/attention/qkv/kernel", f"{block}.attn.in_proj_weight", TRANSPOSED),
        Rule("blocks_{}/attention/qkv/bias", f"{block}.attn.in_proj_bias", SAME),
        *linear("blocks_{}/attention/proj", f"{block}.attn.out_proj"),
        *norm("blocks_{}/norm2", f"{block}.ln_2"),
        *linear("blocks_{}/mlp/fc1", f"{block}.mlp.c_fc"),
        *linear("blocks_{}/mlp/fc2", f"{block}.mlp.c_proj"),
        *norm("norm", "visual.ln_post"),
        Rule("projection/kernel", "visual.proj", SAME),
    ]


def model_overrides(arrays: Arrays) -> dict[str, Any]:
    """Returns the settings of the image tower."""
    overrides, position = OVERRIDES | ACTIVATION, arrays.get("visual.positional_embedding")
    overrides["projection"] = size_of(arrays, "visual.proj", -1)
    position = None if position is None else position[None]
    return overrides | timm_vit.patch_overrides(arrays.get("visual.conv1.weight"), position, 1)


LAYOUT = Layout(
    task="classification",
    marks=(r"visual\.conv1\.weight", r"visual\.transformer\.resblocks\.0\.attn\.in_proj_weight"),
    normalization="clip",
    rules=rules,
    num_classes=lambda arrays: 0,
    model_overrides=model_overrides,
    image_size=timm_vit.image_size,
    eval_crop=lambda image_size, arrays: 1.0,
    assumed=lambda arrays: ("activation",),
    # The text tower, and numbers about the model in OpenAI's files.
    unused=(
        r"transformer\.", r"token_embedding\.", r"positional_embedding$", r"ln_final\.",
        r"text_projection$", r"text\.", r"logit_scale$", r"logit_bias$", r"input_resolution$",
        r"context_length$", r"vocab_size$", r"attn_mask$",
    ),
)  # fmt: skip
