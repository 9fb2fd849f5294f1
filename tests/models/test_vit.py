"""A small ViT: its formula, position embeddings, poolings, gradients, settings."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import sampled

import tokenvit_jax as tv
from tokenvit_jax.errors import UserError
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.models.vit import VisionTransformer, ViTSettings, resize_positions

SMALL = {"num_classes": 5, "dim": 8, "depth": 2, "num_heads": 2, "position_size": (48, 32)}
rng = np.random.default_rng(0)
IMAGES = rng.normal(size=(2, 48, 32, 3)).astype(np.float32)


@functools.cache
def make(**overrides):
    """Returns a model and random variables, none of them 0 or 1 as at the start of training."""
    model = VisionTransformer(ViTSettings(**SMALL | overrides))
    shapes = variable_shapes(model, IMAGES)
    draw = np.random.default_rng(1)
    return model, jax.tree.map(
        lambda leaf: 0.3 * draw.normal(size=leaf.shape).astype(np.float32), shapes
    )


def layer_norm(x, params, epsilon=1e-6):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return x * params["scale"] + params["bias"]


def linear(x, params):
    return x @ params["kernel"] + params["bias"]


def gelu(x):
    return x * np.vectorize(lambda value: math.erfc(-value / math.sqrt(2)) / 2)(x)


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def block(x, params, num_heads, epsilon, activation=gelu):
    """Computes a block with loops over images and heads."""
    qkv = linear(layer_norm(x, params["norm1"], epsilon), params["attention"]["qkv"])
    q, k, v = np.split(qkv, 3, axis=-1)
    y = np.empty_like(x)
    size = x.shape[-1] // num_heads
    for b in range(len(x)):
        for head in range(num_heads):
            part = slice(head * size, (head + 1) * size)
            logits = q[b, :, part] @ k[b, :, part].T / math.sqrt(size)
            weights = np.exp(logits)
            y[b, :, part] = weights / weights.sum(1, keepdims=True) @ v[b, :, part]
    x = x + linear(y, params["attention"]["proj"]) * params.get("scale1", 1)
    hidden = linear(layer_norm(x, params["norm2"], epsilon), params["mlp"]["fc1"])
    return x + linear(activation(hidden), params["mlp"]["fc2"]) * params.get("scale2", 1)


def naive(
    params, images, *, distilled=False, pool="token", norm_epsilon=1e-6, activation="gelu", **others
):
    """Computes the logits; ``others`` are settings that the parameters tell."""
    kernel = params["patches"]["kernel"]
    height, width = (size // 16 for size in images.shape[1:3])
    patches = images.reshape(len(images), height, 16, width, 16, 3).transpose(0, 1, 3, 2, 4, 5)
    x = np.einsum("bhwijc,ijcd->bhwd", patches, kernel) + params["patches"].get("bias", 0)
    names = ["class_token", "distillation_token"][: 1 + distilled]
    front = [np.broadcast_to(params[name], (len(x), 1, x.shape[-1])) for name in names]
    x = np.concatenate([*front, x.reshape(len(x), -1, x.shape[-1])], 1)
    x[:, x.shape[1] - len(params["position"]) :] += params["position"]
    registers = params.get("register_token", x[0, :0])
    registers = np.broadcast_to(registers, (len(x), *registers.shape))
    x = np.concatenate([x[:, : len(front)], registers, x[:, len(front) :]], 1)
    x = layer_norm(x, params["pre_norm"], norm_epsilon) if "pre_norm" in params else x
    for i in range(2):
        function = quick_gelu if activation == "quick_gelu" else gelu
        x = block(x, params[f"blocks_{i}"], 2, norm_epsilon, function)
    if pool == "mean":
        x = x[:, len(front) + registers.shape[1] :].mean(1, keepdims=True)
    x = layer_norm(x, params["norm"], norm_epsilon)
    if "projection" in params:
        x = x @ params["projection"]["kernel"]
    logits = linear(x[:, 0], params["classifier"])
    if distilled:
        logits = (logits + linear(x[:, 1], params["distillation_classifier"])) / 2
    return logits


DINOV2 = {"layer_scale": 0.5, "num_registers": 3}
CLIP = {"pre_norm": True, "patch_bias": False, "activation": "quick_gelu", "projection": 7}


@pytest.mark.parametrize(
    "settings",
    sampled(
        [
            {"norm_epsilon": 0.1},
            {"distilled": True},
            {"pool": "mean"} | DINOV2,
            {"front_position": False} | DINOV2,
            CLIP,
        ],
        keep=(1, 3),
    ),
)
def test_equals_the_loops(settings):
    model, variables = make(**settings)
    found = jax.jit(functools.partial(model.apply, train=False))(variables, IMAGES)
    params = jax.tree.map(np.float64, variables["params"])
    expected = naive(params, IMAGES.astype(np.float64), **settings)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_features_are_the_normed_patches():
    model, variables = make(distilled=True)
    (found,) = model.apply(variables, IMAGES, train=False, method="features")
    tokens = model.apply(variables, IMAGES, train=False, method="tokens")
    expected = layer_norm(np.asarray(tokens)[:, 2:], variables["params"]["norm"])
    assert found.shape == (2, 3, 2, 8)
    np.testing.assert_allclose(found.reshape(2, 6, 8), expected, atol=1e-5)


def test_other_sizes_are_padded_and_their_positions_resized():
    model, variables = make()
    padded = np.pad(IMAGES[:, :40, :, :], ((0, 0), (0, 8), (0, 16), (0, 0)))  # 48 x 48
    cut = padded[:, :40, :33]
    apply = functools.partial(model.apply, variables, train=False)
    np.testing.assert_allclose(apply(cut), apply(padded), atol=1e-6)
    # Twice the map: with embeddings that are equal everywhere, resizing changes nothing.
    same = variables["params"]["position"].copy()
    same[1:] = same[1]
    flat = {"params": {**variables["params"], "position": same}}
    model_of_size = model.clone(position_size=(96, 64))
    larger = {
        "params": {**flat["params"], "position": np.concatenate([same[:1], same[1:].repeat(4, 0)])}
    }
    images = rng.normal(size=(1, 96, 64, 3)).astype(np.float32)
    np.testing.assert_allclose(
        model.apply(flat, images, train=False),
        model_of_size.apply(larger, images, train=False),
        atol=1e-5,
    )


def bilinear(old, new):
    """Returns the weights (new, old) of resizing without antialiasing."""
    weights = np.zeros((new, old))
    for i in range(new):
        place = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
        weights[i, int(place)] += 1 - place % 1
        weights[i, min(int(place) + 1, old - 1)] += place % 1
    return weights


def bicubic(old, new):
    """Returns the weights (new, old) of cubic convolution with a = -0.75, without antialiasing."""
    a, weights = -0.75, np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            d = abs(place - j)
            if d <= 1:
                weight = (a + 2) * d**3 - (a + 3) * d**2 + 1
            else:
                weight = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[i, min(max(j, 0), old - 1)] += weight
    return weights


def test_positions_are_bicubic_or_bilinear():
    """The positions of 3 x 2 patches are resized to 2 x 5."""
    position = np.asarray(make(distilled=True)[1]["params"]["position"])
    patches, resized = position[2:].reshape(3, 2, 8), []
    for method, weights in (("bilinear", bilinear), ("bicubic", bicubic)):
        found = np.asarray(resize_positions(position, 2, (3, 2), (2, 5), method))
        np.testing.assert_array_equal(found[:2], position[:2])
        expected = np.einsum("yi,xj,ijc->yxc", weights(3, 2), weights(2, 5), patches)
        np.testing.assert_allclose(found[2:].reshape(2, 5, 8), expected, atol=1e-6)
        resized.append(found)
    resized.append(resize_positions(position, 2, (3, 2), (2, 5), "bicubic_antialias"))
    for first, second in itertools.combinations(resized, 2):
        assert np.abs(first - second).max() > 0.01


def test_model_resizes_positions_as_its_setting_says():
    model, variables = make(distilled=True, position_resize="bicubic")
    found = model.apply(variables, (2, 5), method="_positions")
    expected = resize_positions(variables["params"]["position"], 2, (3, 2), (2, 5), "bicubic")
    np.testing.assert_array_equal(found, expected)


def test_gradients_are_finite_and_reach_every_parameter():
    model, variables = make(distilled=True, remat=True)

    @jax.jit
    def grad(params):
        return jax.grad(lambda p: (model.apply({"params": p}, IMAGES, train=False) ** 2).sum())(
            params
        )

    plain = make(distilled=True)[0]
    grads = grad(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    expected = jax.grad(lambda p: (plain.apply({"params": p}, IMAGES, train=False) ** 2).sum())(
        variables["params"]
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), grads, expected
    )


def test_bfloat16_is_the_type_of_the_maps():
    model, variables = make(dtype=jnp.bfloat16)
    (features,) = jax.eval_shape(
        lambda v: model.apply(v, IMAGES, train=False, method="features"), variables
    )
    assert features.dtype == jnp.bfloat16
    logits = model.apply(variables, IMAGES, train=False)
    assert logits.dtype == jnp.float32
    exact = make()[0].apply(variables, IMAGES, train=False)
    np.testing.assert_allclose(logits, exact, atol=0.1 * np.abs(exact).max())


def test_stochastic_depth_and_dropout_are_of_training():
    model, variables = make(drop_path=0.5, dropout=0.5)
    plain = make()[0]
    np.testing.assert_array_equal(
        model.apply(variables, IMAGES, train=False), plain.apply(variables, IMAGES, train=False)
    )
    draw = lambda seed: model.apply(  # noqa: E731
        variables, IMAGES, train=True, rngs={"dropout": jax.random.key(seed)}
    )
    assert np.abs(draw(0) - draw(1)).max() > 0.01


@pytest.mark.parametrize(
    ("name", "number"),  # as timm counts
    sampled([("deit_ti", 5_910_800), ("deit_s", 22_436_432), ("deit_b", 87_338_192)]),
)
def test_parameters_with_distillation(name, number):
    model = tv.create_model(name, distilled=True)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = variable_shapes(model, images)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == number


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"pool": "max"}, "pool='max' is not valid; valid: token, mean"),
        (
            {"pool": "mean", "distilled": True},
            "pool='mean' is not valid with distilled=True; valid: 'token'",
        ),
        ({"num_heads": 3}, "num_heads=3 does not divide 8 channels"),
        ({"num_registers": -1}, "num_registers=-1 is not valid; valid: whole numbers from 0"),
        (
            {"layer_scale": math.nan},
            "layer_scale=nan is not valid; valid: 0, or numbers from 1e-12",
        ),
        ({"activation": "relu"}, "activation='relu' is not valid; valid: gelu, quick_gelu"),
        ({"patch_size": 0}, "patch_size=0 is not valid; valid: whole numbers from 1"),
        ({"patch_size": 65}, r"patch_size=65 .* position_size=\(48, 32\); valid: 1 to 48"),
        (
            {"position_size": (30000, 30000), "patch_size": 1},
            r"position_size=\(30000, 30000\) has 900000000 patches .* at most 1048576",
        ),
        ({"norm_epsilon": 0.0}, "norm_epsilon=0.0 is not valid; valid: numbers from 1e-12"),
        (
            {"position_resize": "nearest"},
            "position_resize='nearest' is not valid; valid: bicubic_antialias, bicubic, bilinear",
        ),
    ],
)
def test_bad_settings_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        model = VisionTransformer(ViTSettings(**SMALL | overrides))
        variable_shapes(model, IMAGES)
