"""Every layout: names and shapes of its arrays, import and export, recognition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokenvit_jax as tv
from tokenvit_jax.errors import UserError
from tokenvit_jax.weights import (
    LAYOUTS,
    export_weights,
    find_layout,
    import_weights,
    parameter_shapes,
    recognise_layout,
    similar_models,
)

NARROW = {"dim": 16, "depth": 1, "num_heads": 2}
PATCHES = {"patch_size": 8, "position_size": (32, 32)}
SWIN = {"dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 1, 1)}
DINO = {"layer_scale": 1e-5, "position_resize": "bicubic"}
REGISTERS = {"num_registers": 3, "position_resize": "bicubic_antialias"}
CLIP = {"pre_norm": True, "patch_bias": False, "norm_epsilon": 1e-5}
QUICK = CLIP | {"activation": "quick_gelu", "projection": 12}
HF_VIT = {"norm_epsilon": 1e-12, "position_resize": "bicubic"}

# Layout, model, classes, settings that the arrays determine, shapes of some arrays.
CASES = {
    "timm's DINOv2 with registers": (
        "timm", "vit_ti", 0,
        {"layer_scale": 1e-5, "num_registers": 3, "front_position": False},
        {"pos_embed": (1, 16, 16), "reg_token": (1, 3, 16), "blocks.0.ls2.gamma": (16,)},
    ),
    "timm's CLIP": (
        "timm", "vit_ti", 5, CLIP,
        {"norm_pre.weight": (16,), "patch_embed.proj.weight": (16, 3, 8, 8),
         "head.weight": (5, 16)},
    ),
    "DINOv2": (
        "dinov2", "vit_ti", 0, DINO, {"pos_embed": (1, 17, 16), "blocks.0.ls1.gamma": (16,)},
    ),
    "DINOv2 with registers": (
        "dinov2", "vit_ti", 0, DINO | REGISTERS,
        {"pos_embed": (1, 17, 16), "register_tokens": (1, 3, 16)},
    ),
    "CLIP": (
        "clip", "vit_ti", 0, QUICK,
        {"visual.class_embedding": (16,), "visual.positional_embedding": (17, 16),
         "visual.conv1.weight": (16, 3, 8, 8), "visual.proj": (16, 12),
         "visual.transformer.resblocks.0.attn.in_proj_weight": (48, 16),
         "visual.transformer.resblocks.0.mlp.c_fc.weight": (64, 16)},
    ),
    "Google's ViT": (
        "google", "vit_ti", 5, {},
        {"cls": (1, 1, 16), "embedding/kernel": (8, 8, 3, 16), "head/kernel": (16, 5),
         "Transformer/posembed_input/pos_embedding": (1, 17, 16),
         "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel": (16, 2, 8),
         "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/value/bias": (2, 8),
         "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel": (2, 8, 16),
         "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": (16, 64)},
    ),
    "Hugging Face's ViT": (
        "huggingface", "vit_ti", 5, HF_VIT,
        {"embeddings.cls_token": (1, 1, 16), "classifier.weight": (5, 16),
         "encoder.layer.0.attention.attention.key.weight": (16, 16),
         "encoder.layer.0.intermediate.dense.weight": (64, 16)},
    ),
    "Hugging Face's DeiT": (
        "huggingface", "deit_ti", 5, HF_VIT | {"distilled": True},
        {"embeddings.distillation_token": (1, 1, 16), "cls_classifier.bias": (5,),
         "distillation_classifier.weight": (5, 16)},
    ),
    "Hugging Face's DINOv2": (
        "huggingface", "vit_ti", 0, DINO,
        {"encoder.layer.0.layer_scale1.lambda1": (16,), "encoder.layer.0.norm1.weight": (16,),
         "encoder.layer.0.mlp.fc2.weight": (16, 64)},
    ),
    "Hugging Face's DINOv2 with registers": (
        "huggingface", "vit_ti", 0, DINO | REGISTERS, {"embeddings.register_tokens": (1, 3, 16)},
    ),
    "Hugging Face's CLIP": (
        "huggingface", "vit_ti", 0, QUICK | {"position_resize": "bicubic"},
        {"vision_model.pre_layrnorm.weight": (16,), "visual_projection.weight": (12, 16),
         "vision_model.encoder.layers.0.self_attn.v_proj.bias": (16,),
         "vision_model.embeddings.position_embedding.weight": (17, 16)},
    ),
    "Swin's authors": (
        "swin", "swin_t", 5, {"window_size": 6},
        {"layers.0.downsample.reduction.weight": (16, 32), "head.weight": (5, 32),
         "layers.3.blocks.0.attn.relative_position_bias_table": (121, 4)},
    ),
    "Swin v2's authors": (
        "swin", "swinv2_t", 5, {},
        {"layers.2.downsample.norm.weight": (32,), "layers.1.blocks.0.attn.q_bias": (16,),
         "layers.1.blocks.0.attn.cpb_mlp.0.weight": (512, 2)},
    ),
    "Hugging Face's Swin": (
        "huggingface", "swin_t", 5, {"window_size": 6},
        {"encoder.layers.0.downsample.reduction.weight": (16, 32),
         "encoder.layers.2.blocks.0.attention.self.query.weight": (24, 24)},
    ),
    "Hugging Face's Swin v2": (
        "huggingface", "swinv2_t", 0, {},
        {"encoder.layers.2.blocks.0.attention.self.query.bias": (24,),
         "encoder.layers.2.blocks.0.attention.self.logit_scale": (3, 1, 1),
         "encoder.layers.2.blocks.0.attention.self.continuous_position_bias_mlp.2.weight":
             (3, 512)},
    ),
}  # fmt: skip
# Arrays of such files that have no counterpart here.
UNUSED = {
    "dinov2": ("mask_token",),
    "clip": ("positional_embedding", "transformer.resblocks.0.ln_1.weight", "logit_scale"),
    "huggingface": ("pooler.dense.weight", "text_model.final_layer_norm.bias"),
}


def make(name, num_classes, settings):
    family = SWIN if name.startswith("swin") else NARROW | PATCHES
    model = tv.create_model(name, num_classes=num_classes, **family | settings)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), parameter_shapes(model)
    )
    return model, params


@pytest.mark.parametrize("case", CASES)
def test_names_shapes_and_both_directions(case):
    name, model_name, num_classes, settings, shapes = CASES[case]
    model, params = make(model_name, num_classes, settings)
    layout = find_layout(name, model_name)
    arrays = export_weights(params, model, layout)
    assert {key: arrays[key].shape for key in shapes} == shapes
    assert len(arrays) >= len(jax.tree.leaves(params))
    file = arrays | {key: np.ones((2, 2), np.float32) for key in UNUSED.get(name, ())}
    assert recognise_layout(file, model_name) == name
    assert layout.num_classes(file) == num_classes
    found = layout.model_overrides(file)
    patches = {} if model_name.startswith("swin") else PATCHES
    assert settings | patches == {key: found[key] for key in settings | patches}
    # What else the arrays tell are the values of the model.
    assert all(getattr(model.settings, key) == value for key, value in found.items())
    jax.tree.map(np.testing.assert_array_equal, import_weights(file, model, layout), params)
    # Arrays without axes are no reason for another error than that they do not fit.
    scalars = {key: np.zeros((), np.float32) for key in layout.prepare(file)}
    read = {**model.settings.__dict__, **layout.model_overrides(scalars)}
    assert type(model.settings)(**read).num_classes == num_classes
    assert layout.num_classes(scalars) == 0
    layout.config_entries(scalars), layout.assumed(scalars)


def test_three_arrays_become_one():
    """Queries, keys and values are in this order, and transposed."""
    model, _ = make("vit_ti", 0, HF_VIT)
    layout = LAYOUTS["huggingface"]["vit"]
    params = make("vit_ti", 0, HF_VIT)[1]
    arrays = export_weights(params, model, layout)
    qkv = params["blocks_0"]["attention"]["qkv"]
    for i, part in enumerate(("query", "key", "value")):
        name = f"encoder.layer.0.attention.attention.{part}"
        columns = slice(16 * i, 16 * i + 16)
        np.testing.assert_array_equal(arrays[f"{name}.weight"].T, qkv["kernel"][:, columns])
        np.testing.assert_array_equal(arrays[f"{name}.bias"], qkv["bias"][columns])
    google = export_weights(params, model, LAYOUTS["google"]["vit"])
    name = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
    # Head 1 of the keys: columns 8 to 15 of the second third.
    np.testing.assert_array_equal(google[f"{name}/key/kernel"][:, 1], qkv["kernel"][:, 24:32])
    kernel = params["blocks_0"]["attention"]["proj"]["kernel"]
    np.testing.assert_array_equal(google[f"{name}/out/kernel"][1], kernel[8:])
    del arrays["encoder.layer.0.attention.attention.key.bias"]
    with pytest.raises(UserError, match=r"1 entry .*attention\.key\.bias is missing"):
        import_weights(arrays, model, layout)


def test_names_of_hugging_face_may_begin_with_the_model():
    model, params = make("vit_ti", 5, HF_VIT)
    layout = LAYOUTS["huggingface"]["vit"]
    arrays = export_weights(params, model, layout)
    long = {k if "classifier" in k else f"vit.{k}": array for k, array in arrays.items()}
    assert recognise_layout(long, "vit_ti") == "huggingface"
    found = import_weights(layout.prepare(long), model, layout)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def v2_buffers(name, sides, units=None):
    """Returns the arrays of Swin v2's files that tell windows, and windows of the pretraining."""
    arrays = {}
    for stage, side in enumerate(sides):
        prefix = name.format(stage)
        arrays[f"{prefix}.relative_position_index"] = np.zeros((side**2, side**2), np.int64)
        if units:
            offset = np.arange(1 - side, side) / (units[stage] - 1) * 8
            table = np.sign(offset) * np.log2(np.abs(offset) + 1) / np.log2(8)
            grid = np.stack(np.meshgrid(table, table, indexing="ij"), -1)[None]
            arrays[f"{prefix}.relative_coords_table"] = grid.astype(np.float32)
    return arrays


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("timm", "layers.{}.blocks.0.attn"),
        ("swin", "layers.{}.blocks.0.attn"),
        ("huggingface", "encoder.layers.{}.blocks.0.attention.self"),
    ],
)
def test_windows_of_swin_v2(name, attention):
    layout = LAYOUTS[name]["swinv2"]
    logit = {f"{attention.format(0)}.logit_scale": np.zeros((1, 1, 1))}
    assert layout.assumed(logit) == ("window_size", "pretrained_window_sizes")
    for sides, units, size in (
        ((16, 16, 16, 8), None, 256),
        ((16, 16, 16, 8), (12, 12, 12, 6), 256),
        ((24, 24, 24, 12), (12, 12, 12, 6), 384),
    ):
        arrays = logit | v2_buffers(attention, sides, units)
        found = layout.model_overrides(arrays)
        expected = {"window_size": sides[0], "pretrained_window_sizes": units or sides}
        assert found == expected
        model = tv.create_model("swinv2_t", **found)
        assert layout.image_size(model, arrays) == size
        assert layout.assumed(arrays) == ()


