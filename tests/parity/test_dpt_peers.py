"""DPT and its backbone with random weights: compares depth with transformers, logits with timm.

transformers equals the published code on square images, with the epsilon of LayerNorm that the
weights were trained with.
"""

import re

import jax
import numpy as np
import pytest

import tokenvit_jax as tv
from tokenvit_jax.heads import DptHead
from tokenvit_jax.tasks.depth.model import Dpt
from tokenvit_jax.weights import (
    LAYOUTS,
    export_weights,
    import_weights,
    recognise_layout,
)

pytestmark = pytest.mark.parity

LEVELS = [32, 64, 20, 28]
BIT = {
    "embedding_size": 16, "hidden_sizes": [32, 64, 96], "depths": [1, 2, 2], "num_groups": 4,
    "layer_type": "bottleneck", "global_padding": "SAME", "embedding_dynamic_padding": True,
    "out_features": ["stage1", "stage2", "stage3"],
}  # fmt: skip
HYBRID = {
    "is_hybrid": True, "backbone_out_indices": [0, 1, 3, 5], "neck_ignore_stages": [0, 1],
    "backbone_featmap_shape": [1, 96, 4, 4],
}  # fmt: skip
PLAIN = {"is_hybrid": False, "backbone_out_indices": [0, 1, 3, 5]}
COMMON = {
    "hidden_size": 24, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 96,
    "image_size": 64, "patch_size": 16, "layer_norm_eps": 1e-6, "neck_hidden_sizes": LEVELS,
    "fusion_hidden_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "qkv_bias": True, "use_batch_norm_in_fusion_residual": False, "add_projection": False,
}  # fmt: skip
# transformers' names -> isl-org's; queries, keys and values are joined afterwards.
NAMES = [
    (r"^dpt\.embeddings\.cls_token", "pretrained.model.cls_token"),
    (r"^dpt\.embeddings\.position_embeddings", "pretrained.model.pos_embed"),
    (r"^dpt\.embeddings\.(patch_embeddings\.)?projection", "pretrained.model.patch_embed.proj"),
    (r"^dpt\.embeddings\.backbone\.bit\.embedder\.convolution",
     "pretrained.model.patch_embed.backbone.stem.conv"),
    (r"^dpt\.embeddings\.backbone\.bit\.embedder\.norm",
     "pretrained.model.patch_embed.backbone.stem.norm"),
    (r"^dpt\.embeddings\.backbone\.bit\.encoder\.stages\.(\d)\.layers\.(\d)",
     r"pretrained.model.patch_embed.backbone.stages.\1.blocks.\2"),
    (r"^dpt\.encoder\.layer\.(\d+)\.layernorm_before", r"pretrained.model.blocks.\1.norm1"),
    (r"^dpt\.encoder\.layer\.(\d+)\.layernorm_after", r"pretrained.model.blocks.\1.norm2"),
    (r"^dpt\.encoder\.layer\.(\d+)\.attention\.output\.dense",
     r"pretrained.model.blocks.\1.attn.proj"),
    (r"^dpt\.encoder\.layer\.(\d+)\.intermediate\.dense", r"pretrained.model.blocks.\1.mlp.fc1"),
    (r"^dpt\.encoder\.layer\.(\d+)\.output\.dense", r"pretrained.model.blocks.\1.mlp.fc2"),
    (r"^dpt\.layernorm", "pretrained.model.norm"),
    (r"^neck\.convs\.(\d)", lambda found: f"scratch.layer{int(found[1]) + 1}_rn"),
    (r"^neck\.reassemble_stage\.readout_projects\.(\d)\.0",
     lambda found: f"pretrained.act_postprocess{int(found[1]) + 1}.0.project.0"),
    (r"^neck\.reassemble_stage\.layers\.(\d)\.projection",
     lambda found: f"pretrained.act_postprocess{int(found[1]) + 1}.3"),
    (r"^neck\.reassemble_stage\.layers\.(\d)\.resize",
     lambda found: f"pretrained.act_postprocess{int(found[1]) + 1}.4"),
    (r"^neck\.fusion_stage\.layers\.(\d)\.projection",
     lambda found: f"scratch.refinenet{4 - int(found[1])}.out_conv"),
    (r"^neck\.fusion_stage\.layers\.(\d)\.residual_layer(\d)\.convolution(\d)",
     lambda found: f"scratch.refinenet{4 - int(found[1])}.resConfUnit{found[2]}.conv{found[3]}"),
    (r"^head\.head", "scratch.output_conv"),
]  # fmt: skip


