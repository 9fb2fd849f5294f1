"""Token reducers in a plain host: published costs, and the effect of each on the tokens."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from random_variables import random_variables
from sampled import sampled

import tokenvit_jax as tv
from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import Attention
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.models.reducers import (
    CLUSTERINGS,
    MERGING,
    SELECTIONS,
    HalveMap,
    Patches,
    SoftExtract,
    TokenReducer,
    clip_retention,
    dynamicvit_keep,
    evit_keep,
    reduce_tokens,
    retention_mass,
    searched_keep,
    tome_keep,
)
from tokenvit_jax.models.vit import VisionTransformer, ViTSettings
from tokenvit_jax.published import TOKEN_POOLING

rng = np.random.default_rng(0)
IMAGES = rng.normal(size=(3, 64, 48, 3)).astype(np.float32)  # 12 patches
SMALL = {"num_classes": 5, "dim": 8, "depth": 3, "num_heads": 2, "position_size": (64, 48)}


@functools.cache
def variables():
    return random_variables(VisionTransformer(ViTSettings(**SMALL)), IMAGES)


def tokens_of(reducer, params=None, **kwargs):
    model = VisionTransformer(ViTSettings(**SMALL, token_reducer=reducer))
    kwargs = {"train": False, "method": "tokens"} | kwargs
    return jax.jit(functools.partial(model.apply, **kwargs))(params or variables(), IMAGES)


def patches_of(x, score, size=None, keys=None):
    return Patches(
        x, score, x if keys is None else keys, jnp.ones(score.shape) if size is None else size
    )


def nearest(x, tokens):
    """Returns the index of the token (B, K, C) nearest to each token of x (B, N, C)."""
    return ((x[:, :, None] - tokens[:, None]) ** 2).sum(-1).argmin(-1)


def digits_of(text):
    return len(text.partition(".")[2])


PHOTO = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


@functools.cache
def shapes_of(model):
    return variable_shapes(model, PHOTO)


@functools.cache
def gmacs(name, keep, method):
    model = tv.create_model(name)
    reduced = model.clone(token_reducer={"keep": keep, "method": method})
    apply = functools.partial(reduced.apply, train=False)
    return count_macs(apply, shapes_of(model), PHOTO) / 1e9


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKEN_POOLING)
def test_costs_of_the_published_levels(name):
    dim = tv.create_model(name).settings.dim
    for level in TOKEN_POOLING[name]:
        pairs = list(itertools.pairwise(np.minimum.accumulate((196, *level.keep))))
        selecting = gmacs(name, level.keep, "powerbert")
        # Clustering adds the distances of N tokens. The paper also clusters N tokens to N; here
        # they are left unchanged.
        all_pairs = sum(n**2 * dim for n, k in pairs if k) / 1e9
        for found, paper in (
            (selecting, level.powerbert_gmacs),
            (selecting + all_pairs, level.kmedoids_gmacs),
        ):
            unit = 10 ** -digits_of(paper)
            assert found == pytest.approx(float(paper), abs=0.5 * unit), (level.keep, paper)
        if (name, level) == ("deit_s", TOKEN_POOLING["deit_s"][2]):  # tracing takes seconds
            idle = sum(n**2 * dim for n, k in pairs if n == k) / 1e9
            clustering = gmacs(name, level.keep, "kmedoids")
            assert clustering == pytest.approx(selecting + all_pairs - idle, rel=1e-6)


@pytest.mark.parametrize("name", sampled(TOKEN_POOLING))
def test_costs_to_three_digits(name):
    """Attention sees the tokens before the reduction, the MLP those after; levels 0 to 7, 10^9."""
    exact = {
        "deit_s": (4.282, 2.935, 2.523, 2.268, 2.061, 1.518, 1.215, 0.963),
        "deit_e318": (3.009, 2.108, 1.809, 1.619, 1.462, 1.090, 0.893, 0.752),
        "deit_e252": (1.964, 1.384, 1.190, 1.054, 0.956, 0.697, 0.546, 0.457),
    }[name]
    for level, expected in zip(TOKEN_POOLING[name], exact, strict=True):
        assert gmacs(name, level.keep, "powerbert") == pytest.approx(expected, abs=6e-4)


@pytest.mark.slow
def test_costs_of_token_merging_and_evit():
    """The costs agree with the papers' figures for DeiT-S to one digit."""
    assert tome_keep(196, 12, 13) == tuple(range(183, 39, -13))
    assert tome_keep(9, 4, 3) == (6, 3, 2, 1)
    assert evit_keep(9, 3, 0.9, (1, 3)) == (9, 9, 9)  # ceil(8.1) + 1
    for rate, paper in ((0.9, 4.0), (0.7, 3.0), (0.5, 2.3)):
        keep = evit_keep(196, 12, rate, (4, 7, 10))
        assert gmacs("deit_s", keep, "evit") == pytest.approx(paper, abs=0.05)
    assert gmacs("deit_s", tome_keep(196, 12, 13), "tome") == pytest.approx(2.7, abs=0.05)