@pytest.mark.parametrize(
    ("names", "model", "message"),
    [
        (
            [f"vit.encoder.layer.{i}.attention.weight" for i in range(200)], "vit_ti",
            r"its 200 arrays \(vit\.encoder\.layer\.0\.attention\.weight, .*\) fit no layout of "
            r"vit_ti; the nearest is --layout=",
        ),
        (
            ["patch_embed.norm.weight", "layers.0.blocks.0.attn.qkv.weight"], "swin_t",
            r"nearest is --layout=timm, which has layers\.0\.blocks\.0\.attn\.relative_.*; valid",
        ),
        (["a"], "dgt_t", "no layout has the model 'dgt_t'; valid: vit, deit, swin, swinv2"),
    ],
)  # fmt: skip
def test_file_without_a_layout(names, model, message):
    with pytest.raises(UserError, match=message) as error:
        recognise_layout({name: np.zeros(2) for name in names}, model)
    assert len(str(error.value)) < 400


def test_gated_mlps_are_refused():
    for layout, name in (
        ("timm", "blocks.0.mlp.w12.weight"),
        ("dinov2", "blocks.0.mlp.w12.weight"),
        ("huggingface", "encoder.layer.0.mlp.weights_in.weight"),
    ):
        with pytest.raises(UserError, match=r"mlp\.w.*gated MLP \(SwiGLU\) are not supported"):
            LAYOUTS[layout]["vit"].model_overrides({name: np.zeros((4, 4))})


