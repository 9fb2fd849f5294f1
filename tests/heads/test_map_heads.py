"""Heads on maps against mmsegmentation's, in training and evaluation, and their blocks in float64.

The arrays in `golden` are of UPerHead, FCNHead, FPN and FPNHead of mmsegmentation 1.x with random
weights, without dropout: logits, the loss, and running statistics after a step. The images have
72 x 104 pixels, so that maps at strides 16 and 32 are rounded up to 5 x 7 and 3 x 4 cells.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tokenvit_jax.heads import FcnHead, SemanticFpn, UperNet
from tokenvit_jax.heads.upernet import POOL_SIDES
from tokenvit_jax.layers import ChannelDropout, ConvModule
from tokenvit_jax.ops import resize_bilinear
from tokenvit_jax.tasks.segmentation.losses import pixel_cross_entropy

SIZE = (72, 104)
UPERNET = UperNet(7, channels=10, dropout=0.0)
FCN = FcnHead(7, channels=9, dropout=0.0)
FPN = SemanticFpn(7, channels=11, neck_channels=14, dropout=0.0)
# File of arrays, head, and the factor of its loss.
CASES = [("upernet", UPERNET, 1.0), ("fcn_aux", FCN, 0.4), ("semantic_fpn", FPN, 1.0)]

# Pattern of mmsegmentation's names -> our module.
MODULES = [
    (r"psp_modules\.(\d)\.1", lambda i: f"pool_{POOL_SIDES[i]}"),
    (r"(?:neck\.)?lateral_convs\.(\d)", lambda i: f"lateral_{i + 1}"),
    (r"neck\.fpn_convs\.(\d)", lambda i: f"output_{i + 1}"),
    (r"fpn_convs\.(\d)", lambda i: f"fpn_{i + 1}"),
    (r"scale_heads\.(\d)\.(\d)", lambda i, j: f"scale_{i + 1}_{j // 2 + 1}"),
    ("fpn_bottleneck", lambda: "fusion"),
    ("bottleneck", lambda: "bottleneck"),
    (r"convs\.0", lambda: "convolution"),
    ("conv_seg", lambda: "classifier"),
]
ARRAYS = {"running_mean": "mean", "running_var": "var", "bias": "bias"}


def ours(name, array):
    """Returns the path and the array of one of mmsegmentation's variables in this project."""
    name = re.sub(r"^(decode|auxiliary)_head\.", "", name)
    module = next(
        f"{make(*map(int, found.groups()))}{name[found.end() :]}"
        for pattern, make in MODULES
        if (found := re.match(pattern, name))
    )
    *path, kind = module.split(".")
    if "bn" in path:
        path = ["norm" if part == "bn" else part for part in path]
        kind = "scale" if kind == "weight" else ARRAYS[kind]
    else:
        path = path[:1] if name.startswith("neck") else path  # no BatchNorm: "conv" is all
        kind, array = ("kernel", array.transpose(2, 3, 1, 0)) if kind == "weight" else (kind, array)
    collection = "batch_stats" if kind in ("mean", "var") else "params"
    return (collection, *path, kind), array


@functools.cache
def golden(name):
    arrays = dict(np.load(Path(__file__).parent / "golden" / f"{name}_72x104.npz"))
    maps = [arrays[f"in/{i}"].transpose(0, 2, 3, 1) for i in range(4) if f"in/{i}" in arrays]
    pick = lambda start: unflatten_dict(  # noqa: E731
        dict(ours(k.removeprefix(start), v) for k, v in arrays.items() if k.startswith(start))
    )
    return arrays, maps if len(maps) > 1 else maps[0], pick("w/"), pick("after_train_step_")


