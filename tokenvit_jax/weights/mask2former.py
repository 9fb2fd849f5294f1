"""Layouts of Mask2Former around a Swin Transformer: detectron2's, and that of the hub.

detectron2's is that of the authors' files; the hub's is that of the files in safetensors for
transformers, which renames all arrays and stores queries, keys and values apart, except in
cross-attention.
"""

from tokenvit_jax.weights.rules import KERNEL, SAME, TRANSPOSED, Rule, linear, norm

PIXEL_DECODER = [
    *linear("input_{}", "input_proj.{}.0", KERNEL),
    *norm("input_norm_{}", "input_proj.{}.1"),
    Rule("level_embedding", "transformer.level_embed", SAME),
    *(
        rule
        for ours, theirs in (
            ("attention/offsets", "self_attn.sampling_offsets"),
            ("attention/weights", "self_attn.attention_weights"),
            ("attention/value", "self_attn.value_proj"),
            ("attention/output", "self_attn.output_proj"),
            ("fc1", "linear1"),
            ("fc2", "linear2"),
        )
        for rule in linear(f"layer_{{}}/{ours}", f"transformer.encoder.layers.{{}}.{theirs}")
    ),
    *norm("layer_{}/norm1", "transformer.encoder.layers.{}.norm1"),
    *norm("layer_{}/norm2", "transformer.encoder.layers.{}.norm2"),
    *linear("lateral", "adapter_1", KERNEL),
    *norm("lateral_norm", "adapter_1.norm"),
    *linear("output", "layer_1", KERNEL),
    *norm("output_norm", "layer_1.norm"),
    *linear("mask_features", "mask_features", KERNEL),
]


def _in_projection(ours: str, theirs: str) -> list[Rule]:
    return [
        Rule(f"{ours}/kernel", f"{theirs}.in_proj_weight", TRANSPOSED),
        Rule(f"{ours}/bias", f"{theirs}.in_proj_bias", SAME),
    ]


_CROSS, _SELF = "transformer_cross_attention_layers.{}", "transformer_self_attention_layers.{}"
_FFN = "transformer_ffn_layers.{}"
DECODER = [
    *_in_projection("layer_{}/cross_attention/qkv", f"{_CROSS}.multihead_attn"),
    *linear("layer_{}/cross_attention/proj", f"{_CROSS}.multihead_attn.out_proj"),
    *norm("layer_{}/norm1", f"{_CROSS}.norm"),
    *_in_projection("layer_{}/self_attention/qkv", f"{_SELF}.self_attn"),
    *linear("layer_{}/self_attention/proj", f"{_SELF}.self_attn.out_proj"),
    *norm("layer_{}/norm2", f"{_SELF}.norm"),
    *linear("layer_{}/fc1", f"{_FFN}.linear1"),
    *linear("layer_{}/fc2", f"{_FFN}.linear2"),
    *norm("layer_{}/norm3", f"{_FFN}.norm"),
    *norm("norm", "decoder_norm"),
    Rule("queries", "query_feat.weight", SAME),
    Rule("query_positions", "query_embed.weight", SAME),
    Rule("level_embedding", "level_embed.weight", SAME),
    *linear("classifier", "class_embed"),
    *linear("mask_embedding_{}", "mask_embed.layers.{}"),
]
