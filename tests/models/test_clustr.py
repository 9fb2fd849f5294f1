"""A small ClusTR: scales, aggregation, adaptive numbers of clusters, training state, devices."""

import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import sampled

import tokenvit_jax as tv
from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import ClusterAttention
from tokenvit_jax.layers.cluster_attention import cluster_numbers
from tokenvit_jax.measure.macs import summarize_model
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.models.clustr import SIZES, ClusTR, ClusTRBlock, ClusTRSettings, ConvFFN

# Two stages exercise all blocks and stages and compile in half the time. 12 x 8 tokens become 6 and
# 24 clusters, 6 x 4 tokens become 6 or all.
SMALL = ClusTR(ClusTRSettings(
    num_classes=5, dims=(8, 16), num_heads=(1, 2), depths=(1, 1), mlp_ratios=(2, 2),
    ratios=((16, 4), (4, 1)),
))  # fmt: skip
SINGLE = ((64,), (16,), (4,), (1,))


@functools.cache
def images():
    return np.random.default_rng(0).normal(size=(8, 48, 32, 3)).astype(np.float32)


@functools.cache
def variables():
    """Returns random weights that are large enough for attention and scores to matter."""
    rng = np.random.default_rng(1)

    def draw(path, x):
        first = path[-1].key in ("scale", "var")  # 1 in initial variables, which take long to draw
        return first + 0.2 * rng.normal(size=x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, variable_shapes(SMALL, images()))


def loss_and_updates(model, variables, x, axis_name=None):
    state = {k: v for k, v in variables.items() if k != "params"}

    def loss(params):
        logits, updates = model.apply(
            {"params": params, **state}, x, train=True, mutable=list(state),
            rngs={"dropout": jax.random.key(1), "routing": jax.random.key(2)},
        )  # fmt: skip
        return jnp.mean(logits**2), updates

    (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    if axis_name:
        value, grads = jax.lax.pmean((value, grads), axis_name)
    return value, grads, updates


@functools.cache
def reference():
    model = SMALL.clone(drop_path=0.5)
    return jax.jit(functools.partial(loss_and_updates, model))(variables(), images())


def test_gradients_are_finite_and_reach_every_parameter():
    _, grads, _ = reference()
    chex.assert_tree_all_finite(grads)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        key = jax.tree_util.keystr(path)
        if key.endswith("['score']['bias']"):
            continue  # a factor of all weights of a cluster, up to the 1e-6
        if "['kv" in key and "bias" in key:
            grad = grad[len(grad) // 2 :]  # a constant added to every key changes nothing
        assert np.abs(grad).max() > 1e-7, key


@pytest.mark.slow
def test_pmap_and_rematerialisation_give_the_numbers_of_one_device():
    model = SMALL.clone(drop_path=0.5, axis_name="devices", remat=True)
    step = jax.pmap(
        functools.partial(loss_and_updates, model, axis_name="devices"),
        axis_name="devices", in_axes=(None, 0), out_axes=None, devices=jax.devices()[:4],
    )  # fmt: skip
    x = images().reshape(4, 2, *images().shape[1:])
    chex.assert_trees_all_close(step(variables(), x), reference(), atol=2e-5)


@pytest.mark.parametrize(
    ("overrides", "params", "gmacs", "gmacs_as_published"),
    sampled(
        [
            ({"ratios": SINGLE}, 10_818_545, 2.823, 1.977),
            ({"ratios": ((16,), (4,), (1,), (1,))}, 10_817_003, 3.097, 2.309),
            ({"ratios": SINGLE, "aggregation": "grid"}, 13_181_544, 2.092, 2.092),
        ]
    ),
)
def test_counts_of_the_ablations(overrides, params, gmacs, gmacs_as_published):
    """Tables 6 and 7 of the paper: 10.8 M, 10.8 M and 13.2 M parameters."""
    found = summarize_model(tv.create_model("clustr_t", **overrides), (224, 224), "clustr_t")
    assert found.params == params
    assert found.macs / 1e9 == pytest.approx(gmacs, abs=5e-4)
    assert found.macs_as_published / 1e9 == pytest.approx(gmacs_as_published, abs=5e-4)


@pytest.mark.parametrize(
    ("num_tokens", "ratios", "numbers"),
    [
        (3136, (64, 16), [49, 196]),
        (196, (4, 1), [49, 196]),
        (49, (1,), [49]),
        (67_200, (64, 16), [1050, 4200]),
        (21, (4, 1), [5, 20]),  # the finer scale is four times the coarser one
    ],
)
def test_cluster_numbers(num_tokens, ratios, numbers):
    assert cluster_numbers(num_tokens, ratios) == numbers


def attention(x, seed=0, **settings):
    """Returns output, intermediates and variables of a layer with random weights."""
    layer = ClusterAttention(num_heads=2, **settings)
    state = jax.jit(functools.partial(layer.init, train=False))(jax.random.key(seed), x)
    apply = functools.partial(layer.apply, train=False, mutable=["intermediates"])
    output, noted = jax.jit(apply)(state, x)
    return output, noted["intermediates"], state


def test_layer_equals_the_operators():
    """Eqs. 3, 5 and 8, written out."""
    x = np.random.default_rng(2).normal(size=(2, 4, 6, 8)).astype(np.float32)
    output, noted, state = attention(x, ratios=(8, 2))
    params = state["params"]
    linear = lambda x, name: x @ params[name]["kernel"] + params[name]["bias"]  # noqa: E731
    tokens = x.reshape(2, 24, 8)
    expected = 0
    for scale, number in enumerate((3, 12)):
        found = ops.cluster_density_peaks(tokens, number)
        np.testing.assert_array_equal(noted[f"clusters{scale}"][0], found.assignment)
        weights = np.exp(linear(tokens, "score"))
        merged = np.zeros((2, number, 8))
        for b, m in np.ndindex(2, number):
            members = np.asarray(found.assignment[b] == m)
            w = weights[b, members] / (weights[b, members].sum() + 1e-6)
            merged[b, m] = (w * tokens[b, members]).sum(0)
        k, v = np.split(linear(merged, f"kv{scale}"), 2, -1)
        split = lambda x: x.reshape(2, -1, 2, 4)  # noqa: E731
        q = split(linear(tokens, "q"))
        logits = np.einsum("bqhd,bkhd->bhqk", q, split(k)) / 2
        expected = expected + np.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), split(v))
    expected = linear(expected.reshape(2, 24, 8), "proj").reshape(x.shape)
    np.testing.assert_allclose(output, expected, atol=1e-5)


