"""Parts and layers by the origins of operations."""

import pytest

from tokenvit_jax.measure import parts

BLOCK = "jit(step)/jvp(DGT)/DGT.pooled/DGT.run_blocks/stages_2_11/stages_2_11._residual"
BACK = BLOCK.replace("jvp(DGT)", "transpose(jvp(DGT))")
GROUPS = f"{BLOCK}/attention/attention._attend_in_groups/jit(tokenvit_jax.ops.group_attention)"


@pytest.mark.parametrize(
    ("origin", "part", "layer"),
    [
        (
            f"{GROUPS}/while/body/closed_call/reduce_sum",
            "selection of keys",
            "stages_2_*/attention/group_attention/reduce_sum",
        ),
        (
            f"{GROUPS}/cond/branch_0_fun/dot_general",
            "attention in groups",
            "stages_2_*/attention/group_attention/dot_general",
        ),
        (f"{GROUPS}/cond/branch_0_fun/select_keys/pallas_call", "selection of keys", None),
        (f"{GROUPS}/cond/branch_0_fun/jit(sort)/sort", "selection of keys", None),
        (
            f"{GROUPS}/cond/branch_0_fun/sorted_group_attention/pallas_call",
            "attention in groups",
            "stages_2_*/attention/sorted_group_attention/group_attention/pallas_call",
        ),
        (
            f"{BLOCK}/attention/qkv/dot_general",
            "linear layers of attention",
            "stages_2_*/attention/qkv/dot_general",
        ),
        (
            f"{BACK}/ffn/depthwise/jit(tokenvit_jax.ops.depthwise_conv)/reduce_sum",
            "convolutions",
            "stages_2_*/ffn/depthwise/depthwise_conv/reduce_sum (backward)",
        ),
        (f"{BLOCK}/ffn/norm2/rsqrt", "norms", "stages_2_*/ffn/norm2/rsqrt"),
        (f"{BLOCK}/ffn/convert_element_type", "feed-forward networks", None),
        (f"{BLOCK}/add", parts.OTHER_MODEL, "stages_2_*/add"),
        ("jit(step)/add", parts.OTHER, "add"),
        ("jit(<lambda>)/DGT/head/dot_general", "head and loss", "DGT/head/dot_general"),
        ("jit(step)/normalize/sub", "batch: mixing, normalisation", None),
        ("", parts.UNNAMED, "no name"),
    ],
)
def test_part_and_layer(origin, part, layer):
    assert parts.part_of(origin) == part
    assert layer is None or parts.layer_of(origin) == layer
    assert part in parts.PARTS


def test_parts_of_a_dense_task_tell_backbone_and_head():
    of = parts.part_of_task
    step = "jit(step)/transpose(jvp(Segmenter))"
    assert of(f"{step}/head/fusion/conv/dot_general") == "head: convolutions"
    assert (
        of(f"{step}/backbone.features/stages_0_0/mlp/fc1/dot_general")
        == "backbone: feed-forward networks"
    )
    assert of(f"{step}/auxiliary/convolution/norm/mul") == "auxiliary: convolutions"
    assert of("jit(step)/jvp()/log_softmax/exp") == "loss and others: head and loss"
