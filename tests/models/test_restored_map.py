"""Maps of hosts with a token reducer: every patch gets the token that stands for it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables
from sampled import sampled

from tokenvit_jax.errors import UserError
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.models.reducers import Patches, TokenReducer, reduce_tokens, sample_kept
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
        x, (size, home, *_) = block(x, Origin(size, own), (4, 3), train)
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


def gelu(x):
    return x * np.vectorize(lambda value: math.erfc(-value / math.sqrt(2)) / 2)(x)


def attend(x, params):
    """Adds attention to the tokens of an image (T, C); also returns the class token's scores."""
    q, k, v = np.split(linear(layer_norm(x, params["norm1"]), params["attention"]["qkv"]), 3, -1)
    y, score = np.empty_like(x), 0
    for head in (slice(0, 4), slice(4, 8)):
        weights = np.exp(q[:, head] @ k[:, head].T / 2)
        weights /= weights.sum(1, keepdims=True)
        y[:, head] = weights @ v[:, head]
        score = score + weights[0, 1:] / 2
    return x + linear(y, params["attention"]["proj"]), score


def add_mlp(x, params):
    hidden = gelu(linear(layer_norm(x, params["norm2"]), params["mlp"]["fc1"]))
    return x + linear(hidden, params["mlp"]["fc2"])


def evit_block(x, params, num_kept):
    """A block of EViT for one image (T, C)."""
    x, score = attend(x, params)
    best, others = np.split(1 + np.argsort(-score), [num_kept - 1])
    fused = sum(score[i - 1] * x[i] for i in others)
    return add_mlp(np.concatenate([x[:1], x[best], [fused]]), params)


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


DYNAMIC = {"keep": (7, 3), "method": "dynamicvit"}


@functools.cache
def predicting():
    """The variables of all tests, with predictors in both blocks."""
    model = VisionTransformer(ViTSettings(**SMALL, token_reducer=DYNAMIC))
    params, draw = dict(variables()["params"]), np.random.default_rng(5)
    for block, shapes in variable_shapes(model, IMAGES)["params"].items():
        if block.startswith("blocks_"):
            own = jax.tree.map(lambda leaf: draw.normal(0, 0.7, leaf.shape), shapes)
            params[block] = params[block] | {"keep_predictor": own["keep_predictor"]}
    return {"params": jax.tree.map(np.float32, params)}


def scores_of(patches, left, params):
    """The log odds that the patches of one image (N, C) stay, as DynamicViT predicts them."""
    x = gelu(linear(layer_norm(patches, params["norm"]), params["fc_in"]))
    mean = (x[:, 4:] * left[:, None]).sum(0) / left.sum()
    x = np.concatenate([x[:, :4], np.broadcast_to(mean, (len(x), 4))], 1)
    for layer in ("fc1", "fc2"):
        x = gelu(linear(x, params[layer]))
    x = linear(x, params["fc_out"])
    return x[:, 0] - x[:, 1]


def test_dynamicvit_equals_the_loops():
    """Patches are dropped before attention; each is at home in the nearest one that stays."""
    model = VisionTransformer(ViTSettings(**SMALL, token_reducer=DYNAMIC))

    @jax.jit
    def run(variables):
        method = lambda module, x: (  # noqa: E731
            module._embed(x, (4, 3)), module.tokens(x, False), module.features(x, False)[0]
        )  # fmt: skip
        return model.apply(variables, IMAGES, method=method)

    embedded, found, features = run(predicting())
    params = jax.tree.map(np.float64, predicting()["params"])
    for b in range(2):
        x, home = np.asarray(embedded[b], np.float64), np.arange(12)
        for block, num_kept in (("blocks_0", 7), ("blocks_1", 3)):
            front, patches = x[:1], x[1:]
            score = scores_of(patches, np.ones(len(patches)), params[block]["keep_predictor"])
            best = np.argsort(-score)[:num_kept]
            home = ((patches[:, None] - patches[best]) ** 2).sum(-1).argmin(1)[home]
            x = np.concatenate([front, patches[best]])
            x = add_mlp(attend(x, params[block])[0], params[block])
        np.testing.assert_allclose(found[b], x, rtol=1e-4, atol=1e-4)
        expected = layer_norm(x[1:], params["norm"])[home]
        np.testing.assert_allclose(features[b].reshape(12, 8), expected, rtol=1e-3, atol=1e-3)