def random_params(module, *args):
    shapes = jax.eval_shape(lambda key: module.init(key, *args), jax.random.key(0))
    rng = np.random.default_rng(6)
    noise = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(noise, shapes["params"])


def test_ffn_equals_its_formula():
    """fc2(GELU(fc1(x) + depthwise(fc1(x)))), in float64."""
    x = np.random.default_rng(4).normal(size=(2, 3, 5, 4)).astype(np.float32)
    ffn = ConvFFN(ratio=2, dtype=jnp.float32)
    params = random_params(ffn, x)
    output = ffn.apply({"params": params}, x)
    params = jax.tree.map(np.float64, params)
    linear = lambda x, name: x @ params[name]["kernel"] + params[name]["bias"]  # noqa: E731
    hidden = linear(x, "fc1")
    padded = np.pad(hidden, ((0, 0), (1, 1), (1, 1), (0, 0)))
    hidden = hidden + params["depthwise"]["bias"]
    for i, j in np.ndindex(3, 3):
        hidden += padded[:, i : i + 3, j : j + 5] * params["depthwise"]["kernel"][i, j]
    hidden *= 0.5 * (1 + np.vectorize(math.erf)(hidden / 2**0.5))
    np.testing.assert_allclose(output, linear(hidden, "fc2"), rtol=1e-5, atol=1e-5)


