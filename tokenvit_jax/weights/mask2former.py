"""Layouts of Mask2Former around a Swin Transformer: detectron2's, and that of the hub.

detectron2's is that of the authors' files. The hub's is that of the files of transformers, which
store queries, keys and values apart, except those of cross-attention.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from tokenvit_jax.heads.pixel_decoder import NUM_LEVELS
from tokenvit_jax.weights import huggingface, swin
from tokenvit_jax.weights.openmmlab import ORIGINAL
from tokenvit_jax.weights.rules import (
    KERNEL,
    SAME,
    TRANSPOSED,
    Arrays,
    Layout,
    Rule,
    joined,
    linear,
    norm,
    size_of,
    within,
)

NUM_HEADS = 8  # of all published models; the arrays do not tell them
ADE20K_CLASSES = (100, 150)  # numbers of classes of the models for ADE20K
# Sides of the images that models were trained on [pixels].
ADE20K_SIZE, COCO_SIZE = 640, 1024
# Sizes of the evaluation, as entries.
ADE20K_DATA = {"eval_size": (640, 1024), "result_size": (2100, 2100)}
COCO_DATA = {"eval_size": (800, 1344), "long_side": 1333, "result_size": (640, 640)}
# Kind of the segments by the number of classes; semantic models for ADE20K have 100 queries.
KINDS = {80: "instance", 100: "instance", 133: "panoptic", 150: "panoptic"}
SEMANTIC = (150, 100)


def _in_projection(ours: str, theirs: str) -> list[Rule]:
    return [
        Rule(f"{ours}/kernel", f"{theirs}.in_proj_weight", TRANSPOSED),
        Rule(f"{ours}/bias", f"{theirs}.in_proj_bias", SAME),
    ]


_LAYER = "transformer.encoder.layers.{}"
PIXEL_DECODER = [  # without the name of the module
    *linear("input_{}", "input_proj.{}.0", KERNEL),
    *norm("input_norm_{}", "input_proj.{}.1"),
    Rule("level_embedding", "transformer.level_embed", SAME),
    *linear("layer_{}/attention/offsets", f"{_LAYER}.self_attn.sampling_offsets"),
    *linear("layer_{}/attention/weights", f"{_LAYER}.self_attn.attention_weights"),
    *linear("layer_{}/attention/value", f"{_LAYER}.self_attn.value_proj"),
    *linear("layer_{}/attention/output", f"{_LAYER}.self_attn.output_proj"),
    *norm("layer_{}/norm1", f"{_LAYER}.norm1"),
    *linear("layer_{}/fc1", f"{_LAYER}.linear1"),
    *linear("layer_{}/fc2", f"{_LAYER}.linear2"),
    *norm("layer_{}/norm2", f"{_LAYER}.norm2"),
    *linear("lateral", "adapter_1", KERNEL),
    *norm("lateral_norm", "adapter_1.norm"),
    *linear("output", "layer_1", KERNEL),
    *norm("output_norm", "layer_1.norm"),
    *linear("mask_features", "mask_features", KERNEL),
]

_CROSS, _SELF = "transformer_cross_attention_layers.{}", "transformer_self_attention_layers.{}"
_MLP = "transformer_ffn_layers.{}"
DECODER = [  # without the name of the module
    *_in_projection("layer_{}/cross_attention/qkv", f"{_CROSS}.multihead_attn"),
    *linear("layer_{}/cross_attention/proj", f"{_CROSS}.multihead_attn.out_proj"),
    *norm("layer_{}/norm1", f"{_CROSS}.norm"),
    *_in_projection("layer_{}/self_attention/qkv", f"{_SELF}.self_attn"),
    *linear("layer_{}/self_attention/proj", f"{_SELF}.self_attn.out_proj"),
    *norm("layer_{}/norm2", f"{_SELF}.norm"),
    *linear("layer_{}/fc1", f"{_MLP}.linear1"),
    *linear("layer_{}/fc2", f"{_MLP}.linear2"),
    *norm("layer_{}/norm3", f"{_MLP}.norm"),
    *norm("norm", "decoder_norm"),
    Rule("queries", "query_feat.weight", SAME),
    Rule("query_positions", "query_embed.weight", SAME),
    Rule("level_embedding", "level_embed.weight", SAME),
    *linear("classifier", "class_embed"),
    *linear("mask_embedding_{}", "mask_embed.layers.{}"),
]
_HEAD = [
    *within("head/pixel_decoder", "sem_seg_head.pixel_decoder", PIXEL_DECODER),
    *within("head/decoder", "sem_seg_head.predictor", DECODER),
]

# Names of the hub
_ENCODER, _LAYERS = "model.pixel_level_module.encoder", "model.transformer_module.decoder.layers"
_HUB_NAMES = (  # patterns in detectron2's names -> names of the hub
    (r"^sem_seg_head\.predictor\.class_embed", "class_predictor"),
    (r"^sem_seg_head\.predictor\.transformer_cross_attention_layers", _LAYERS),
    (r"^sem_seg_head\.predictor\.transformer_self_attention_layers", _LAYERS),
    (r"^sem_seg_head\.predictor\.transformer_ffn_layers", _LAYERS),
    (rf"^({re.escape(_LAYERS)}\.{{}})\.multihead_attn", r"\1.cross_attn"),
    (r"^sem_seg_head\.predictor", "model.transformer_module"),
    (r"\.decoder_norm", ".decoder.layernorm"),
    (r"\.mask_embed\.layers\.{}", ".decoder.mask_predictor.mask_embedder.{}.0"),
    (r"\.query_feat\.", ".queries_features."),
    (r"\.query_embed\.", ".queries_embedder."),
    (r"^sem_seg_head\.pixel_decoder", "model.pixel_level_module.decoder"),
    (r"\.input_proj\.", ".input_projections."),
    (r"\.transformer\.", "."),
    (r"\.linear([12])\.", r".fc\1."),
    (r"\.mask_features\.", ".mask_projection."),
    (r"\.(adapter_1|layer_1)\.norm\.", r".\1.1."),
    (r"\.(adapter_1|layer_1)\.(weight|bias)", r".\1.0.\2"),
)
_HUB_NORMS = (  # end of our path of a LayerNorm -> its name there
    (r"pixel_decoder/layer_{}/norm1", "self_attn_layer_norm"),
    (r"pixel_decoder/layer_{}/norm2", "final_layer_norm"),
    (r"/decoder/layer_{}/norm1", "cross_attn_layer_norm"),
    (r"/decoder/layer_{}/norm2", "self_attn_layer_norm"),
    (r"/decoder/layer_{}/norm3", "final_layer_norm"),
)


def _renamed(rule: Rule) -> Rule:
    """Returns a rule of the head with the name of the hub."""
    theirs = rule.theirs
    for pattern, name in _HUB_NAMES:
        theirs = re.sub(pattern, name, theirs)
    for ours, name in _HUB_NORMS:
        if ours in rule.ours:
            theirs = re.sub(r"\.norm\d?\.", f".{name}.", theirs)
    return rule._replace(theirs=theirs)


def _hub_head() -> list[Rule]:
    own = [f"{_LAYERS}.{{}}.self_attn.{part}_proj" for part in "qkv"]
    return [
        *joined("head/decoder/layer_{}/self_attention/qkv", *own),  # instead of a rule below
        *map(_renamed, _HEAD),
    ]


# ------------------------------------------------------------------------------------------------
# The layouts
# ------------------------------------------------------------------------------------------------


def _rules(model: nn.Module) -> list[Rule]:
    return [*ORIGINAL.rules(model.backbone), *_HEAD]


def _hub_rules(model: nn.Module) -> list[Rule]:
    found = []
    for rule in huggingface.swin_rules(model.backbone):
        names = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
        names = tuple(f"{_ENCODER}.{name}" for name in names)
        theirs = names[0] if len(names) == 1 else names
        found.append(Rule(f"backbone/{rule.ours}", theirs, rule.change))
    for i in range(1, 5):
        found += norm(f"map_norm_{i}", f"{_ENCODER}.hidden_states_norms.stage{i}")
    return [*found, *_hub_head()]


def _with_new_names(arrays: Arrays) -> Arrays:
    """Returns arrays with the name that the first queries have in later files."""
    return {name.replace(".static_query.", ".query_feat."): x for name, x in arrays.items()}


def _num_classes(arrays: Arrays, rules: Sequence[Rule]) -> int:
    return max(size_of(arrays, _name(rules, "head/decoder/classifier/kernel")) - 1, 0)


def _name(rules: Sequence[Rule], ours: str, number: int = 0) -> str:
    """Returns the name of an array of the head in a file."""
    theirs = next(rule.theirs for rule in rules if rule.ours == ours)
    return theirs.format(number)


def _config_entries(arrays: Arrays, rules: Sequence[Rule]) -> dict[str, Any]:
    """Returns the settings of the head, the kind of segments and the sizes as entries."""

    def size(ours, axis=0):
        return size_of(arrays, _name(rules, f"head/{ours}"), axis)

    def count(ours):
        names = (_name(rules, f"head/{ours}", i) for i in itertools.count())
        return next(i for i, name in enumerate(names) if name not in arrays)

    weights = "pixel_decoder/layer_{}/attention/weights/bias"
    sizes = {
        "num_queries": size("decoder/queries"),
        "channels": size("decoder/queries", 1),
        "num_points": size(weights) // (NUM_HEADS * NUM_LEVELS),
        "encoder_depth": count(weights),
        "encoder_hidden": size("pixel_decoder/layer_{}/fc1/bias"),
        "depth": count("decoder/layer_{}/fc1/bias"),
        "hidden": size("decoder/layer_{}/fc1/bias"),
    }
    classes = _num_classes(arrays, rules)
    kind = KINDS.get(classes, "panoptic")
    return {
        "head_overrides": {name: found for name, found in sizes.items() if found},
        "inference": {"kind": "semantic" if (classes, sizes["num_queries"]) == SEMANTIC else kind},
        "data": ADE20K_DATA if classes in ADE20K_CLASSES else COCO_DATA,
    }


def _layout(attention: str, rules: Any, head: Sequence[Rule], **others: Any) -> Layout:
    def num_classes(arrays):
        return _num_classes(arrays, head)

    return Layout(
        task="masks",
        marks=(
            rf"{re.escape(attention.format(0))}\.{swin.TABLE_NAME}",
            *(re.escape(_name(head, ours)) for ours in (
                "head/pixel_decoder/layer_{}/attention/offsets/kernel", "head/decoder/queries",
            )),
        ),
        normalization="imagenet",
        rules=rules,
        num_classes=num_classes,
        model_overrides=lambda arrays: swin.window_overrides(arrays, attention),
        image_size=lambda model, arrays: (
            ADE20K_SIZE if num_classes(arrays) in ADE20K_CLASSES else COCO_SIZE
        ),
        eval_crop=None,
        config_entries=lambda arrays: _config_entries(arrays, head),
        **others,
    )  # fmt: skip


DETECTRON2 = _layout(
    ORIGINAL.attention, _rules, _HEAD, unused=(r"criterion\.",), prepare=_with_new_names
)
HUB = _layout(
    f"{_ENCODER}.encoder.layers.{{}}.blocks.0.attention.self", _hub_rules, _hub_head(),
    unused=(rf"{re.escape(_ENCODER)}\.layernorm\.", r"criterion\."),
)  # fmt: skip