def test_pre_logits_leave_the_classifier_out():
    layout = LAYOUTS["google"]["vit"]
    arrays = {"head/kernel": np.zeros((16, 5)), "cls": np.zeros((1, 1, 16))}
    assert layout.num_classes(layout.prepare(arrays)) == 5
    arrays["pre_logits/kernel"] = np.zeros((16, 16))
    assert layout.prepare(arrays).keys() == {"cls"}


def test_values_that_are_no_weights_are_refused():
    model, params = make("vit_ti", 5, {})
    layout = LAYOUTS["timm"]["vit"]
    arrays = export_weights(params, model, layout)
    for value, message in (
        (np.full(16, np.nan, np.float32), "has values that are not finite"),
        (np.full(16, -np.inf, np.float64), "has values that are not finite"),
        (np.ones(16, np.int8), "has the type int8, expected floating-point numbers"),
        (np.ones(16, bool), "has the type bool, expected"),
    ):
        with pytest.raises(UserError, match=f"1 entry .*: norm.weight {message}"):
            import_weights(arrays | {"norm.weight": value}, model, layout)
    extra = {f"extra.{i}": np.zeros(1) for i in range(100)}
    with pytest.raises(UserError, match=r"^100 entries .*extra\.9 .*; and 90 more$"):
        import_weights(arrays | extra, model, layout)
    for dtype in (np.float16, jnp.bfloat16):
        half = {name: array.astype(dtype) for name, array in arrays.items()}
        assert import_weights(half, model, layout)["norm"]["scale"].dtype == np.float32


