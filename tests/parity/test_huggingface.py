"""Networks of Hugging Face's transformers with random weights, from files that it writes."""

import jax
import numpy as np
import pytest

import tokenvit_jax as tv
from tokenvit_jax.weights import (
    LAYOUTS,
    export_weights,
    import_weights,
    read_arrays,
    recognise_layout,
)

pytestmark = pytest.mark.parity

WIDTH = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8,
    "image_size": 32,
}  # fmt: skip
NARROW = {"dim": 32, "depth": 2, "num_heads": 4}
SWIN = {
    "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 4,
    "image_size": 128,
}  # fmt: skip
NARROW_SWIN = {
    "dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8), "depths": (1, 1, 2, 1),
}  # fmt: skip
WINDOWS = {"window_size": 4, "pretrained_window_sizes": (4, 4, 4, 4)}  # not in the file
# Class and configuration there, their values; model here and its settings that no array tells.
CASES = {
    "vit": ("ViTForImageClassification", "ViTConfig", WIDTH | {"intermediate_size": 128},
            "vit_ti", NARROW),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig",
             WIDTH | {"intermediate_size": 128}, "deit_ti", NARROW),
    "dinov2": ("Dinov2Model", "Dinov2Config", WIDTH, "vit_ti", NARROW),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", WIDTH,
                              "vit_ti", NARROW),
    "clip": ("CLIPVisionModelWithProjection", "CLIPVisionConfig",
             WIDTH | {"intermediate_size": 128, "projection_dim": 24}, "vit_ti", NARROW),
    "swin": ("SwinForImageClassification", "SwinConfig", SWIN, "swin_t", NARROW_SWIN),
    "swinv2": ("Swinv2ForImageClassification", "Swinv2Config", SWIN,
               "swinv2_t", NARROW_SWIN | WINDOWS),
}  # fmt: skip


def build(transformers, kind, name, config, values):
    import importlib

    import torch

    torch.manual_seed(0)
    folder = f"transformers.models.{kind}"
    config = getattr(importlib.import_module(f"{folder}.configuration_{kind}"), config)
    cls = getattr(importlib.import_module(f"{folder}.modeling_{kind}"), name)
    peer = cls(config(**values)).eval()
    for parameter in peer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return peer


@pytest.mark.parametrize("kind", CASES)
def test_outputs(transformers, tmp_path, kind):
    import torch

    name, config, values, ours, settings = CASES[kind]
    peer = build(transformers, kind, name, config, values)
    peer.save_pretrained(tmp_path)
    arrays = read_arrays(tmp_path / "model.safetensors")
    assert recognise_layout(arrays, ours) == "huggingface"
    layout = LAYOUTS["huggingface"][ours.split("_")[0]]
    arrays = layout.prepare(arrays)
    model = tv.create_model(
        ours, num_classes=layout.num_classes(arrays), **layout.model_overrides(arrays) | settings
    )
    params = import_weights(arrays, model, layout)
    back = export_weights(params, model, layout)
    assert back.keys() <= arrays.keys()
    for key, array in back.items():
        np.testing.assert_array_equal(array, arrays[key], err_msg=key)

    resized = {} if "swin" in kind else {"interpolate_pos_encoding": True}
    for size in ((32, 32), (32, 64)) if resized else ((128, 128),):
        images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        options = {} if kind.startswith("dinov2") else resized
        with torch.inference_mode():
            output = peer(x, **options)
        found = jax.jit(model.apply)({"params": params}, images)
        expected = next(
            output[key] for key in ("logits", "image_embeds", "pooler_output") if key in output
        )
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