def test_dynamicvit_masks_dropped_patches_in_training():
    """Remaining tokens see nothing of the others; every parameter of a predictor has a gradient."""
    reducer = DYNAMIC | {"penalty": 0.5}
    model = VisionTransformer(ViTSettings(**SMALL, token_reducer=reducer, remat=True))
    rngs = {"routing": jax.random.key(0), "dropout": jax.random.key(1)}

    def steps(module, images):
        x = module._embed(images, (4, 3))
        own = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
        origin, seen = Origin(jnp.ones(x.shape[:2]), own), [(x, None)]
        for block in module.blocks:
            x, origin = block(x, origin, (4, 3), True)
            seen.append((x, origin))
        return seen, origin.restore(x[:, 1:])

    @jax.jit
    def run(params):
        def loss(params):
            given = {"params": params}
            found, state = model.apply(given, IMAGES, rngs=rngs, method=steps, mutable=["losses"])
            return (found[1] ** 2).sum(), (found, state["losses"])

        return jax.grad(loss, has_aux=True)(params)

    grads, ((seen, restored), losses) = jax.device_get(run(predicting()["params"]))
    params = jax.tree.map(np.float64, predicting()["params"])
    policies = [origin.kept.policy for _, origin in seen[1:]]
    assert set(np.unique(policies)) == {0, 1} and (policies[1] <= policies[0]).all()
    assert (policies[1].sum(1) < policies[0].sum(1)).any()
    for block in range(2):
        share = (7 / 12, 3 / 12)[block]
        expected = 0.5 * ((policies[block].mean(1) - share) ** 2).mean()
        np.testing.assert_allclose(losses[f"blocks_{block}"]["ratio"][0], expected, rtol=1e-5)
    for b in range(2):
        for block, policy in enumerate(policies):
            left = np.concatenate([[True], policy[b] > 0])
            before, after = (seen[at][0][b] for at in (block, block + 1))
            x = np.float64(before[left])
            expected = add_mlp(attend(x, params[f"blocks_{block}"])[0], params[f"blocks_{block}"])
            np.testing.assert_allclose(after[left], expected, rtol=1e-3, atol=1e-3)
        home = seen[-1][1].home[b]
        assert (policies[1][b][home] == 1).all() or not policies[1][b].any()
        np.testing.assert_array_equal(restored[b], seen[-1][0][b, 1:][home])
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        read = "classifier" not in name and not name.startswith("['norm']")
        assert np.isfinite(leaf).all() and (np.abs(leaf).max() > 0) == read, name


def test_kept_patches_are_drawn_with_their_probabilities():
    """The gradient is that of the soft choice; a dropped patch stays dropped."""
    images, logits = 4000, jnp.array([[0.0, 0.0], [1.0, -1.0], [-3.0, 1.0]])
    keys = jax.random.split(jax.random.key(0), images)
    left = jnp.array([1.0, 1.0, 0.0])
    given = jnp.broadcast_to(jax.nn.log_softmax(logits), (images, 3, 2))

    def mean(log_probabilities):
        policy = sample_kept(log_probabilities, jnp.broadcast_to(left, (images, 3)), keys)
        return policy.mean(0).sum(), policy

    slope, policy = jax.jit(jax.grad(mean, has_aux=True))(given)
    share = np.asarray(policy).mean(0)
    np.testing.assert_allclose(share, [0.5, 1 / (1 + math.exp(-2)), 0], atol=0.03)
    assert share[2] == 0 and set(np.unique(policy)) == {0, 1}
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (3, 2)))(keys)
    soft = np.asarray(jax.nn.softmax(given + noise))[..., 0]
    expected = soft * (1 - soft) * left / images
    np.testing.assert_allclose(slope[..., 0], expected, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(slope[..., 1], -expected, rtol=1e-4, atol=1e-9)


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
    sampled([("evit", (13, 8)), ("random", (12, 7)), ("tome", ()), ("kmedoids", ())]),
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
