"""Layout of Google's ViTs, github.com/google-research/vision_transformer: NumPy archives.

The arrays have flax's shapes; queries, keys and values are three layers with an axis of heads.
"""

from typing import Any

import flax.linen as nn
import numpy as np

from tokenvit_jax.weights import timm_vit
from tokenvit_jax.weights.rules import SAME, WITHOUT_BATCH, Arrays, Change, Layout, Rule, size_of

_BLOCK = "Transformer/encoderblock_{}"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_1"


def _linear(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}/{part}", f"{theirs}/{part}", SAME) for part in ("kernel", "bias")]


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}/{part}", f"{theirs}/{part}", SAME) for part in ("scale", "bias")]


def rules(model: nn.Module) -> list[Rule]:
    """Returns the rules of a plain vision transformer."""
    heads = model.settings.num_heads

    def flat(x):  # (C, heads, D) -> (C, heads * D); (heads, D) -> (heads * D,)
        return x.reshape(*x.shape[:-2], -1)

    joined = Change(
        lambda *x: np.concatenate([flat(part) for part in x], -1),
        lambda x: tuple(
            part.reshape(*part.shape[:-1], heads, -1) for part in np.split(x, 3, axis=-1)
        ),
    )
    # (heads, D, C) -> (heads * D, C)
    output = Change(
        lambda x: x.reshape(-1, x.shape[-1]), lambda x: x.reshape(heads, -1, x.shape[-1])
    )
    qkv = [
        Rule(
            f"blocks_{{}}/attention/qkv/{part}",
            tuple(f"{_ATTENTION}/{name}/{part}" for name in ("query", "key", "value")),
            joined,
        )
        for part in ("kernel", "bias")
    ]
    return [
        Rule("class_token", "cls", WITHOUT_BATCH),
        Rule("position", "Transformer/posembed_input/pos_embedding", WITHOUT_BATCH),
        *_linear("patches", "embedding"),
        *_norm("blocks_{}/norm1", f"{_BLOCK}/LayerNorm_0"),
        *qkv,
        Rule("blocks_{}/attention/proj/kernel", f"{_ATTENTION}/out/kernel", output),
        Rule("blocks_{}/attention/proj/bias", f"{_ATTENTION}/out/bias", SAME),
        *_norm("blocks_{}/norm2", f"{_BLOCK}/LayerNorm_2"),
        *_linear("blocks_{}/mlp/fc1", f"{_BLOCK}/MlpBlock_3/Dense_0"),
        *_linear("blocks_{}/mlp/fc2", f"{_BLOCK}/MlpBlock_3/Dense_1"),
        *_norm("norm", "Transformer/encoder_norm"),
        *_linear("classifier", "head"),
    ]


def model_overrides(arrays: Arrays) -> dict[str, Any]:
    """Returns the sides of a patch and of the trained image; assumes square maps of positions."""
    kernel = arrays.get("embedding/kernel")
    patches = None if kernel is None or kernel.ndim != 4 else kernel.transpose(3, 2, 0, 1)
    position = arrays.get("Transformer/posembed_input/pos_embedding")
    return timm_vit.patch_overrides(patches, position, 1)


def without_pre_logits(arrays: Arrays) -> Arrays:
    """Returns the arrays without a classifier that reads another layer, `pre_logits`.

    Some models pretrained on ImageNet-21k have this layer, and models here have not.
    """
    if not any(name.startswith("pre_logits/") for name in arrays):
        return arrays
    return {
        name: array
        for name, array in arrays.items()
        if not name.startswith(("pre_logits/", "head/"))
    }


LAYOUT = Layout(
    task="classification",
    marks=("embedding/kernel", "Transformer/encoderblock_0/LayerNorm_0/scale"),
    normalization="inception",
    rules=rules,
    num_classes=lambda arrays: size_of(arrays, "head/kernel", -1),
    model_overrides=model_overrides,
    image_size=timm_vit.image_size,
    prepare=without_pre_logits,
)
