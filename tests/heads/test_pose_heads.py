"""Heads for heat maps: TCFormer's arrays, transposed convolutions by definition, and counts."""

import dataclasses
import functools
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_counts import EXACT
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from sampled import sampled

import tokenvit_jax as tv
from experiments.pose.published import KEYPOINTS, REPORTED, layer_macs
from tokenvit_jax.errors import UserError
from tokenvit_jax.heads import DeconvHead, MtaHead
from tokenvit_jax.heads.pose import Deconvolution, PooledAttention, double
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.models.settings import rules_of

ARRAYS = dict(np.load(Path(__file__).parent / "golden" / "pose_mta_neck.npz"))
MTA = MtaHead(9, channels=16, num_heads=2)

# Pattern of TCFormer's names -> our path.
NAMES = [
    (r"neck\.lateral_convs\.(\d)\.conv\.", lambda i: f"lateral_{int(i) + 1}/"),
    (r"neck\.merge_blocks\.(\d)\.", lambda i: f"block_{int(i) + 1}/"),
    (r"keypoint_head\.final_layer\.", lambda: "heatmaps/"),
]


def ours(name, array):
    """Yields paths and arrays of this project for one of TCFormer's arrays."""
    pattern, make = next(pair for pair in NAMES if re.match(pair[0], name))
    found = re.match(pattern, name)
    path = make(*found.groups()) + name[found.end() :].replace(".", "/")
    path = path.replace("attn/", "attention/").replace("mlp/", "").replace("dwconv", "depthwise")
    if path.endswith("depthwise/skip/weight"):
        yield path.replace("depthwise/skip/weight", "skip"), array.ravel()
        return
    is_norm = "norm" in path
    path = path.replace("weight", "scale" if is_norm else "kernel")
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
        array = array[:, :, 0] if "depthwise" in path else array
    elif array.ndim == 2:
        array = array.T
    if "/kv/" in path:
        for part, half in zip("kv", np.split(array, 2, -1), strict=True):
            yield path.replace("/kv/", f"/{part}/"), half
    else:
        yield path, array


@functools.cache
def params():
    weights = {k.removeprefix("w:"): x for k, x in ARRAYS.items() if k.startswith("w:")}
    flat = dict(pair for name, array in weights.items() for pair in ours(name, array))
    shapes = jax.eval_shape(lambda: MTA.init(jax.random.key(0), maps(), train=False))["params"]
    expected = {path: x.shape for path, x in flatten_dict(shapes, sep="/").items()}
    assert {path: x.shape for path, x in flat.items()} == expected
    return unflatten_dict(flat, sep="/")


def maps():
    return [ARRAYS[f"stage{i}"] for i in range(4)]


class Neck(MtaHead):
    """The levels alone."""

    @nn.compact
    def __call__(self, maps):
        return self.levels(maps)


def test_neck_and_head_equal_tcformers():
    found = jax.jit(MTA.apply, static_argnames="train")({"params": params()}, maps(), train=False)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, ARRAYS["heatmaps"], atol=5e-5)

    for level, x in enumerate(
        Neck(9, channels=16, num_heads=2).apply({"params": params()}, maps())
    ):
        np.testing.assert_allclose(x, ARRAYS[f"out{level}"], atol=5e-5)


