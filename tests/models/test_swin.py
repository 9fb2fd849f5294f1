"""Small Swin Transformers: networks against float64 loops, training state, image sizes."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import sampled

from tokenvit_jax.errors import UserError
from tokenvit_jax.models.swin import (
    Swin,
    SwinBlock,
    SwinSettings,
    SwinV2,
    SwinV2Settings,
    windows_of,
)

SETTINGS = {"num_classes": 5, "dims": (8, 12), "num_heads": (2, 3), "depths": (2, 2)}
SMALL = {
    "swin": Swin(SwinSettings(**SETTINGS, window_size=4)),
    # Windows narrower than the windows that are the units of offsets.
    "swinv2": SwinV2(SwinV2Settings(**SETTINGS, window_size=4, pretrained_window_sizes=(6, 4))),
}
MODELS = pytest.mark.parametrize("name", SMALL)
ONE_MODEL = pytest.mark.parametrize("name", sampled(SMALL, keep=("swinv2",)))


@functools.cache
def images():
    """Images with maps of 9 x 10 and 5 x 5: all sides need padding, also for merging; all shift."""
    return np.random.default_rng(0).normal(size=(2, 35, 40, 3)).astype(np.float32)


@functools.cache
def params(name):
    """Random weights with far from uniform attention, unlike the weights training starts with."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape).astype(np.float32)
        match path[-1].key:
            case "kernel":
                return 1.5 * x / np.sqrt(np.prod(x.shape[:-1]))
            case "scale":
                return 1 + 0.1 * np.abs(x)
            case "logit_scale":
                return 3 * x  # some at the limit
            case "relative_position_bias":
                return x
            case _:
                return 0.1 * x

    return jax.tree_util.tree_map_with_path(draw, abstract_params(SMALL[name]))


def abstract_params(model, size=(32, 32)):
    x = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)["params"]


def linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def norm(p, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p["scale"] + p["bias"]


def mlp(p, x):
    x = linear(p["fc1"], x)
    return linear(p["fc2"], x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2)


def position_bias(p, rows, columns, pretrained):
    """Returns the bias of every pair of positions (N, T, T)."""
    offsets = [x[:, None] - x for x in (rows, columns)]
    if pretrained is None:
        middle = p["relative_position_bias"].shape[0] // 2
        within = [np.clip(x, -middle, middle) + middle for x in offsets]
        return p["relative_position_bias"][tuple(within)].transpose(2, 0, 1)
    x = np.stack(offsets, -1) * 8 / (pretrained - 1)
    x = np.sign(x) * np.log2(1 + np.abs(x)) / np.log2(8)
    x = linear(p["position_bias"]["fc2"], np.maximum(linear(p["position_bias"]["fc1"], x), 0))
    return (16 / (1 + np.exp(-x))).transpose(2, 0, 1)


def attention(p, x, heads, window, shift, pretrained):
    """Attends among all tokens of a window, including padding; windows end at the map's border."""
    batch, height, width, channels = x.shape
    x = np.pad(x, ((0, 0), (0, -height % window), (0, -width % window), (0, 0)))
    rows, columns = (i.reshape(-1) for i in np.indices(x.shape[1:3]))
    place = np.stack([(rows - shift) // window, (columns - shift) // window], -1)
    together = (place[:, None] == place).all(-1)
    qkv = linear(p["qkv"], x)
    if pretrained is not None:
        qkv += np.concatenate([p["q_bias"], np.zeros(channels), p["v_bias"]])
    q, k, v = np.moveaxis(qkv.reshape(batch, -1, 3, heads, channels // heads), 2, 0)
    factor = (channels // heads) ** -0.5
    if pretrained is not None:
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-12) for x in (q, k))
        factor = np.minimum(np.exp(p["logit_scale"]), 100)[:, None, None]
    logits = factor * np.einsum("bqnd,bknd->bnqk", q, k)
    logits = logits + position_bias(p, rows, columns, pretrained)
    weights = np.where(together, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bnqk,bknd->bqnd", weights, v).reshape(x.shape)[:, :height, :width]
    return linear(p["proj"], y)


def reference(model, p, x):
    """Returns the two maps and the logits."""
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % 4), (0, -x.shape[2] % 4), (0, 0)))
    conv, maps = p["embeddings_0"]["conv"], []
    for stage, heads in enumerate(model.settings.num_heads):
        side = 2 if stage else 4
        x = np.pad(x, ((0, 0), (0, -x.shape[1] % side), (0, -x.shape[2] % side), (0, 0)))
        parts = [[x[:, i::side, j::side] for i in range(side)] for j in range(side)]
        embedding = p[f"embeddings_{stage}"]
        if stage == 0:
            x = sum(parts[j][i] @ conv["kernel"][i, j] for i, j in np.ndindex(4, 4)) + conv["bias"]
            x = norm(embedding["norm"], x)
        else:
            x = np.concatenate([*parts[0], *parts[1]], -1)
            first, then = (norm, linear) if type(model) is Swin else (linear, norm)
            names = {norm: "norm", linear: "reduction"}
            x = then(embedding[names[then]], first(embedding[names[first]], x))
        for index in range(2):
            block = p[f"stages_{stage}_{index}"]
            shift = 2 * index
            pretrained = (
                None if type(model) is Swin else model.settings.pretrained_window_sizes[stage]
            )
            attend = lambda x: attention(block["attention"], x, heads, 4, shift, pretrained)  # noqa: B023, E731
            for name, branch in (("norm1", attend), ("norm2", lambda x: mlp(block["mlp"], x))):  # noqa: B023
                normed = functools.partial(norm, block[name])
                x = x + (branch(normed(x)) if type(model) is Swin else normed(branch(x)))
        maps.append(x)
    pooled = norm(p["head_norm"], x).mean((1, 2))
    return maps, linear(p["classifier"], pooled)


@MODELS
def test_network_equals_its_formulas(name):
    model, p = SMALL[name], jax.tree.map(np.float64, params(name))
    maps, logits = reference(model, p, images().astype(np.float64))
    assert [x.shape for x in maps] == [(2, 9, 10, 8), (2, 5, 5, 12)]

    def run(p, x):
        wide = model.clone(dtype=jnp.float64)
        apply = functools.partial(wide.apply, {"params": p}, x, train=False)
        return apply(method="features"), apply()

    with jax.enable_x64(True):
        found_maps, found = jax.jit(run)(p, images().astype(np.float64))
    chex.assert_trees_all_close(found_maps, maps, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found, logits, atol=1e-5)  # the classifier computes in float32


def loss(model, p, x):
    rngs = {"dropout": jax.random.key(3)}
    return jnp.mean(model.apply({"params": p}, x, train=True, rngs=rngs) ** 2)


@functools.cache
def loss_and_gradients(name, remat=False):
    model = SMALL[name].clone(drop_path=0.3, remat=remat)
    return jax.jit(jax.value_and_grad(functools.partial(loss, model)))(params(name), images())


@ONE_MODEL
def test_gradients_are_finite_and_reach_every_parameter(name):
    _, grads = loss_and_gradients(name)
    chex.assert_tree_all_finite(grads)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        key = jax.tree_util.keystr(path)
        assert np.abs(grad).max() > 1e-6, key
        if "logit_scale" in key:  # nothing beyond the limit
            over = params(name)
            for part in path:
                over = over[part.key]
            assert np.all((grad == 0) == (over > np.log(100)))


@pytest.mark.slow
def test_rematerialisation_changes_nothing():
    chex.assert_trees_all_close(
        loss_and_gradients("swin"), loss_and_gradients("swin", remat=True), atol=1e-5
    )


@pytest.mark.slow
def test_mapped_devices_give_the_numbers_of_one():
    model = SMALL["swin"].clone(drop_path=0.3, axis_name="devices")
    step = jax.pmap(
        functools.partial(loss, model), "devices", in_axes=(None, 0), devices=jax.devices()[:2]
    )
    found = step(params("swin"), images()[:, None])
    np.testing.assert_allclose(found.mean(), loss_and_gradients("swin")[0], rtol=1e-5)


@ONE_MODEL
def test_first_weights(name):
    """Swin v2 begins with blocks that do nothing; position biases act from the start."""
    model, x = SMALL[name], images()[:1, :32, :32]
    p = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(x)["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(p, abstract_params(model, (64, 48)))
    block = p["stages_0_1"]
    assert np.all(block["norm1"]["scale"] == (0 if name == "swinv2" else 1))
    if name == "swin":
        assert 0.01 < block["attention"]["relative_position_bias"].std() < 0.03
    else:
        np.testing.assert_allclose(block["attention"]["logit_scale"], np.log(10), rtol=1e-6)


def test_windows_fit_the_map():
    assert windows_of((14, 9), 7, True) == ((7, 7), (3, 3))
    assert windows_of((14, 9), 7, False) == ((7, 7), (0, 0))
    assert windows_of((7, 8), 7, True) == ((7, 7), (0, 3))
    assert windows_of((2, 30), 7, True) == ((2, 7), (0, 3))


def test_every_second_block_of_a_stage_is_shifted():
    settings = dataclasses.replace(SMALL["swin"].settings, depths=(3, 2))
    shifted = [SwinBlock(settings, int(i > 2), i).shifted for i in range(5)]
    assert shifted == [False, True, False, False, True]


@ONE_MODEL
def test_bfloat16_is_the_type_of_the_maps(name):
    model = SMALL[name].clone(dtype=jnp.bfloat16)
    shapes = abstract_params(model)
    chex.assert_type(jax.tree.leaves(shapes), jnp.float32)
    apply = functools.partial(model.apply, train=False, method="features")
    chex.assert_type(jax.eval_shape(apply, {"params": shapes}, images()), jnp.bfloat16)


def test_heads_that_do_not_divide_the_channels_are_named():
    with pytest.raises(UserError, match="num_heads=5 does not divide 12 channels"):
        abstract_params(SMALL["swin"].clone(num_heads=(2, 5)))
