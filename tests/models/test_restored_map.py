"""Maps of hosts with a token reducer: every patch gets the token that stands for it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables

from tokenvit_jax.errors import UserError
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.models.reducers import Patches, TokenReducer, reduce_tokens
from tokenvit_jax.models.vit import Origin, VisionTransformer, ViTSettings

rng = np.random.default_rng(0)
IMAGES = rng.normal(size=(2, 64, 48, 3)).astype(np.float32)  # 4 x 3 patches
SMALL = {"num_classes": 5, "dim": 8, "depth": 2, "num_heads": 2, "position_size": (64, 48)}


@functools.cache
def variables():
    return random_variables(VisionTransformer(ViTSettings(**SMALL)), IMAGES)


def apply(reducer, method, **settings):
    model = VisionTransformer(ViTSettings(**SMALL | settings, token_reducer=reducer))
    return jax.jit(functools.partial(model.apply, train=False, method=method))(variables(), IMAGES)


def features_and_steps(module, images, train):
    """Returns the map, the homes after every block, and the last tokens, normed."""
    x, homes = module._embed(images, (4, 3)), []
    size = jnp.ones(x.shape[:2])
    for block in module.blocks:
        own = jnp.broadcast_to(jnp.arange(x.shape[1] - 1), (len(x), x.shape[1] - 1))
        x, (size, home, _) = block(x, Origin(size, own), (4, 3), train)
        homes.append(home)
    return module.features(images, train)[0], homes, module.norm(x[:, 1:])


@pytest.mark.parametrize("method", ["tome", "weighted_kmeans", "evit"])
def test_tokens_go_back_the_way_they_came(method):
    """ToMe's "unmerge" copies a merged token to all tokens that it was merged from."""
    reducer = {"keep": (7, 3), "method": method, "carry": True}
    found, homes, tokens = apply(reducer, features_and_steps)
    assert [home.shape for home in homes] == [(2, 12), (2, 7)]
    for b in range(2):
        members = [[patch] for patch in range(12)]
        for home in homes:
            merged = [[] for _ in range(1 + home[b].max())]
            for token, patches in zip(home[b], members, strict=True):
                merged[token] += patches
            members = merged
        expected = np.full((12, 8), np.nan)
        for token, patches in zip(tokens[b], members, strict=True):
            expected[patches] = token
        np.testing.assert_allclose(found[b].reshape(12, 8), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["evit", "powerbert"])
def test_patches_are_reconstructed_from_several_tokens(method):
    """Distances are those before the first reduction, from the tokens left at the end."""
    reducer = {"keep": (7, 3), "method": method, "neighbors": 2}

    def steps(module, images, train):
        x, seen = module._embed(images, (4, 3)), []
        origin = Origin(jnp.ones(x.shape[:2]), jnp.broadcast_to(jnp.arange(12), (2, 12)))
        for block in module.blocks:
            x, origin = block(x, origin, (4, 3), train)
            seen.append(origin.before)
        return module.features(images, train)[0], seen, module.norm(x[:, 1:])

    found, (first, last), tokens = jax.device_get(apply(reducer, steps))
    np.testing.assert_array_equal(first.patches, last.patches)
    maps = first.patches.astype(np.float64).reshape(2, 4, 3, 8)
    for b in range(2):
        pairs = [np.diff(maps[b], axis=axis).reshape(-1, 8) for axis in (0, 1)]
        tau = 0.05 * np.median((np.concatenate(pairs) ** 2).sum(-1))
        np.testing.assert_allclose(last.temperature[b], tau, rtol=1e-4)
        for patch, y in zip(first.patches[b], found[b].reshape(12, 8), strict=True):
            distances = ((patch - last.remaining[b].astype(np.float64)) ** 2).sum(-1)
            near = np.argsort(distances, kind="stable")[:2]
            weights = np.exp((distances.min() - distances[near]) / tau)
            expected = weights @ tokens[b][near] / weights.sum()
            np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-4)
        # Selected tokens are patches; the fused one, the last in each block, is none.
        own = last.remaining[b][: 3 - (method == "evit")]
        assert method == "evit" or all((first.patches[b] == row).all(1).any() for row in own)


def test_nothing_to_restore():
    """A reducer that does nothing, or scales by 1, keeps all patches."""
    reducer = {"method": "soft_extract"}
    search = VisionTransformer(ViTSettings(**SMALL, token_reducer=reducer, distilled=True))
    idle = search.clone(token_reducer={"keep": (12, 99), "method": "evit"})

    @jax.jit
    def features(key):
        own = search.init(key, IMAGES, train=False)
        models = search, idle, search.clone(token_reducer=None)
        return [model.apply(own, IMAGES, train=False, method="features")[0] for model in models]

    *found, plain = features(jax.random.key(0))
    for features in found:
        np.testing.assert_allclose(features, plain, atol=1e-5)


def layer_norm(x, params):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]


def linear(x, params):
    return x @ params["kernel"] + params["bias"]


