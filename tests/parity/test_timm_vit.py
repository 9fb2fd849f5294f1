"""ViT and DeiT with random weights: compares blocks and logits with timm."""

import pathlib

import jax
import numpy as np
import pytest

import tokenvit_jax as tv
from tokenvit_jax.errors import UserError
from tokenvit_jax.weights import LAYOUTS, export_weights, import_weights, read_arrays

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


def test_files_of_torch(timm, tmp_path):
    """Files may hold arrays directly or inside "model"; other pickled objects are refused."""
    import torch

    arrays = {"cls_token": torch.randn(1, 1, 3), "half": torch.randn(2).half()}
    for content in (arrays, {"model": arrays, "epoch": 3}):
        torch.save(content, tmp_path / "weights.pth")
        found = read_arrays(tmp_path / "weights.pth")
        assert found.keys() == arrays.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, arrays[name].float().numpy())
            assert array.dtype == np.float32
    torch.save({"model": arrays, "config": pathlib.Path("a")}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth is refused: it holds more than arrays"):
        read_arrays(tmp_path / "weights.pth")