def test_block_equals_its_layers():
    """Eq. 9: attention first; each layer reads normalised tokens and is added to its input."""
    x = np.random.default_rng(5).normal(size=(2, 4, 6, 8)).astype(np.float32)
    settings = {"num_heads": 2, "ratios": (4,)}
    block = ClusTRBlock(
        ClusTRSettings(
            dims=(8,), depths=(2,), num_heads=(2,), ratios=((4,),), mlp_ratios=(2,), drop_path=0.5
        ),
        stage=0, index=1,
    )  # fmt: skip
    params = random_params(block, x, False)
    norm, attention = nn.LayerNorm(epsilon=1e-6), ClusterAttention(**settings)
    ffn = ConvFFN(ratio=2, dtype=jnp.float32)
    apply = lambda layer, name, *args: layer.apply({"params": params[name]}, *args)  # noqa: E731
    between = x + apply(attention, "attention", apply(norm, "norm1", x), False)
    expected = between + apply(ffn, "ffn", apply(norm, "norm2", between))
    output = block.apply({"params": params}, x, False)
    # The programs divide the layers differently among loops, which round differently.
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_adaptive_numbers_follow_the_content():
    """Images use half of the clusters on average; an image with little content uses fewer."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(6, 8, 8, 16)).astype(np.float32)
    x[:3] = 0.05 * x[:3] + rng.integers(0, 2, (3, 8, 8, 1))  # two kinds of tokens
    layer = ClusterAttention(num_heads=2, ratios=(4,), adaptive=0.5)
    state = layer.init(jax.random.key(0), x, train=False)

    @jax.jit
    def train(state):
        _, new = layer.apply(
            state, x, train=True, rngs={"routing": jax.random.key(1)},
            mutable=["intermediates", "batch_stats"],
        )  # fmt: skip
        return new

    new = train(state)
    used = np.asarray(new["intermediates"]["used0"][0])  # (B, M)
    assert used.shape == (6, 16)
    assert used.sum() == 48
    assert used[:3].sum(1).max() < used[3:].sum(1).min()
    assert used[:, 0].all()
    assignment = np.asarray(new["intermediates"]["clusters0"][0])
    for b in range(6):
        assert set(assignment[b]) == set(np.flatnonzero(used[b]))
    threshold = new["batch_stats"]["threshold0"]
    assert threshold > state["batch_stats"]["threshold0"]
    for _ in range(60):  # the running mean reaches the threshold of the batch
        state = {**state, "batch_stats": train(state)["batch_stats"]}
    _, noted = layer.apply(state, x, train=False, mutable=["intermediates"])
    assert abs(int(noted["intermediates"]["used0"][0].sum()) - 48) <= 2


def test_an_adaptive_model_takes_images_of_any_size():
    """Ratio 1 leaves 8 of 9 tokens, but 16 of 16: the variables must not depend on this."""
    layer = ClusterAttention(num_heads=2, ratios=(2, 1), adaptive=0.5)
    init = functools.partial(layer.init, jax.random.key(0), train=False)
    variables = jax.eval_shape(init, jnp.ones((1, 4, 4, 8)))
    apply = functools.partial(layer.apply, train=False)
    y = jax.eval_shape(apply, variables, jnp.ones((1, 3, 3, 8)))
    assert y.shape == (1, 3, 3, 8)


@pytest.mark.parametrize(
    ("channels", "settings", "message"),
    [
        (9, {}, "num_heads=2 does not divide 9 channels"),
        (8, {"aggregation": "grids"}, "aggregation='grids' is not valid; valid: clusters, grid"),
        (8, {"assign": "far"}, "assign='far' is not valid; valid: nearest, parent"),
        (8, {"adaptive": 1.0}, "adaptive=1.0 is not valid; valid: numbers from 0 to below 1"),
        (8, {"ratios": (4, 16)}, r"ratios=\(4, 16\) is not valid for a stage"),
        (8, {"ratios": (0,)}, r"ratios=\(0,\) is not valid; valid: values, each: whole"),
        (8, {"ratios": (8,), "aggregation": "grid"}, r"ratios=\(8,\) .*; valid: squares"),
        (8, {"ratios": 4}, "ratios=4 is not valid; valid: values, each: whole"),
        (8, {"ratios": (64,)}, r"ratios=\(64,\) needs at least 64 tokens; there are 16"),
    ],
)
def test_mistakes_are_named(channels, settings, message):
    with pytest.raises(UserError, match=message):
        attention(jnp.zeros((1, 4, 4, channels)), **{"ratios": (4,)} | settings)


@pytest.mark.slow
def test_a_block_at_detection_size_fits_into_4_gib():
    """Stage 1 at 800 x 1344 pixels, 67,200 tokens, forward and backward, in XLA's memory plan."""
    block = ClusTRBlock(SIZES["clustr_t"], stage=0, index=0)
    x = jax.ShapeDtypeStruct((1, 200, 336, 64), jnp.float32)
    rngs = {"params": jax.random.key(0), "routing": jax.random.key(1)}
    variables = jax.eval_shape(lambda x: block.init(rngs, x, train=False), x)

    def loss(variables, x):
        return jnp.mean(block.apply(variables, x, train=True, rngs=rngs) ** 2)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(variables, x).compile()
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert memory.temp_size_in_bytes + kept < 4 * 2**30
