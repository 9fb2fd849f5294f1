"""ViT and DeiT with random weights: compares blocks and logits with timm."""

import functools

import jax
import numpy as np
import pytest

import tokenvit_jax as tv
from tokenvit_jax.models.vit import resize_positions
from tokenvit_jax.weights import (
    LAYOUTS,
    export_weights,
    import_weights,
    recognise_layout,
)

pytestmark = pytest.mark.parity

LAYOUT = LAYOUTS["timm"]["vit"]
CASES = [
    ("deit_tiny_patch16_224", "deit_ti", {}),
    ("deit_tiny_distilled_patch16_224", "deit_ti", {}),
    ("vit_tiny_patch16_224", "vit_ti", {"global_pool": "avg"}),
    ("vit_small_patch32_224", "vit_s", {}),
    ("vit_small_patch8_224", "vit_s", {"depth": 2}),
]


@pytest.mark.parametrize(("theirs", "ours", "settings"), CASES, ids=[case[0] for case in CASES])
def test_blocks_and_logits(timm, theirs, ours, settings):
    import torch

    torch.manual_seed(0)
    peer = timm.create_model(
        theirs, num_classes=10, dynamic_img_size=True, dynamic_img_pad=True, **settings
    ).eval()
    for parameter in peer.parameters():  # LayerNorms and biases too
        parameter.data += 0.02 * torch.randn_like(parameter)
    arrays = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    depth = {"depth": settings["depth"]} if "depth" in settings else {}
    model = tv.create_model(ours, num_classes=10, **LAYOUT.model_overrides(arrays), **depth)

    params = import_weights(arrays, model, LAYOUT)
    assert export_weights(params, model, LAYOUT).keys() == arrays.keys()

    blocks = []
    for block in peer.blocks:
        block.register_forward_hook(lambda module, inputs, output: blocks.append(output))
    # The trained size; another one; one that must be padded to whole patches.
    for size in ((224, 224), (160, 256), (230, 250)):
        images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
        blocks.clear()
        with torch.inference_mode():
            expected = peer(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        logits, noted = jax.jit(
            lambda x: model.apply(
                {"params": params}, x, train=False, mutable=["intermediates"],
                capture_intermediates=lambda module, _: "blocks_" in str(module.name),
            )
        )(images)  # fmt: skip
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        for i, block in enumerate(blocks):
            ((found, _),) = noted["intermediates"][f"blocks_{i}"]["__call__"]
            np.testing.assert_allclose(found, block.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("theirs", "overrides"),
    [
        ("vit_small_patch14_dinov2", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_base_patch16_clip_224", {}),
        ("vit_base_patch16_clip_quickgelu_224", {"activation": "quick_gelu"}),
    ],
)
def test_layer_scale_registers_and_clip(timm, theirs, overrides):
    """DINOv2 with layer scale and registers, CLIP with pre-norm, quick GELU and no patch bias."""
    import torch

    torch.manual_seed(0)
    narrow = {"embed_dim": 48, "depth": 2, "num_heads": 4}
    size = 5 * (14 if "14" in theirs else 16)
    peer = timm.create_model(theirs, img_size=size, dynamic_img_size=True, num_classes=10, **narrow)
    for parameter in peer.eval().parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    arrays = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    assert recognise_layout(arrays, "vit_s") == "timm"
    settings = LAYOUT.model_overrides(arrays) | {"dim": 48, "depth": 2, "num_heads": 4}
    model = tv.create_model("vit_s", num_classes=10, **settings | overrides)
    params = import_weights(arrays, model, LAYOUT)
    back = export_weights(params, model, LAYOUT)
    assert back.keys() == arrays.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    step = size // 5
    for shape in ((size, size), (4 * step, 7 * step)):
        images = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        with torch.inference_mode():
            expected, tokens = peer(x).numpy(), peer.forward_features(x).numpy()
        logits = jax.jit(model.apply)({"params": params}, images)
        features = jax.jit(functools.partial(model.apply, method="features"))
        (found,) = features({"params": params}, images)
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        patches = tokens[:, model.settings.num_front :].reshape(found.shape)
        np.testing.assert_allclose(found, patches, atol=1e-4)


@pytest.mark.parametrize("old", [(7, 5), (4, 4)])
def test_bicubic_resize_of_torch(timm, old):
    """Positions are resized with antialiasing or without it."""
    import torch

    x = np.random.default_rng(0).normal(size=(*old, 3)).astype(np.float32)
    position = np.concatenate([np.ones((1, 3), np.float32), x.reshape(-1, 3)])
    for new in ((16, 9), (3, 4), (7, 2)):
        for antialias, method in ((False, "bicubic"), (True, "bicubic_antialias")):
            expected = torch.nn.functional.interpolate(
                torch.from_numpy(x).permute(2, 0, 1)[None], new, mode="bicubic", antialias=antialias
            )
            found = resize_positions(position, 1, old, new, method)
            np.testing.assert_array_equal(found[0], position[0])
            expected = expected[0].permute(1, 2, 0).reshape(-1, 3)
            np.testing.assert_allclose(found[1:], expected, atol=1e-5)
