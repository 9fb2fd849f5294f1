"""A small Pale Transformer: attention on padded maps, published counts, options, training state."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import sampled

import tokenvit_jax as tv
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import PaleAttention
from tokenvit_jax.layers.pale_attention import padded_size
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.models.pale import AbsolutePositionEncoding, Pale, PaleBlock, PaleSettings

# Two stages exercise all blocks and stages and compile in half the time.
SMALL = Pale(PaleSettings(
    num_classes=5, dims=(8, 16), num_heads=(2, 4), depths=(1, 1), pale_sizes=(3, 3), token_head=True
))  # fmt: skip


@functools.cache
def images():
    """48 x 32 pixels give maps of 12 x 8 and 6 x 4 tokens; pales of 3 divide only one side."""
    return np.random.default_rng(0).normal(size=(4, 48, 32, 3)).astype(np.float32)


@functools.cache
def variables():
    """Random weights with far from uniform attention, unlike the weights training starts with."""
    rng = np.random.default_rng(1)

    def draw(path, shape):
        x = rng.normal(size=shape.shape).astype(np.float32)
        match path[-1].key:
            case "kernel":
                return 1.5 * x / np.sqrt(np.prod(x.shape[:-1]))
            case "scale" | "var":
                return 1 + 0.1 * np.abs(x)
            case _:
                return 0.1 * x

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(SMALL, (32, 32)))


def loss_and_updates(model, params, state, x):
    (logits, tokens), updates = model.apply(
        {"params": params, **state}, x, train=True, box=jnp.array([0, 1, 0, 1]),
        rngs={"dropout": jax.random.key(3)}, mutable=list(state), method="token_logits",
    )  # fmt: skip
    return jnp.mean(logits**2) + jnp.mean(tokens[..., 0] ** 2), updates


@functools.cache
def reference(remat=False):
    model = SMALL.clone(remat=remat, drop_path=0.3)
    step = jax.value_and_grad(functools.partial(loss_and_updates, model), has_aux=True)
    state = {"batch_stats": variables()["batch_stats"]}
    return jax.jit(step)(variables()["params"], state, images())


def abstract_variables(model, size=(224, 224)):
    x = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)


def test_attention_layer_equals_its_formula():
    """In a map smaller than a pale, the zeros around it also become queries, keys and values."""
    layer = PaleAttention(num_heads=2, pale_size=5)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 4, 6))
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.asarray(x), train=False))
    weights = jax.tree.map(lambda s: np.abs(rng.normal(size=s.shape)) + 0.1, shapes)
    params, stats = weights["params"], weights["batch_stats"]

    def heads(name):
        p, s = params[name], stats[name]["norm"]
        padded = np.pad(x, ((0, 0), (1, 3), (1, 2), (0, 0)))
        y = sum(
            padded[:, i : i + 5, j : j + 5] * p["depthwise"]["kernel"][i, j]
            for i, j in np.ndindex(3, 3)
        )
        y = (y - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
        y = y @ p["pointwise"]["kernel"] + p["pointwise"]["bias"]
        return y.reshape(2, 25, 2, 3)

    logits = np.einsum("bqnd,bknd->bnqk", heads("q"), heads("k")) / np.sqrt(3)
    attention = np.exp(logits - logits.max(-1, keepdims=True))
    attention /= attention.sum(-1, keepdims=True)
    y = np.einsum("bnqk,bknd->bqnd", attention, heads("v")).reshape(2, 5, 5, 6)[:, :3, :4]
    expected = y @ params["proj"]["kernel"] + params["proj"]["bias"]

    with jax.enable_x64(True):
        actual = layer.clone(dtype=jnp.float64).apply(weights, x, train=False)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_padding_follows_the_pales():
    assert padded_size(14, 28, 7, "parallel") == (14, 28)
    assert padded_size(15, 3, 7, "cross") == (21, 7)
    assert padded_size(15, 3, 7, "vanilla") == (21, 21)


def test_masked_padding_counts_only_where_there_is_padding():
    layer = PaleAttention(num_heads=2, pale_size=3)
    x = np.random.default_rng(2).normal(size=(1, 6, 4, 4)).astype(np.float32)
    state = layer.init(jax.random.key(0), x, train=False)
    masked = layer.clone(mask_padding=True)
    for width, differs in ((4, True), (3, False)):
        outputs = [m.apply(state, x[:, :, :width], train=False) for m in (layer, masked)]
        assert np.any(outputs[0] != outputs[1]) == differs


@pytest.mark.parametrize(
    ("overrides", "gmacs"),
    sampled(
        [
            ({"pale_sizes": (1,) * 4}, 3.743),
            ({"pale_sizes": (3,) * 4}, 4.097),
            ({"pale_sizes": (5,) * 4}, 4.360),
            ({}, 4.219),
            ({"pale_sizes": (9,) * 4}, 5.448),
            ({"mode": "sequential"}, 4.219),
            ({"mode": "cross"}, 4.219),
            ({"mode": "vanilla"}, 5.37),
        ],
    ),
)
def test_multiply_adds_of_the_ablations(overrides, gmacs):
    """Tables 7 and 8 agree within 0.5 %: elementwise work, such as norms, is not counted here."""
    model, x = tv.create_model("pale_t", **overrides), jax.ShapeDtypeStruct((1, 224, 224, 3), float)
    macs = count_macs(lambda v, x: model.apply(v, x, train=False), variables_of_pale_t(), x)
    assert macs / 1e9 == pytest.approx(gmacs, rel=5e-3)


@functools.cache
def variables_of_pale_t():
    """Returns the variables of Pale-T, which depend neither on pale sizes nor on the mode."""
    return abstract_variables(tv.create_model("pale_t"))


@pytest.mark.parametrize(
    ("overrides", "millions"),
    sampled(
        [
            ({"position": "none"}, 21.69),
            ({"position": "ape"}, 22.07),
            ({"position": "ape", "position_size": (512, 2048)}, 29.56),  # 59.35 with UperNet
        ]
    ),
)
def test_parameters_of_the_position_encodings(overrides, millions):
    shapes = abstract_variables(tv.create_model("pale_t", **overrides), (32, 32))["params"]
    params = sum(x.size for x in jax.tree.leaves(shapes))
    assert params / 1e6 == pytest.approx(millions, abs=5e-3)


def test_attention_of_the_blocks():
    modes = lambda mode: [PaleBlock(SMALL.clone(mode=mode).settings, 0, i).mode for i in range(4)]  # noqa: E731
    assert modes("parallel") == ["parallel"] * 4
    assert modes("sequential") == ["rows", "columns"] * 2
    assert modes("cross") == ["cross"] * 4
    assert modes("vanilla") == ["vanilla"] * 4


def test_position_table_is_interpolated():
    table = np.random.default_rng(3).normal(size=(3, 2, 4)).astype(np.float32)
    layer = AbsolutePositionEncoding((3, 2), jnp.float32)
    add = lambda x: layer.apply({"params": {"position": table}}, x)  # noqa: E731
    np.testing.assert_array_equal(add(np.zeros((2, 3, 2, 4))), np.stack([table, table]))
    # Twice as wide: the centres of the new columns lie at -1/4, 1/4, 3/4 and 5/4 of the old ones.
    first, second = table[:, 0], table[:, 1]
    expected = [first, 0.75 * first + 0.25 * second, 0.25 * first + 0.75 * second, second]
    wide = add(np.zeros((1, 3, 4, 4)))[0]
    np.testing.assert_allclose(wide, np.stack(expected, 1), atol=1e-6)


def test_position_table_is_a_part_of_the_model():
    model = SMALL.clone(position="ape", position_size=(48, 32))
    shapes = abstract_variables(model, (64, 96))["params"]
    tables = [shapes[f"embeddings_{i}"]["layers_1"]["position"].shape for i in range(2)]
    assert tables == [(12, 8, 8), (6, 4, 16)]
    assert "cpe" not in shapes["stages_0_0"]


def test_gradients_are_finite_and_reach_every_parameter():
    _, grads = reference()
    chex.assert_tree_all_finite(grads)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        key = jax.tree_util.keystr(path)
        # A constant added to every key does not change the softmax.
        if not ("['k']" in key and "bias" in key):
            assert np.abs(grad).max() > 1e-4, key


@pytest.mark.slow
def test_rematerialisation_changes_nothing():
    chex.assert_trees_all_close(reference(), reference(remat=True), atol=1e-5)


@pytest.mark.slow
def test_mapped_devices_give_the_numbers_of_one():
    """BatchNorm and stochastic depth see the whole batch."""
    (expected, updates), _ = reference()
    model = SMALL.clone(drop_path=0.3, axis_name="devices")
    x = images().reshape(2, 2, *images().shape[1:])
    step = jax.pmap(
        functools.partial(loss_and_updates, model), "devices", in_axes=(None, None, 0),
        devices=jax.devices()[:2],
    )  # fmt: skip
    loss, mapped = step(variables()["params"], {"batch_stats": variables()["batch_stats"]}, x)
    np.testing.assert_allclose(loss.mean(), expected, rtol=1e-5)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], mapped), updates, atol=1e-5)


def test_token_logits_mix_neighbouring_images():
    apply = jax.jit(functools.partial(SMALL.apply, train=False, method="token_logits"))
    logits = lambda x, *box: apply(variables(), x, box=jnp.array(box))  # noqa: E731
    swapped = images()[[1, 0, 3, 2]]
    plain = logits(images(), 0, 0, 0, 0)
    assert [x.shape for x in plain] == [(4, 5), (4, 6, 4, 5)]
    chex.assert_type(plain, jnp.float32)
    assert np.abs(plain[0] - logits(swapped, 0, 0, 0, 0)[0]).max() > 0.1
    chex.assert_trees_all_close(
        logits(images(), 0, 6, 0, 4), logits(swapped, 0, 0, 0, 0), atol=1e-5
    )
    chex.assert_trees_all_close(
        logits(images(), 0, 2, 0, 4), logits(swapped, 2, 6, 0, 4), atol=1e-5
    )


def test_bfloat16_is_the_type_of_the_maps():
    model = SMALL.clone(dtype=jnp.bfloat16, position="ape", position_size=(64, 64))
    shapes = abstract_variables(model, (48, 32))
    chex.assert_type(jax.tree.leaves(shapes), jnp.float32)
    apply = functools.partial(model.apply, train=False, method="features")
    chex.assert_type(jax.eval_shape(apply, shapes, images()), jnp.bfloat16)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mode": "rows"}, "mode='rows' is not valid; valid: parallel, sequential, cross, vanilla"),
        ({"position": "rpe"}, "position='rpe' is not valid; valid: none, ape, cpe"),
        ({"num_heads": (3, 4)}, "num_heads=3 does not divide 8 channels"),
        ({"num_heads": (2, 1)}, "num_heads=1 must be even: mode 'parallel' halves the heads"),
    ],
)
def test_bad_settings_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        abstract_variables(SMALL.clone(**overrides), (32, 32))


def test_a_model_without_token_head_says_so():
    model = SMALL.clone(token_head=False)
    with pytest.raises(UserError, match="token_head=False"):
        jax.eval_shape(
            lambda v: model.apply(v, images(), train=False, method="token_logits"), variables()
        )