BLOCK = "layers.{}.blocks.{}"
SIMILAR = {  # models -> some names in their files, number of blocks per stage, width
    ("deit_s", "vit_s"): (
        ["pos_embed", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"],
        ("blocks.{1}.norm1.weight", "blocks.{1}.norm2.weight", "blocks.{1}.ls1.gamma"), (12,), 384,
    ),
    ("vit_b",): (
        ["embedding/kernel"],
        ("Transformer/encoderblock_{1}/LayerNorm_0/scale",
         "Transformer/encoderblock_{1}/LayerNorm_2/scale"), (12,), 768,
    ),
    ("deit_b", "vit_b"): (
        ["encoder.layer.0.attention.attention.query.weight",
         "embeddings.patch_embeddings.projection.weight"],
        ("encoder.layer.{1}.layernorm_before.weight",), (12,), 768,
    ),
    ("swin_s",): (
        ["layers.3.downsample.norm.weight", "patch_embed.norm.weight", "patch_embed.proj.weight"],
        (f"{BLOCK}.norm1.weight", f"{BLOCK}.attn.qkv.weight",
         f"{BLOCK}.attn.relative_position_bias_table"), (2, 2, 18, 2), 96,
    ),
    ("swinv2_t",): (
        ["layers.0.downsample.norm.weight", "patch_embed.norm.weight", "patch_embed.proj.weight"],
        (f"{BLOCK}.norm1.weight", f"{BLOCK}.attn.qkv.weight", f"{BLOCK}.attn.logit_scale",
         f"{BLOCK}.attn.cpb_mlp.0.weight", f"{BLOCK}.attn.cpb_mlp.2.weight"), (2, 2, 6, 2), 96,
    ),
}  # fmt: skip


@pytest.mark.parametrize("models", SIMILAR, ids="-".join)
def test_models_that_a_file_may_belong_to(models):
    names, of_blocks, depths, width = SIMILAR[models]
    blocks = [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]
    arrays = {name.format(*block): np.ones(1) for name in of_blocks for block in blocks}
    kernel = (16, 16, 3, width) if names[-1].endswith("kernel") else (width, 3, 16, 16)
    arrays |= dict.fromkeys(names, np.ones(1)) | {names[-1]: np.broadcast_to(1, kernel)}
    assert similar_models(arrays) == list(models)
    assert similar_models(arrays | {names[-1]: np.ones((100, 3, 16, 100))}) == []


def test_classifier_is_left_out():
    model, params = make("vit_ti", 5, {})
    layout = LAYOUTS["timm"]["vit"]
    arrays = export_weights(params, model, layout)
    found = import_weights(arrays, model.clone(num_classes=0), layout)
    del params["classifier"]
    jax.tree.map(np.testing.assert_array_equal, found, params)
