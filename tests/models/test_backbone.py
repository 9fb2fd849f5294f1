"""The contract of every backbone, and of a model that wraps one."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from random_variables import random_variables
from sampled import sampled

import tokenvit_jax as tv
from tokenvit_jax.data.token_labels import CELL_SIZE
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import DropPaths, advance_centroids
from tokenvit_jax.models.backbone import (
    MIN_IMAGE_SIZE,
    BackboneModel,
    Tap,
    Trainable,
    backbone_of,
    backbone_variables,
    variable_shapes,
)
from tokenvit_jax.models.dgt import DGT, DGTSettings
from tokenvit_jax.models.reducers import OPTIONAL_PARAMETERS, retention_mass
from tokenvit_jax.models.swin import Swin, SwinSettings
from tokenvit_jax.models.vit import Origin, VisionTransformer, ViTSettings

rng = np.random.default_rng(0)
IMAGES = rng.normal(size=(2, 64, 48, 3)).astype(np.float32)  # 4 x 3 patches
PLAIN = ViTSettings(
    num_classes=5, dim=8, depth=3, num_heads=2, mlp_ratio=1, position_size=(64, 48), distilled=True
)
PENALTY, FACTOR = 0.3, 10.0
SEARCH = {"method": "soft_extract", "penalty": PENALTY, "learning_rate_factor": FACTOR}


class Wrapped(BackboneModel):
    """A backbone and a linear head on its tokens."""

    @nn.compact
    def __call__(self, images, train):
        tokens, restore = self.backbone.encode(images, train)
        return restore(nn.Dense(3, name="head")(tokens))


def vit(**settings):
    return VisionTransformer(PLAIN).clone(**settings)


@functools.cache
def variables(model):
    return random_variables(model, IMAGES)


@functools.cache
def small_dgt():
    settings = DGTSettings(
        num_classes=5, stem_dim=4, dims=(4, 8), num_heads=(1, 2), depths=(1, 1), mlp_ratio=1,
        num_groups=3, top_k=5, head_dim=6, centroid_old_weight=0.7,
    )  # fmt: skip
    return DGT(settings)


# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------


def test_clone_takes_single_settings_and_keeps_the_others():
    model = vit()
    other = model.clone(expedite={"alpha": 1, "beta": 1, "clusters": (2, 2)}, remat=True)
    assert (other.settings.expedite.alpha, other.settings.remat) == (1, True)
    assert other.clone(expedite=None, remat=False) == model == model.clone()
    assert hash(other) != hash(model)
    assert model.clone(name="backbone").name == "backbone"
    assert model.clone(settings=other.settings, remat=False) == other.clone(remat=False)
    with pytest.raises(TypeError, match="widths"):
        model.clone(widths=3)


@pytest.mark.parametrize("name", ["clustr_t", "dgt_t", "pale_t", "swin_t", "swinv2_t", "deit_ti"])
def test_every_block_gets_its_own_factors_of_stochastic_depth(name):
    model = tv.create_model(name, num_classes=5, drop_path=0.4)
    drawn, given = [], {}

    def watch(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if isinstance(context.module, DropPaths):
            assert (context.module.rate, context.module.depth) == (0.4, model.settings.num_blocks)
            drawn.extend(result)
        elif hasattr(context.module, "index") and context.method_name == "__call__":
            given[context.module.index] = args[-1]
        return result

    rngs = {name: jax.random.key(0) for name in ("dropout", "routing")}
    apply = functools.partial(model.apply, rngs=rngs, mutable=True)
    shapes = variable_shapes(model, IMAGES)
    with nn.intercept_methods(watch):
        jax.eval_shape(lambda variables: apply(variables, IMAGES, True), shapes)
    assert sorted(given) == list(range(model.settings.num_blocks))
    for index, factors in enumerate(drawn):
        assert all(a is b for a, b in zip(given[index], factors, strict=True))


# ------------------------------------------------------------------------------------------------
# Maps
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides"),
    sampled(
        [
            ("clustr_t", {}),
            ("dgt_t", {}),
            ("pale_t", {"token_head": True}),
            ("swin_t", {}),
            ("swinv2_t", {}),
            ("deit_s", {"distilled": True, "depth": 1}),
        ],
        keep=(2, 5),
    ),
)
def test_only_the_classifier_uses_the_head_modules(name, overrides):
    depths = {} if "depth" in overrides else {"depths": (1, 1, 1, 1)}
    model = tv.create_model(name, **depths, **overrides)
    whole = variable_shapes(model, IMAGES[:1])["params"]
    init = functools.partial(model.init, train=False, method="features")
    map_only = jax.eval_shape(init, jax.random.key(0), IMAGES[:1])["params"]
    assert whole.keys() - map_only.keys() == set(model.head_modules)


@pytest.mark.parametrize(
    ("model", "classifiers"),
    sampled(
        [
            (tv.create_model("clustr_t", depths=(1, 0, 0, 0)), {"classifier"}),
            (tv.create_model("dgt_t", depths=(1, 0, 0, 0)), {"classifier"}),
            (
                tv.create_model("pale_t", depths=(1, 0, 0, 0), token_head=True),
                {"classifier", "token_classifier"},
            ),
            (tv.create_model("swin_t", depths=(1, 0, 0, 0)), {"classifier"}),
            (tv.create_model("swinv2_t", depths=(1, 0, 0, 0)), {"classifier"}),
            (vit(), {"classifier", "distillation_classifier"}),
            (vit(distilled=False, pool="mean"), {"classifier"}),
        ],
        keep=(2, 5),
    ),
    ids=lambda value: type(value).__name__,
)
def test_a_model_without_classes_returns_what_the_classifier_reads(model, classifiers):
    images = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
    rest = model.clone(num_classes=0)
    whole, without = (jax.eval_shape(m.init, jax.random.key(0), images) for m in (model, rest))
    assert whole["params"].keys() - without["params"].keys() == classifiers
    channels = whole["params"]["classifier"]["kernel"].shape[0]
    pooled = jax.eval_shape(functools.partial(model.apply, method="pooled"), whole, images)
    assert pooled == jax.eval_shape(rest.apply, without, images)
    assert (pooled.shape, pooled.dtype) == ((2, channels), jnp.float32)


def test_the_classifiers_read_the_pooled_features():
    model, params = vit(), dict(variables(vit())["params"])
    params["distillation_classifier"] = one = params["classifier"]
    rest = model.clone(num_classes=0, dropout=0.5)

    @jax.jit
    def apply(params, images):
        rngs = {"dropout": jax.random.key(0)}
        return (
            model.apply({"params": params}, images),
            model.apply({"params": params}, images, method="pooled"),
            rest.apply({"params": params}, images, True, rngs=rngs),
        )

    logits, pooled, alone = apply(params, IMAGES)
    np.testing.assert_allclose(alone, pooled, atol=1e-6)
    # Both classifiers are equal here, so the mean of the logits belongs to the mean of the tokens.
    np.testing.assert_allclose(logits, pooled @ one["kernel"] + one["bias"], atol=1e-5)


def test_models_without_classes_have_no_logits():
    model = tv.create_model("pale_t", num_classes=0, token_head=True)
    for method in ("dense_logits", "token_logits"):
        with pytest.raises(UserError, match="num_classes=0"):
            jax.eval_shape(functools.partial(model.init, method=method), jax.random.key(0), IMAGES)
    with pytest.raises(UserError, match="num_classes=-1 is not valid; valid: whole numbers from 0"):
        tv.create_model("swin_t", num_classes=-1)


@pytest.mark.parametrize("name", ["clustr_t", "dgt_t", "pale_t", "swin_t", "swinv2_t"])
def test_the_smallest_image_is_one_cell_of_the_last_map(name):
    assert tv.create_model(name).strides[-1] == CELL_SIZE == MIN_IMAGE_SIZE


def test_tokens_of_a_hierarchical_backbone_are_its_maps_side_by_side():
    model = Swin(
        SwinSettings(num_classes=5, dims=(4, 8), num_heads=(1, 2), depths=(1, 1), window_size=3)
    )
    images = rng.normal(size=(2, 37, 46, 3)).astype(np.float32)  # maps of 10 x 12 and 5 x 6
    given = random_variables(model, images)
    assert model.strides == (4, 8)

    def both(module, images):
        tokens, restore = module.encode(images, False)
        return module.features(images, False), tokens, restore(tokens[..., ::2])

    (fine, coarse), tokens, restored = jax.jit(functools.partial(model.apply, method=both))(
        given, images
    )
    coarse = jax.image.resize(coarse, (2, 10, 12, 8), "bilinear")
    expected = np.concatenate([fine, coarse], -1)
    np.testing.assert_allclose(tokens, expected.reshape(2, 120, 12), atol=1e-6)
    np.testing.assert_allclose(restored, expected[..., ::2], atol=1e-6)


def blocks_one_by_one(module, images):
    """Returns tokens and homes after every block of a plain host, calling each block directly."""
    x = module._embed(images, (4, 3))
    home = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (len(x), 12))
    origin, found = Origin(jnp.ones(x.shape[:2]), home), []
    for block in module.blocks:
        x, origin = block(x, origin, (4, 3), False)
        found.append((x, origin.home))
    return found


def run(model, method):
    return jax.jit(functools.partial(model.apply, method=method))(variables(vit()), IMAGES)


@pytest.mark.parametrize("reducer", [None, {"keep": (12, 7, 3), "method": "evit"}])
def test_taps_are_the_tokens_after_the_blocks(reducer):
    """Taps are in the requested order; each patch has the token that stands for it."""
    model = vit(token_reducer=reducer)
    found = run(model, lambda module, x: module.taps(x, False, (2, 0, 1)))
    expected = run(model, blocks_one_by_one)
    assert [type(tap) for tap in found] == [Tap] * 3
    for (patches, front), (x, home) in zip(found, [expected[i] for i in (2, 0, 1)], strict=True):
        assert patches.shape == (2, 4, 3, 8) and front.shape == (2, 2, 8)
        np.testing.assert_allclose(front, x[:, :2], atol=1e-5)
        own = np.take_along_axis(np.asarray(x[:, 2:]), np.asarray(home)[..., None], 1)
        np.testing.assert_allclose(patches.reshape(2, 12, 8), own, atol=1e-5)


@pytest.mark.parametrize("where", ["blocks", "logits"])
def test_taps_of_an_expedited_host_are_reconstructed(where):
    beta = {"blocks": 1, "logits": 2}[where]
    expedite = {"alpha": 1, "beta": beta, "clusters": (2, 2), "neighbors": 3, "where": where}
    model = vit(expedite=expedite)

    def by_hand(module, images):
        settings, size = module.settings.expedite, jnp.ones((2, 6))
        x = module._embed(images, (4, 3))
        first, _ = module.blocks[0](x, Origin(jnp.ones(x.shape[:2]), None), (4, 3), False)
        centers = settings.cluster(first[:, 2:], (4, 3))
        x, found = jnp.concatenate([first[:, :2], centers], 1), [first]
        for block in module.blocks[1 : 1 + beta]:
            x, _ = block(x, Origin(size, None), (2, 2), False)
            all_tokens = settings.reconstruct(first[:, 2:], centers, x[:, 2:], (4, 3))
            found.append(jnp.concatenate([x[:, :2], all_tokens], 1))
        for block in module.blocks[1 + beta :]:
            x, _ = block(found[-1], Origin(jnp.ones((2, 14)), None), (4, 3), False)
            found.append(x)
        return found

    found = run(model, lambda module, x: module.taps(x, False, (0, 1, 2)))
    for (patches, front), x in zip(found, run(model, by_hand), strict=True):
        np.testing.assert_allclose(front, x[:, :2], atol=1e-5)
        np.testing.assert_allclose(patches.reshape(2, 12, 8), x[:, 2:], atol=1e-5)


@pytest.mark.parametrize(
    ("model", "blocks", "message"),
    [
        (vit(), (0, 3), "block=3 has no tap; valid: 0 to 2"),
        (vit(), (-1,), "block=-1 has no tap; valid: 0 to 2"),
        (vit(token_reducer={"keep": (3, 0, 0)}), (0,), "for a map, numbers from 1"),
        (small_dgt(), (0,), "DGT is hierarchical and has no taps; valid: deit and vit"),
    ],
)
def test_taps_that_are_not_there(model, blocks, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, False, blocks, method="taps"))


# ------------------------------------------------------------------------------------------------
# Attention
# ------------------------------------------------------------------------------------------------


def attention_by_hand(module, images):
    """Returns the attention of the blocks of a plain host from their own layers."""
    x = module._embed(images, (4, 3))
    origin, found = Origin(jnp.ones(x.shape[:2]), None), []
    for block in module.blocks:
        given = block.variables["params"]
        y = nn.LayerNorm(1e-6).apply({"params": given["norm1"]}, x)
        qkv = y @ given["attention"]["qkv"]["kernel"] + given["attention"]["qkv"]["bias"]
        q, k, _ = qkv.reshape(2, 14, 3, 2, 4).transpose(2, 0, 3, 1, 4)
        found.append(jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2))
        x, _ = block(x, origin, (4, 3), False)
    return found


@pytest.mark.parametrize("remat", [False, True])
def test_attention_of_a_plain_host(remat):
    found = jax.jit(vit(remat=remat).attention)(variables(vit()), IMAGES)
    for weights, expected in zip(found, run(vit(), attention_by_hand), strict=True):
        assert weights.shape == (2, 2, 14, 14)
        np.testing.assert_allclose(weights, expected, atol=1e-5)


def test_attention_is_only_computed_on_demand():
    model, given = vit(), variables(vit())
    assert "attention_weights" not in jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    plain, noted = (
        str(jax.make_jaxpr(function)(given, IMAGES)).count("exp ")
        for function in (model.apply, model.attention)
    )
    assert 0 < plain < noted


def test_attention_of_fewer_tokens():
    """Blocks attend among the tokens that are left, or among the cluster centres."""
    expedited = vit(expedite={"alpha": 1, "beta": 1, "clusters": (2, 2), "neighbors": 3})
    reduced = vit(token_reducer={"keep": (12, 7, 3), "method": "evit", "carry": True})
    for model, sides in ((expedited, (14, 6, 14)), (reduced, (14, 14, 9))):
        found = jax.eval_shape(model.attention, variables(vit()), IMAGES)
        assert [x.shape for x in found] == [(2, 2, side, side) for side in sides]
    with pytest.raises(UserError, match="DGT is hierarchical and has no attention among all tok"):
        small_dgt().attention({}, IMAGES)


# ------------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------------


def test_a_model_without_hooks_changes_nothing():
    class Linear(Trainable):
        @nn.compact
        def __call__(self, images, train):
            return nn.Dense(2)(images.mean((1, 2)))

    for model in (Linear(), vit(), Wrapped(vit())):
        given = {"params": {"backbone": {"bias": jnp.ones(2)}, "head": jnp.ones(3)}}
        after = model.after_step(given, 0.1)
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b, after, given))
        assert model.learning_rate_factors(given["params"]) is None
        assert model.monitor(given["params"]) == {}
    assert backbone_of(Linear()) == Linear()


def test_the_variables_of_the_backbone():
    model, alone = Wrapped(small_dgt()), small_dgt()
    whole = variable_shapes(model, jax.ShapeDtypeStruct(IMAGES.shape, jnp.float32))
    inner = backbone_variables(model, whole)
    assert inner.keys() == {"params", "batch_stats", "centroids"}
    expected = variable_shapes(alone, IMAGES)
    for name in alone.head_modules:  # a dense task has no classifier
        for tree in (expected["params"], expected["batch_stats"]):
            tree.pop(name, None)
    assert inner == expected
    assert backbone_of(model) is model.backbone
    assert backbone_variables(alone, whole) is whole


@pytest.mark.parametrize(
    ("rule", "old_weight"),
    [("literal", 0.1 * 0.02), ("swapped", 1 - 0.1 * 0.02), ("constant", 0.7)],
)
def test_centroids_move_by_the_rule_inside_a_model_too(rule, old_weight):
    """The rule is Eq. 4; all other variables stay unchanged."""
    weight = old_weight if rule == "constant" else DGTSettings.centroid_old_weight
    model = Wrapped(small_dgt().clone(centroid_rule=rule, centroid_old_weight=weight))
    given = variables(model)
    found = model.after_step(given, jnp.float32(0.02))
    expected = advance_centroids(given["centroids"]["backbone"], old_weight)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        found["centroids"]["backbone"],
        expected,
    )
    before, after = (
        tree["centroids"]["backbone"]["stages_0_0"]["attention"]["centroids"]
        for tree in (given, found)
    )
    assert np.abs(before - after).max() > 1e-4
    for name in ("params", "batch_stats"):
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b, found[name], given[name]))
    assert "centroids" not in small_dgt().after_step({"params": {}}, 0.02)


def test_sums_of_the_devices_move_the_centroids_together():
    given = variables(small_dgt())["centroids"]
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), given)
    for leaf in ("stages_0_0",):
        stacked[leaf]["attention"]["centroids"] = jnp.stack(
            [given[leaf]["attention"]["centroids"]] * 2
        )
    model = small_dgt().clone(axis_name="devices")
    step = lambda tree: model.after_step({"centroids": tree}, 0.1)["centroids"]  # noqa: E731
    found = jax.vmap(step, axis_name="devices")(stacked)
    tripled = jax.tree.map(lambda x: 3 * x, given)
    tripled["stages_0_0"]["attention"]["centroids"] = given["stages_0_0"]["attention"]["centroids"]
    expected = advance_centroids(tripled, 0.7)
    for device in range(2):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[device], b, rtol=1e-5),  # noqa: B023
            found,
            expected,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"centroid_rule": "x"}, "centroid_rule='x' is not valid; valid: literal, swapped, const"),
        ({"centroid_old_weight": 1.5}, "centroid_old_weight=1.5 is not valid; valid: numbers from"),
        (
            {"centroid_rule": "literal", "centroid_old_weight": 0.5},
            "centroid_old_weight=0.5 is not valid; valid: 0.9 with centroid_rule='literal'",
        ),
    ],
)
def test_bad_rules_of_the_centroids_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        tv.create_model("dgt_t", **settings)


def retention(params):
    return [params[f"blocks_{i}"]["soft_extract"]["retention"] for i in range(3)]


@functools.cache
def search_variables():
    return random_variables(vit(token_reducer=SEARCH), IMAGES)


def test_a_search_clips_its_retention_and_reports_its_mass():
    model = vit(token_reducer=SEARCH)
    params = search_variables()["params"]
    wrapped = {"params": {"backbone": params, "head": {"kernel": -np.ones(3)}}, "other": {}}
    after = Wrapped(model).after_step(wrapped, 0.1)
    found = after["params"]["backbone"]
    for new, old in zip(retention(found), retention(params), strict=True):
        assert old.min() < 0
        np.testing.assert_array_equal(new, np.clip(old, 0, 1))
    assert found["norm"]["bias"] is params["norm"]["bias"]
    assert after["params"]["head"]["kernel"].max() == -1 and after["other"] == {}
    reported = Wrapped(model).monitor(after["params"])
    np.testing.assert_allclose(reported["retention/tokens"], retention_mass(found).sum())


def test_a_search_learns_its_retention_faster():
    model = vit(token_reducer=SEARCH)
    params = search_variables()["params"]
    factors = Wrapped(model).learning_rate_factors({"backbone": params, "head": {"bias": 0}})
    assert factors["head"] == {"bias": 1.0}
    found = jax.tree_util.tree_leaves_with_path(factors["backbone"])
    for path, factor in found:
        assert factor == (FACTOR if path[-1].key == "retention" else 1.0)
    assert jax.tree.structure(factors["backbone"]) == jax.tree.structure(params)


@pytest.mark.parametrize("remat", [False, True])
def test_a_search_sows_the_penalty_in_training(remat):
    """Block l, from 1, adds penalty * l * sum(retention of block l); nothing else changes."""
    model = Wrapped(vit(token_reducer=SEARCH, remat=remat))
    given = variables(model)

    def apply(params, train, model=model):
        rngs = {"dropout": jax.random.key(0), "routing": jax.random.key(1)}
        return model.apply({"params": params}, IMAGES, train, rngs=rngs, mutable=["losses"])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def sown(params):
        y, losses = apply(params, True)
        return sum(jax.tree.leaves(losses)), y

    (loss, y), grads = sown(given["params"])
    masses = retention_mass(given["params"]["backbone"])
    np.testing.assert_allclose(loss, PENALTY * jnp.arange(1, 4) @ masses, rtol=1e-5)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        own = path[-1].key == "retention"
        block = int(path[1].key[-1]) + 1 if own else 0
        np.testing.assert_array_equal(grad, np.float32(PENALTY) * np.float32(block))
    without = model.clone(backbone=vit(token_reducer={"method": "soft_extract"}, remat=remat))
    unsown, losses = jax.jit(lambda p: apply(p, True, without))(given["params"])
    np.testing.assert_array_equal(y, unsown)
    assert not losses
    assert not jax.eval_shape(lambda p: apply(p, False)[1], given["params"])
    init = functools.partial(model.init, train=True)
    keys = {name: jax.random.key(0) for name in ("params", "dropout", "routing")}
    assert jax.eval_shape(init, keys, IMAGES).keys() == {"params"}


def test_optional_parameters_come_with_their_settings():
    def paths(**settings):
        params = variable_shapes(vit(**settings), IMAGES)["params"]
        return set(flatten_dict(params, sep="/"))

    plain, names = paths(), set()
    for settings in (
        {"token_reducer": SEARCH},
        {"token_reducer": {"method": "convolution", "blocks": (2,)}},
        {"token_reducer": {"method": "dynamicvit", "keep": (12, 7, 7)}},
        {"qk_norm": "learned"},
    ):
        assert plain < paths(**settings)
        names |= paths(**settings) - plain
    ends = VisionTransformer.optional_parameters
    assert all(name.endswith(tuple(f"/{end}" for end in ends)) for name in names)
    assert {end for end in ends for name in names if name.endswith(end)} == set(ends)
    assert set(OPTIONAL_PARAMETERS) < set(ends)