def evit_block(x, params, num_kept):
    """A block of EViT for one image (T, C)."""
    q, k, v = np.split(linear(layer_norm(x, params["norm1"]), params["attention"]["qkv"]), 3, -1)
    y, score = np.empty_like(x), 0
    for head in (slice(0, 4), slice(4, 8)):
        weights = np.exp(q[:, head] @ k[:, head].T / 2)
        weights /= weights.sum(1, keepdims=True)
        y[:, head] = weights @ v[:, head]
        score = score + weights[0, 1:] / 2
    x = x + linear(y, params["attention"]["proj"])
    best, others = np.split(1 + np.argsort(-score), [num_kept - 1])
    fused = sum(score[i - 1] * x[i] for i in others)
    x = np.concatenate([x[:1], x[best], [fused]])
    hidden = linear(layer_norm(x, params["norm2"]), params["mlp"]["fc1"])
    hidden = hidden * np.vectorize(lambda value: math.erfc(-value / math.sqrt(2)) / 2)(hidden)
    return x + linear(hidden, params["mlp"]["fc2"])


def embedded_and_tokens(module, images, train):
    return module._embed(images, (4, 3)), module.tokens(images, train)


def test_evit_equals_the_loops():
    """The reduction goes down to a single token, fused from patches and an earlier fused token."""
    embedded, found = apply({"keep": (5, 1), "method": "evit"}, embedded_and_tokens)
    params = jax.tree.map(np.float64, variables()["params"])
    for b in range(2):
        x = evit_block(np.asarray(embedded[b], np.float64), params["blocks_0"], 5)
        assert x.shape == (6, 8)
        x = evit_block(x, params["blocks_1"], 1)
        np.testing.assert_allclose(found[b], x, rtol=1e-4, atol=1e-4)


def test_patches_are_at_home_in_the_nearest_token():
    x = rng.normal(size=(2, 12, 4)).astype(np.float32)
    x[:, 0] = x[:, 1]  # both are kept: each is at home in its own
    score = rng.uniform(0.1, 0.3, size=(2, 12)).astype(np.float32)
    score[:, :2] = 2, 3
    size = rng.integers(1, 4, size=(2, 12)).astype(np.float32)
    patches = Patches(x, score, x, size)
    for method in ("evit", "powerbert"):
        reducer = TokenReducer(method=method)
        found, sizes, home = reduce_tokens(patches, 4, reducer, None, restorable=True)
        for b in range(2):
            np.testing.assert_array_equal(home[b, :2], [1, 0])
            distances = ((x[b, 2:, None] - found[b]) ** 2).sum(-1)
            np.testing.assert_allclose(
                np.take_along_axis(distances, np.asarray(home)[b, 2:, None], 1)[:, 0],
                distances.min(1),
                atol=1e-6,
            )
        assert method == "powerbert" or (home == 3).any()  # the fused one
        assert method == "powerbert" or (sizes.sum(1) == size.sum(1)).all()
        assert reduce_tokens(patches, 4, reducer, None).home is None


@pytest.mark.parametrize(
    ("method", "searched"),
    [("evit", (13, 8)), ("random", (12, 7)), ("tome", ()), ("kmedoids", ())],
)
def test_only_a_map_pays_for_the_search(method, searched):
    """The search costs N K C in every block that drops patches; K includes the fused token."""
    reducer = {"keep": (7, 3), "method": method}
    model = VisionTransformer(ViTSettings(**SMALL, token_reducer=reducer))
    macs = {
        name: count_macs(
            functools.partial(model.apply, train=False, method=name), variables(), IMAGES
        )
        for name in ("tokens", "features")
    }
    expected = sum(n * kept for n, kept in zip(searched, (7, 3), strict=False)) * 8 * len(IMAGES)
    assert macs["features"] - macs["tokens"] == expected


def test_gradients_of_a_map():
    """In training with rematerialisation, every parameter of the blocks has a gradient."""
    reducer = {"keep": (7, 3), "method": "evit"}
    model = VisionTransformer(ViTSettings(**SMALL, token_reducer=reducer, remat=True))
    rngs = {"routing": jax.random.key(0), "dropout": jax.random.key(1)}

    def head_of_map(module, images):
        tokens, restore = module.encode(images, True)
        return restore(tokens[..., :3])

    @jax.jit
    @jax.grad
    def grad(params):
        return (model.apply({"params": params}, IMAGES, rngs=rngs, method=head_of_map) ** 2).sum()

    for path, leaf in jax.tree_util.tree_leaves_with_path(grad(variables()["params"])):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all() and (np.abs(leaf).max() > 0) == ("classifier" not in name)


@pytest.mark.parametrize(
    ("reducer", "message"),
    [
        ({"keep": (7, 0)}, r"keep=\(7, 0\) is not valid; valid: for a map, numbers from 1"),
        ({"method": "convolution", "blocks": (1,)}, "'convolution' is not valid; valid: for a map"),
    ],
)
def test_what_leaves_no_map(reducer, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: apply(reducer, "features"))