@pytest.mark.parametrize(("name", "head", "weight"), CASES)
def test_a_head_equals_mmsegmentation(name, head, weight):
    arrays, maps, variables, after = golden(name)

    @jax.jit
    def run(variables):
        logits = head.apply(variables, maps, train=False)
        trained, state = head.apply(variables, maps, train=True, mutable=["batch_stats"])
        to_pixels = functools.partial(resize_bilinear, size=SIZE)
        return logits, trained, state, pixel_cross_entropy(logits, arrays["labels"], to_pixels)

    logits, trained, state, loss = run(variables)
    near = functools.partial(np.testing.assert_allclose, rtol=2e-5)
    for found, expected in ((logits, arrays["out_eval"]), (trained, arrays["out_train"])):
        near(found, expected.transpose(0, 2, 3, 1), atol=2e-6 * np.abs(expected).max())
    near(weight * loss, arrays["loss/loss_ce"])
    for path, expected in flatten_dict(after).items():  # the running variance is unbiased
        near(flatten_dict(state)[path], expected, atol=1e-6)


def naive_conv_module(x, kernel, scale, bias, mean, var):
    """Computes convolution, BatchNorm with given statistics, and ReLU in float64."""
    side = len(kernel)
    x = np.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)))
    height, width = x.shape[1] - side + 1, x.shape[2] - side + 1
    y = np.zeros((len(x), height, width, kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            patch = x[:, i : i + side, j : j + side]
            y[:, i, j] = np.einsum("bijc,ijcd->bd", patch, kernel)
    mean, var = (y.mean((0, 1, 2)), y.var((0, 1, 2))) if mean is None else (mean, var)
    return np.maximum((y - mean) / np.sqrt(var + 1e-5) * scale + bias, 0), y


@pytest.mark.parametrize("side", [1, 3])
def test_convolution_with_batch_norm_equals_its_equations(side):
    draw = np.random.default_rng(side).normal
    x, kernel = draw(size=(2, 4, 3, 5)), draw(size=(side, side, 5, 6))
    scale, bias, mean = draw(size=(3, 6))
    var = draw(size=6) ** 2
    module = ConvModule(6, side)
    variables = {
        "params": {"conv": {"kernel": kernel}, "norm": {"scale": scale, "bias": bias}},
        "batch_stats": {"norm": {"mean": mean, "var": var}},
    }
    variables, x32 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (variables, x))
    found = module.apply(variables, x32, train=False)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    near(found, naive_conv_module(x, kernel, scale, bias, mean, var)[0])
    found, state = module.apply(variables, x32, train=True, mutable="batch_stats")
    expected, y = naive_conv_module(x, kernel, scale, bias, None, None)
    near(found, expected)
    running = state["batch_stats"]["norm"]
    near(running["mean"], 0.9 * mean + 0.1 * y.mean((0, 1, 2)))
    near(running["var"], 0.9 * var + 0.1 * y.var((0, 1, 2), ddof=1))  # as PyTorch


def test_one_value_per_channel_has_a_finite_running_variance():
    x, module = jnp.ones((1, 1, 1, 2)), ConvModule(3, 1)
    zero, one = jnp.zeros(3), jnp.ones(3)
    variables = {
        "params": {
            "conv": {"kernel": jnp.ones((1, 1, 2, 3))},
            "norm": {"scale": one, "bias": zero},
        },
        "batch_stats": {"norm": {"mean": zero, "var": one}},
    }
    state = module.apply(variables, x, train=True, mutable="batch_stats")[1]
    np.testing.assert_allclose(state["batch_stats"]["norm"]["var"], 0.9)


def test_channel_dropout_drops_channels_of_images():
    x = jnp.ones((50, 3, 2, 40))
    y = ChannelDropout(0.25).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], x.shape))
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    assert abs(np.mean(y == 0) - 0.25) < 0.05
    np.testing.assert_array_equal(ChannelDropout(0.25).apply({}, x, train=False), x)


def test_first_weights_of_classifiers():
    head = FcnHead(100, channels=200, init_std=0.3)
    variables = head.init(jax.random.key(0), jnp.ones((1, 1, 1, 2)), train=False)
    kernel = variables["params"]["classifier"]["kernel"]
    np.testing.assert_allclose(kernel.std(), 0.3, rtol=0.02)