@pytest.mark.slow
def test_costs_of_dynamicvit():
    """DeiT-S with 0.7 of the patches: 2.9 10^9 in the paper, which is 2.88 without predictors."""
    keep = dynamicvit_keep(196, 12, 0.7, (4, 7, 10))
    assert keep == (196,) * 3 + (137,) * 3 + (96,) * 3 + (67,) * 3
    model = tv.create_model("deit_s", token_reducer={"keep": keep, "method": "dynamicvit"})
    found = count_macs(functools.partial(model.apply, train=False), shapes_of(model), PHOTO)
    # Of a predictor for each patch: C^2 + C^2 / 2 + C^2 / 8 + C / 2.
    predictors = (196 + 137 + 96) * (13 * 384**2 // 8 + 192)
    blocks = sum(12 * (k + 1) * 384**2 + 2 * (k + 1) ** 2 * 384 for k in keep)
    assert found - predictors == blocks + 196 * 768 * 384 + 384 * 1000
    assert (found - predictors) / 1e9 == pytest.approx(2.9, abs=0.05)


@pytest.mark.parametrize("method", CLUSTERINGS + SELECTIONS)
def test_reduced_tokens(method):
    """Each method does what its operator does, and sizes add up."""
    x = rng.normal(size=(2, 12, 4)).astype(np.float32)
    score = rng.uniform(0.1, 1, size=(2, 12)).astype(np.float32)
    size = rng.integers(1, 4, size=(2, 12)).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), 2)
    reducer = TokenReducer(method=method)
    found, sizes, home = reduce_tokens(patches_of(x, score, size), 5, reducer, keys, True)
    assert found.shape == (2, 5, 4) and sizes.shape == (2, 5)
    best = np.argsort(-score, 1, "stable")[:, :5]
    weights = score if method.startswith("weighted") else None
    if method in SELECTIONS:
        places = np.array([[(x[b] == t).all(1).argmax() for t in found[b]] for b in range(2)])
        assert all(len(set(row)) == 5 for row in places)  # without replacement
        np.testing.assert_array_equal(sizes, np.take_along_axis(size, places, 1))
        np.testing.assert_array_equal(home, nearest(x, np.asarray(found)))
        if method == "powerbert":
            np.testing.assert_array_equal(places, best)
        return
    if method.endswith("kmeans"):
        expected, assignment, _ = ops.kmeans(x, best, weights)
    else:
        indices, assignment, _ = ops.kmedoids(x, best, weights)
        expected = np.take_along_axis(x, np.asarray(indices)[..., None], 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(sizes.sum(1), size.sum(1))
    np.testing.assert_array_equal(home, assignment)
    for b in range(2):
        np.testing.assert_allclose(sizes[b], np.bincount(assignment[b], size[b], 5))


def test_chance_follows_the_scores():
    """A token with three times the score of the other is drawn in three of four images."""
    images = 4000
    x = jnp.broadcast_to(jnp.array([[[0.0], [1.0]]]), (images, 2, 1))
    score = jnp.broadcast_to(jnp.array([[1.0, 3.0]]), (images, 2))
    keys = jax.random.split(jax.random.key(0), images)
    for method, expected in (("importance", 0.75), ("random", 0.5)):
        reducer = TokenReducer(method=method)
        found, _, _ = reduce_tokens(patches_of(x, score), 1, reducer, keys)
        assert found.mean() == pytest.approx(expected, abs=0.03)


def test_evaluation_depends_on_the_image_alone():
    reducer = {"keep": (7, 5, 3), "method": "importance"}
    whole = tokens_of(reducer)
    settings = ViTSettings(**SMALL, token_reducer=reducer, axis_name="devices")  # in no pmap
    model = VisionTransformer(settings)
    apply = jax.jit(functools.partial(model.apply, train=False, method="tokens"))
    np.testing.assert_allclose(apply(variables(), IMAGES[::-1])[::-1], whole, atol=1e-5)


def test_random_first_centers_are_a_random_selection():
    x = rng.normal(size=(2, 12, 4)).astype(np.float32)
    score, keys = jnp.ones((2, 12)), jax.random.split(jax.random.key(3), 2)
    found, selected = (
        reduce_tokens(patches_of(x, score), 5, reducer, keys)[0]
        for reducer in (
            TokenReducer(method="kmeans", initial="random"),
            TokenReducer(method="random"),
        )
    )
    first = np.array([[(x[b] == t).all(1).argmax() for t in selected[b]] for b in range(2)])
    np.testing.assert_allclose(found, ops.kmeans(x, first).centers, rtol=1e-6)
    by_score = reduce_tokens(patches_of(x, score), 5, TokenReducer(method="kmeans"), keys)[0]
    assert np.abs(found - by_score).max() > 0.01


def test_merging_alike_tokens_is_a_mean_by_size():
    """Three rounds merge 12 tokens to 2 and keep the whole image, for any pairs."""
    x, keys = rng.normal(size=(2, 12, 4)), rng.normal(size=(2, 12, 3))
    size = rng.integers(1, 4, size=(2, 12)).astype(np.float32)
    patches = Patches(x.astype(np.float32), None, keys.astype(np.float32), size)
    reducer = TokenReducer(method=MERGING)
    found, sizes, home = reduce_tokens(patches, 2, reducer, None)
    assert found.shape == (2, 2, 4)
    np.testing.assert_allclose(sizes.sum(1), size.sum(1))
    whole = (size[..., None] * x).sum(1)
    np.testing.assert_allclose((sizes[..., None] * found).sum(1), whole, rtol=1e-5)
    for b, k in itertools.product(range(2), range(2)):  # a token is the mean of those at home in it
        own = home[b] == k
        expected = np.average(x[b, own], axis=0, weights=size[b, own])
        np.testing.assert_allclose(found[b, k], expected, rtol=1e-5)
    # One round: patches 1, 3, 5, ... join the most similar of 0, 2, 4, ...
    found, sizes, home = reduce_tokens(patches, 9, reducer, None)
    assignment = np.asarray(ops.bipartite_matching(keys, 3))
    np.testing.assert_array_equal(home, assignment)
    for b in range(2):
        np.testing.assert_allclose(sizes[b], np.bincount(assignment[b], size[b], 9))
        for k in range(9):
            own = assignment[b] == k
            expected = np.average(x[b, own], axis=0, weights=size[b, own])
            np.testing.assert_allclose(found[b, k], expected, rtol=1e-5)


def test_act_clusters_the_queries_of_the_patches():
    """Queries of a cluster share a row of attention; the class token has its own."""
    model = VisionTransformer(ViTSettings(**SMALL | {"depth": 1}))
    act = model.clone(token_reducer={"keep": (4,), "method": "act"})
    first = {"params": {k: v for k, v in variables()["params"].items() if k != "blocks_1"}}
    apply = lambda model: jax.jit(functools.partial(model.attention))(first, IMAGES)[0]  # noqa: E731
    plain, found = np.asarray(apply(model)), np.asarray(apply(act))
    np.testing.assert_allclose(found[:, :, 0], plain[:, :, 0], rtol=1e-5)
    rows = [len(np.unique(head[1:].round(5), axis=0)) for image in found for head in image]
    assert all(1 < number <= 4 for number in rows)

    module = Attention(2, "none", 0.02, jnp.float32)
    x = rng.normal(size=(2, 13, 8)).astype(np.float32)
    params = {"params": first["params"]["blocks_0"]["attention"]}
    y, received, _ = module.apply(params, x, prototypes=4, num_alone=1)
    qkv = x @ params["params"]["qkv"]["kernel"] + params["params"]["qkv"]["bias"]
    q, k, v = (part.reshape(2, 13, 2, 4) for part in np.split(qkv, 3, -1))
    expected = ops.clustered_attention(q, k, v, ops.hash_clusters(q[:, 1:], 4), 4)
    proj = params["params"]["proj"]
    expected = expected.reshape(2, 13, 8) @ proj["kernel"] + proj["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert received is None


def test_act_saves_only_attention():
    """A block saves 2 (N - K) (N + 1) C multiply-adds, and hashes and sums the queries."""
    model = tv.create_model("deit_s", depth=1)
    plain, act = (
        count_macs(functools.partial(m.apply, train=False), shapes_of(model), PHOTO)
        for m in (model, model.clone(token_reducer={"keep": (49,), "method": "act"}))
    )
    hashes, sums = 196 * 384 * 16, 196 * 6 * 65
    assert plain - act == 2 * 147 * 197 * 384 - hashes - sums


def with_extra(model, seed=3):
    """The variables of all tests, with those that only this model has."""
    shapes = variable_shapes(model, IMAGES)
    drawn = flatten_dict(variables())
    draw = np.random.default_rng(seed)
    for path, leaf in flatten_dict(shapes).items():
        if path not in drawn:
            drawn[path] = draw.uniform(size=leaf.shape).astype(np.float32)
    return unflatten_dict(drawn)


def test_convolution_halves_the_map():
    """4 x 3 patches become 2 x 1; then there is no second column for another convolution."""
    reducer = {"method": "convolution", "blocks": (2,)}
    model = VisionTransformer(ViTSettings(**SMALL, token_reducer=reducer))
    halve = HalveMap(jnp.float32)
    x = rng.normal(size=(3, 12, 8)).astype(np.float32)
    found, _ = halve.init_with_output(jax.random.key(0), x, (4, 3))
    maps = x.reshape(3, 2, 2, 3, 8)[:, :, :, :2]
    np.testing.assert_allclose(found, maps.mean((2, 3)), atol=1e-6)  # at first
    kernel = rng.normal(size=(2, 2, 8, 8)).astype(np.float32)
    found = halve.apply({"params": {"conv": {"kernel": kernel, "bias": np.ones(8)}}}, x, (4, 3))
    expected = np.einsum("bhijc,ijcd->bhd", maps, kernel) + 1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert tokens_of({"method": "convolution", "blocks": (2,)}, with_extra(model)).shape == (
        3,
        3,
        8,
    )


def test_soft_extract_scales_by_rank():
    extract = SoftExtract(12)
    x = rng.normal(size=(2, 12, 4)).astype(np.float32)
    score = rng.uniform(size=(2, 12)).astype(np.float32)
    params = extract.init(jax.random.key(0), x, score)
    np.testing.assert_array_equal(extract.apply(params, x, score), x)
    retention = rng.uniform(size=12).astype(np.float32)
    found = extract.apply({"params": {"retention": retention}}, x, score)
    rank = (score[:, None] > score[:, :, None]).sum(-1)
    np.testing.assert_allclose(found, x * retention[rank][..., None], rtol=1e-6)

    search = {"method": "soft_extract"}
    model = VisionTransformer(ViTSettings(**SMALL, token_reducer=search))
    params = with_extra(model)["params"]
    for block in ("blocks_0", "blocks_1", "blocks_2"):
        params[block]["soft_extract"]["retention"] = np.ones(12, np.float32)
    assert searched_keep(params) == (12, 12, 12)
    kept = np.linspace(1.5, -0.5, 12, dtype=np.float32)
    params["blocks_1"]["soft_extract"]["retention"] = kept
    clipped = clip_retention(params)
    np.testing.assert_array_equal(clipped["blocks_1"]["soft_extract"]["retention"], kept.clip(0, 1))
    masses = 12, kept.clip(0, 1).sum(), 12
    np.testing.assert_allclose(retention_mass(clipped), masses, rtol=1e-6)
    assert searched_keep(clipped) == tuple(map(int, masses))
    assert clipped["blocks_0"]["norm1"]["bias"] is params["blocks_0"]["norm1"]["bias"]
    assert retention_mass(variables()["params"]).shape == (0,)
    with pytest.raises(UserError, match="ranks the 12 patches of images of position_size; these"):
        model.apply({"params": params}, IMAGES[:, :48], train=False)


@pytest.mark.parametrize("qk_norm", ["fixed", "learned"])
def test_normalised_queries_and_keys(qk_norm):
    model = VisionTransformer(ViTSettings(**SMALL | {"depth": 1}, qk_norm=qk_norm))
    found = with_extra(model)["params"]
    attention = found["blocks_0"]["attention"]
    assert ("alpha" in attention) == (qk_norm == "learned")
    module = Attention(2, qk_norm, 0.02, jnp.float32)
    x = rng.normal(size=(2, 13, 8)).astype(np.float32)
    attended = module.apply({"params": attention}, x, "all")
    qkv = x.astype(np.float64) @ attention["qkv"]["kernel"] + attention["qkv"]["bias"]
    q, k, v = (part.reshape(2, 13, 2, 4) for part in np.split(qkv, 3, -1))
    q, k = (part / np.linalg.norm(part, axis=-1, keepdims=True) for part in (q, k))
    logits = attention.get("alpha", 1) * np.einsum("bqhd,bkhd->bhqk", q, k)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(2, 13, 8)
    y = y @ attention["proj"]["kernel"] + attention["proj"]["bias"]
    np.testing.assert_allclose(attended.y, y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(attended.received, weights.sum((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(attended.keys, k.mean(2), rtol=1e-4, atol=1e-5)
    plain = module.apply({"params": attention}, x)
    np.testing.assert_allclose(plain.y, y, rtol=1e-4, atol=1e-5)


def test_as_many_as_there_are_changes_nothing():
    plain = tokens_of(None)
    np.testing.assert_array_equal(tokens_of(TokenReducer(keep=(12, 200, 12))), plain)
    carried = tokens_of(TokenReducer(keep=(12, 12, 12), carry=True))  # the logarithm of 1 is 0
    np.testing.assert_allclose(carried, plain, atol=1e-5)


def test_number_of_tokens_falls_to_the_class_token():
    def shape_of(keep, **settings):
        model = VisionTransformer(ViTSettings(**SMALL, token_reducer={"keep": keep}, **settings))
        tokens = lambda: model.init_with_output(jax.random.key(0), IMAGES, False, method="tokens")  # noqa: E731
        return jax.eval_shape(tokens)[0].shape

    assert shape_of((7, 9, 2)) == (3, 3, 8)
    assert shape_of((7, 0, 4)) == (3, 1, 8)
    assert shape_of((7, 0, 4), distilled=True) == (3, 2, 8)


def test_the_first_reduction_uses_the_attention_that_patches_receive():
    """Nothing before the first MLP depends on the reducer, so kept tokens can be identified."""
    params = variables()["params"]
    model = VisionTransformer(ViTSettings(**SMALL))
    note = functools.partial(
        model.apply, train=False, mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name in ("norm1", "attention"),
    )  # fmt: skip
    _, noted = jax.jit(note)(variables(), IMAGES)
    first = noted["intermediates"]["blocks_0"]
    _, normed = first["norm1"]["__call__"][0]
    normed = np.asarray(normed, np.float64)
    qkv = params["blocks_0"]["attention"]["qkv"]
    q, k, _ = np.split(normed @ qkv["kernel"] + qkv["bias"], 3, axis=-1)
    heads = lambda x: x.reshape(3, 13, 2, 4)  # noqa: E731
    logits = np.einsum("bqhd,bkhd->bhqk", heads(q), heads(k)) / 2
    received = np.asarray(jax.nn.softmax(logits)).sum((1, 2))[:, 1:]
    best = np.argsort(-received, 1, "stable")[:, :4]

    whole = VisionTransformer(ViTSettings(**SMALL | {"depth": 1}))
    reduced = whole.clone(token_reducer={"keep": (4,), "method": "powerbert"})
    first_of = {"params": {k: v for k, v in params.items() if k not in ("blocks_1", "blocks_2")}}
    tokens, found = (
        jax.jit(functools.partial(model.apply, train=False, method="tokens"))(first_of, IMAGES)
        for model in (whole, reduced)
    )
    expected = np.take_along_axis(np.asarray(tokens)[:, 1:], best[..., None], 1)
    np.testing.assert_allclose(found[:, 1:], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("reducer", "by_chance"),
    sampled(
        [
            (
                {
                    "keep": (7, 5, 3),
                    "method": "weighted_kmeans",
                    "initial": "random",
                    "carry": True,
                },
                True,
            ),
            ({"keep": (7, 5, 3), "method": "tome", "carry": True}, False),
            ({"keep": (7, 5, 3), "method": "act"}, False),
            ({"method": "convolution", "blocks": (1,)}, False),
            ({"method": "soft_extract", "diagonal": False}, False),
        ]
    ),
    ids=lambda x: x["method"] if isinstance(x, dict) else "",
)
def test_gradients_and_chance_in_training(reducer, by_chance):
    settings = ViTSettings(**SMALL, token_reducer=reducer, remat=True, qk_norm="learned")
    model = VisionTransformer(settings)
    params = with_extra(model)["params"]

    @jax.jit
    def grad(params, seed):
        rngs = {"routing": jax.random.key(seed), "dropout": jax.random.key(1)}
        loss = lambda p: (model.apply({"params": p}, IMAGES, train=True, rngs=rngs) ** 2).sum()  # noqa: E731
        return jax.value_and_grad(loss)(params)

    loss, grads = grad(params, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # Nothing reads the patches that leave the last block.
        unread = name == "blocks_2/soft_extract/retention"
        assert np.isfinite(leaf).all() and (np.abs(leaf).max() > 0) == (not unread), name
    assert grad(params, 0)[0] == loss
    assert (grad(params, 1)[0] != loss) == by_chance


@pytest.mark.parametrize(
    ("reducer", "message"),
    [
        ({"keep": (3, 3)}, r"token_reducer.keep=\(3, 3\) is not valid; valid: 3 numbers from 0"),
        ({"keep": (3, -1, 3)}, r"token_reducer.keep=\(3, -1, 3\) is not valid"),
        ({"keep": (3, 3, 3), "method": "mean"}, "token_reducer.method='mean' is not valid; valid"),
        ({"keep": (3, 3, 3), "initial": "first"}, "token_reducer.initial='first' is not valid"),
        ({"keep": (3, 3, 3), "iterations": 3}, "token_reducer has no 'iterations'; valid: keep"),
        ({"method": "kmeans"}, r"token_reducer.keep=\(\) is not valid; valid: 3 numbers"),
        (
            {"keep": (3, 3, 3), "method": "soft_extract"},
            r"keep=\(3, 3, 3\) is not valid; valid: \(\)",
        ),
        (
            {"keep": (3, 3, 3), "blocks": (1,)},
            r"token_reducer.blocks=\(1,\) is not valid; valid: \(\)",
        ),
        (
            {"method": "convolution"},
            r"blocks=\(\) is not valid; valid: one or more different numbers from 1 to 3",
        ),
        (
            {"keep": (3, 3, 3), "method": "tome", "neighbors": 2},
            "neighbors=2 is not valid; valid: 1",
        ),
        ({"keep": (3, 0, 3), "method": "act"}, "valid: with method='act', 3 numbers from 1"),
        ({"keep": (3, 0, 3), "method": "dynamicvit"}, "valid: with method='dynamicvit', 3 numbers"),
        ({"keep": (3, 3, 3), "method": "dynamicvit", "carry": True}, "carry=True is not valid"),
        ({"keep": (3, 3, 3), "method": "act", "carry": True}, "carry=True is not valid"),
        ({"method": "convolution", "blocks": (0, 4)}, r"blocks=\(0, 4\) is not valid"),
        (
            {"method": "convolution", "blocks": (1, 2, 3)},
            "the map is 2 x 1 before one of them",
        ),
        ({"method": "convolution", "blocks": (1,), "carry": True}, "carry=True is not valid"),
        ({"method": "convolution", "blocks": (1, 1)}, r"blocks=\(1, 1\) is not valid"),
        (
            {"keep": (3, 3, 3), "method": "tome", "initial": "random"},
            "initial='random' is not valid; valid: 'score' with method='tome', where it has no",
        ),
        (
            {"keep": (3, 3, 3), "method": "kmeans", "initial": "random", "diagonal": False},
            "diagonal=False is not valid; valid: True",
        ),
        (
            {"keep": (3, 3, 3), "penalty": 0.1},
            "token_reducer.penalty=0.1 is not valid; valid: 0.0 with method='weighted_kmedoids'",
        ),
        (
            {"method": "convolution", "blocks": (1,), "learning_rate_factor": 2.0},
            "learning_rate_factor=2.0 is not valid; valid: 1.0 with method='convolution'",
        ),
        (
            {"method": "soft_extract", "penalty": -1.0},
            "token_reducer.penalty=-1.0 is not valid; valid: 0, or numbers",
        ),
    ],
)
def test_mistakes_are_named(reducer, message):
    with pytest.raises(UserError, match=message):
        model = VisionTransformer(ViTSettings(**SMALL, token_reducer=reducer))
        variable_shapes(model, IMAGES)


def test_a_mean_of_reduced_tokens_is_refused():
    message = "pool='mean' is not valid with a token_reducer; valid: 'token'"
    with pytest.raises(UserError, match=message):
        ViTSettings(**SMALL, token_reducer={"keep": (7, 5, 3)}, pool="mean")
