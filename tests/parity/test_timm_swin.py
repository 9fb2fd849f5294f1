"""Swin and Swin v2 with random weights: compares blocks, maps and logits with timm."""

import jax
import numpy as np
import pytest

import tokenvit_jax as tv
from tokenvit_jax.weights import LAYOUTS, export_weights, import_weights

pytestmark = pytest.mark.parity


def randomize(peer):
    """Changes all parameters, including LayerNorms that start at 0; returns the arrays."""
    import torch

    torch.manual_seed(0)
    for name, parameter in peer.named_parameters():
        if "norm" in name:
            parameter.data.copy_(torch.rand_like(parameter))
        elif "logit_scale" in name:
            parameter.data += 2 * torch.randn_like(parameter)  # some exceed the limit
        else:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return {name: tensor.numpy() for name, tensor in peer.eval().state_dict().items()}


def import_all(family, arrays, model):
    """Returns the parameters, and checks that exporting them gives the arrays again."""
    layout = LAYOUTS["timm"][family]
    params = import_weights(arrays, model, layout)
    back = export_weights(params, model, layout)
    assert back.keys() == arrays.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    return params


def compare(peer, model, params, size, batch=2):
    import torch

    blocks = []
    handles = [
        block.register_forward_hook(lambda module, inputs, output: blocks.append(output))
        for stage in peer.layers
        for block in stage.blocks
    ]
    images = np.random.default_rng(0).normal(size=(batch, *size, 3)).astype(np.float32)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = peer(x).numpy()
        found_blocks = list(blocks)
        maps = peer.forward_intermediates(x, intermediates_only=True)
    for handle in handles:
        handle.remove()

    @jax.jit
    def run(x):
        return model.apply(
            {"params": params}, x, train=False, mutable=["intermediates"],
            capture_intermediates=lambda module, method: (
                method == "__call__" and str(module.name).startswith("stages_")
            ),
        )  # fmt: skip

    logits, noted = run(images)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    depths = model.settings.depths
    names = [f"stages_{s}_{b}" for s, depth in enumerate(depths) for b in range(depth)]

    for name, block in zip(names, found_blocks, strict=True):
        found = noted["intermediates"][name]["__call__"][0]
        np.testing.assert_allclose(found, block.numpy(), atol=1e-4, err_msg=name)
    ends = np.cumsum(depths) - 1
    for end, expected in zip(ends, maps, strict=True):  # the maps that `features` returns
        found = noted["intermediates"][names[end]]["__call__"][0]
        np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1).numpy(), atol=1e-4)


FAMILIES = pytest.mark.parametrize("family", ["swin", "swinv2"])


def build(timm, family, **settings):
    name = {"swin": "SwinTransformer", "swinv2": "SwinTransformerV2"}[family]
    return getattr(timm.models, name)(num_classes=10, embed_dim=24, num_heads=(2, 4), **settings)


def ours(family, **settings):
    dims = {"dims": (24, 48), "num_heads": (2, 4)}
    return tv.create_model(f"{family}_t", num_classes=10).clone(**dims, **settings)


@FAMILIES
@pytest.mark.parametrize(
    ("depths", "sizes"),
    [
        ((2, 2), [(64, 64), (96, 128)]),
        # Maps that windows do not divide. timm shifts maps before it pads them, and its mask
        # ignores the shifted positions: only blocks without a shift agree.
        ((1, 1), [(68, 100)]),
    ],
)
def test_small_networks(timm, family, depths, sizes):
    settings = {"depths": depths, "window_size": 4}
    if family == "swinv2":
        settings["pretrained_window_sizes"] = (6, 3)
    peer = build(timm, family, img_size=64, strict_img_size=False, **settings)
    arrays, model = randomize(peer), ours(family, **settings)
    params = import_all(family, arrays, model)
    for size in sizes:
        compare(peer, model, params, size)


@FAMILIES
def test_windows_larger_than_maps(timm, family):
    """Maps of 8 x 16 and 4 x 8 have shifts in only one direction, and windows of 4 x 8."""
    settings = {"depths": (2, 2), "window_size": 8}
    if family == "swinv2":
        settings["pretrained_window_sizes"] = (8, 8)
    peer = build(timm, family, img_size=(32, 64), **settings)
    arrays, model = randomize(peer), ours(family, **settings)
    for block in range(2 * (family == "swin")):
        # timm's table holds only the offsets that occur.
        name = f"layers.1.blocks.{block}.attn.relative_position_bias_table"
        table = np.random.default_rng(block).normal(size=(15, 15, 4)).astype(np.float32)
        table[4:-4] = arrays[name].reshape(7, 15, 4)
        arrays[name] = table.reshape(-1, 4)
    compare(peer, model, import_all(family, arrays, model), (32, 64))


@pytest.mark.parametrize(
    ("theirs", "name", "size"),
    [("swin_tiny_patch4_window7_224", "swin_t", 224), ("swinv2_tiny_window8_256", "swinv2_t", 256)],
)
def test_published_networks(timm, theirs, name, size):
    peer = timm.create_model(theirs)
    arrays, family = randomize(peer), name.split("_")[0]
    layout = LAYOUTS["timm"][family]
    model = tv.create_model(name, **layout.model_overrides(arrays))
    assert model == tv.create_model(name)
    assert layout.image_size(model, arrays) == size
    compare(peer, model, import_all(family, arrays, model), (size, size), batch=1)