@pytest.mark.parametrize("side", [2, 4])
def test_averages_over_squares(side):
    x = np.random.default_rng(0).normal(size=(2, 8, 12, 5)).astype(np.float32)
    found = PooledAttention(1, side)._shrink(x, False)
    assert found.shape == (2, 8 // side, 12 // side, 5)
    for i, j in np.ndindex(found.shape[1:3]):
        cells = x[:, i * side : (i + 1) * side, j * side : (j + 1) * side]
        np.testing.assert_allclose(found[:, i, j], np.float64(cells).mean((1, 2)), atol=1e-6)


def naive_transposed(x, kernel):
    """Adds every pixel times the turned kernel to the 4 x 4 pixels around it, in float64."""
    batch, height, width, _ = x.shape
    padded = np.zeros((batch, 2 * height + 2, 2 * width + 2, kernel.shape[-1]))
    for i, j in np.ndindex(height, width):
        patch = np.einsum("bc,yxcd->byxd", np.float64(x[:, i, j]), kernel[::-1, ::-1])
        padded[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += patch
    return padded[:, 1:-1, 1:-1]


def test_transposed_convolution():
    draw = np.random.default_rng(0).normal
    x = draw(size=(2, 3, 5, 4)).astype(np.float32)
    module = Deconvolution(6)
    variables = module.init(jax.random.key(0), x, False)
    kernel = draw(size=(4, 4, 4, 6)).astype(np.float32)
    variables = {**variables, "params": {**variables["params"], "kernel": kernel}}
    expected = naive_transposed(x, kernel) / np.sqrt(1 + 1e-5)  # BatchNorm at the start
    found = module.apply(variables, x, False)
    np.testing.assert_allclose(found, np.maximum(expected, 0), atol=2e-5)
    # In training, with the statistics of the batch.
    trained, state = module.apply(variables, x, True, mutable=["batch_stats"])
    raw = naive_transposed(x, kernel)
    normal = (raw - raw.mean((0, 1, 2))) / np.sqrt(raw.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(trained, np.maximum(normal, 0), atol=2e-5)
    np.testing.assert_allclose(
        state["batch_stats"]["norm"]["mean"], 0.1 * raw.mean((0, 1, 2)), atol=1e-5
    )


def test_gradient_of_the_transposed_convolution():
    """That of a convolution with zeros between the pixels."""
    draw = np.random.default_rng(0).normal
    x, kernel = draw(size=(2, 3, 5, 4)), draw(size=(4, 4, 4, 6))
    probe = draw(size=(2, 6, 10, 6))

    def dilated(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), ((2, 2), (2, 2)), lhs_dilation=(2, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    inputs = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    grads = [
        jax.jit(jax.grad(lambda *x, f=f: (probe * f(*x)).sum(), (0, 1)))(*inputs)
        for f in (double, dilated)
    ]
    for one, two in zip(*grads, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-4)


@pytest.mark.parametrize("head", sampled([DeconvHead(9, channels=16), MTA]))
def test_gradients_reach_every_parameter(head):
    variables = head.init(jax.random.key(0), maps(), train=False)
    variables = jax.tree.map(lambda x: x + 0.1, variables)

    def loss(params):
        found, _ = head.apply(
            {**variables, "params": params}, maps(), train=True, mutable=["batch_stats"]
        )
        return ((found - 1) ** 2).mean()

    for path, gradient in flatten_dict(
        jax.jit(jax.grad(loss))(variables["params"]), sep="/"
    ).items():
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient) or path.endswith("attention/k/bias"), path


# Parameters with 133 keypoints: with the neck, and with three transposed convolutions.
PARAMETERS = {
    "clustr_t": (13_853_454, 15_399_438),
    "clustr_s": (24_861_978, 26_407_962),
    "clustr_b": (42_433_631, 43_963_231),
}
NECKS = {"clustr_t": 2_649_856, "clustr_s": 2_649_856, "clustr_b": 2_666_240}
LAST_LAYER = 34_181
CLASSIFIER = 513_000  # 512 x 1000 + 1000


def shapes_of(name, size=(256, 192)):
    dims = tv.create_model(name).settings.dims
    return [
        jax.ShapeDtypeStruct((1, size[0] // stride, size[1] // stride, dim), jnp.float32)
        for stride, dim in zip((4, 8, 16, 32), dims, strict=True)
    ]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    backbone = EXACT[name][0] - CLASSIFIER
    counts = []
    for head in (MtaHead(133), DeconvHead(133)):
        variables = jax.eval_shape(
            lambda x, head=head: head.init(jax.random.key(0), x, train=False), shapes_of(name)
        )
        sizes = {path: x.size for path, x in flatten_dict(variables["params"], sep="/").items()}
        counts.append(sum(sizes.values()))
        last = sum(size for path, size in sizes.items() if path.startswith("heatmaps/"))
        assert last == LAST_LAYER
    assert counts[0] - LAST_LAYER == NECKS[name]
    assert tuple(backbone + count for count in counts) == PARAMETERS[name]


@pytest.mark.parametrize("reported", REPORTED)
def test_parameters_and_costs_are_those_reported_of_swin(reported):
    """Swin with transposed convolutions for 17 keypoints, counted as mmcv counts."""
    dim = tv.create_model(reported.model).settings.dims[-1]
    last = [jax.ShapeDtypeStruct((1, 8, 6, dim), jnp.float32)]
    variables = jax.eval_shape(
        lambda x: DeconvHead(KEYPOINTS).init(jax.random.key(0), x, train=False), last
    )
    head = sum(x.size for x in jax.tree.leaves(variables["params"]))
    params = EXACT[reported.model][0] - 1000 * (dim + 1) + head
    assert round(params / 1e6, 1) == reported.params_m
    assert round(layer_macs(reported.model, reported.size) / 1e9, 1) == reported.gmacs


def test_products():
    """The neck takes 2.90 and the last layer .10 billion multiply-adds at 256 x 192.

    The neck's 2.90 count the factors of the channels, which are part of the kernels here.
    """
    head, inputs = MtaHead(133), shapes_of("clustr_s")
    variables = jax.eval_shape(lambda x: head.init(jax.random.key(0), x, train=False), inputs)
    macs = count_macs(lambda v, x: head.apply(v, x, train=False), variables, inputs)
    last, factors = 64 * 48 * 256 * 133, 1024 * sum(x.shape[1] * x.shape[2] for x in inputs[:3])
    assert last / 1e9 == pytest.approx(0.10, abs=0.005)
    assert (macs - last + factors) / 1e9 == pytest.approx(2.90, abs=0.005)


@pytest.mark.parametrize("cls", [MtaHead, DeconvHead])
def test_every_setting_has_a_rule(cls):
    names = {field.name for field in dataclasses.fields(cls)} - {"parent", "name"}
    assert rules_of(cls).keys() == names
    for name in names - {"axis_name"}:
        for value in (None, -1, (), "nonsense", float("nan")):
            with pytest.raises(UserError, match=f"{name}="):
                cls(**{"num_keypoints": 9, name: value})