def published_names(arrays):
    """Returns transformers' arrays with the names and shapes of isl-org's code."""
    renamed = {}
    for name, x in arrays.items():
        for pattern, new in NAMES:
            if re.match(pattern, name):
                renamed[re.sub(pattern, new, name)] = x
    for name in arrays:
        if found := re.match(
            r"dpt\.encoder\.layer\.(\d+)\.attention\.attention\.query\.(\w+)", name
        ):
            parts = [arrays[name.replace("query", part)] for part in ("query", "key", "value")]
            renamed[f"pretrained.model.blocks.{found[1]}.attn.qkv.{found[2]}"] = np.concatenate(
                parts
            )
    assert len(arrays) == len(renamed) + 2 * 2 * COMMON["num_hidden_layers"]
    return renamed


@pytest.mark.parametrize("kind", ["hybrid", "plain"])
def test_depth_in_float64(transformers, kind):
    import torch
    from transformers.models.bit.configuration_bit import BitConfig
    from transformers.models.dpt.configuration_dpt import DPTConfig
    from transformers.models.dpt.modeling_dpt import DPTForDepthEstimation

    torch.manual_seed(0)
    more = HYBRID | {"backbone_config": BitConfig(**BIT)} if kind == "hybrid" else PLAIN
    peer = DPTForDepthEstimation(DPTConfig(**COMMON | more)).eval()
    for parameter in peer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for parameter in peer.head.head[4].parameters():  # or the last ReLU may leave only zeros
        parameter.data.abs_()
    arrays = {k: x.numpy() for k, x in peer.state_dict().items() if "num_batches" not in k}
    arrays = published_names(arrays)
    assert recognise_layout(arrays, "vit_b_r50") == "dpt"
    layout = LAYOUTS["dpt"]["vit"]
    settings = layout.model_overrides(arrays) | {"dim": 24, "depth": 6, "num_heads": 3}
    if kind == "hybrid":
        settings["stem"] |= {"num_groups": 4}
    head = layout.config_entries(arrays)["head_overrides"]
    with jax.enable_x64(True):
        backbone = tv.create_model("vit_b_r50" if kind == "hybrid" else "vit_b", dtype="float64",
                                   **settings)  # fmt: skip
        blocks = (3, 5) if kind == "hybrid" else (0, 1, 3, 5)
        model = Dpt(backbone, DptHead(**head, dtype=np.dtype("float64")), blocks)
        params = import_weights(arrays, model, layout)
        params = jax.tree.map(lambda x: x.astype(np.float64), params)
        images = np.random.default_rng(0).normal(size=(2, 64, 64, 3))
        found = np.asarray(jax.jit(model.apply)({"params": params}, images))
    with torch.inference_mode():
        expected = peer.double()(torch.from_numpy(images).permute(0, 3, 1, 2)).predicted_depth
    assert found.dtype == np.float64 and found.std() > 1e-4
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-9)


def test_hybrid_classifier(timm):
    """The published ResNet in front of a narrow transformer, also for images that need padding."""
    import torch

    torch.manual_seed(0)
    peer = timm.create_model(
        "vit_base_r50_s16_384", num_classes=10, img_size=64, embed_dim=32, depth=1, num_heads=2
    ).eval()
    for parameter in peer.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    arrays = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    assert recognise_layout(arrays, "vit_b_r50") == "timm"
    layout = LAYOUTS["timm"]["vit"]
    overrides = layout.model_overrides(arrays) | {"dim": 32, "depth": 1, "num_heads": 2}
    model = tv.create_model("vit_b_r50", num_classes=10, **overrides)
    assert model.settings.stem == tv.create_model("vit_b_r50").settings.stem
    params = import_weights(arrays, model, layout)
    assert export_weights(params, model, layout).keys() == arrays.keys()
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    with torch.inference_mode():
        expected = peer(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    found = jax.jit(model.apply)({"params": params}, images)
    np.testing.assert_allclose(found, expected, atol=1e-4)
