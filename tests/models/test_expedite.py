"""Clustering and reconstruction in a plain host, which add no parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.models.vit import Origin, VisionTransformer, ViTSettings

IMAGES = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)  # 4 x 6 patches
SMALL = {"num_classes": 5, "dim": 8, "depth": 4, "num_heads": 2, "position_size": (64, 96)}


@functools.cache
def variables():
    return random_variables(VisionTransformer(ViTSettings(**SMALL)), IMAGES)


def apply(expedite=None, method="tokens", images=IMAGES, **settings):
    model = VisionTransformer(ViTSettings(**SMALL, expedite=expedite, **settings))
    return jax.jit(functools.partial(model.apply, train=False, method=method))(variables(), images)


def blocks(x, first, last):
    """Returns a function that applies some blocks of the host to any tokens."""
    params = variables()["params"]
    model = VisionTransformer(ViTSettings(**SMALL))

    def run(module, x):
        for block in module.blocks[first:last]:
            x, _ = block(x, Origin(None, None), (4, 6), False)
        return x

    return model.apply({"params": params}, x, method=run)


def embedded():
    params = {k: v for k, v in variables()["params"].items() if "blocks" not in k}
    model = VisionTransformer(ViTSettings(**SMALL))
    embed = lambda module: module._embed(IMAGES, (4, 6))  # noqa: E731
    return model.apply({"params": params}, method=embed)


def test_middle_blocks_see_the_centers():
    expedite = Expedite(alpha=1, beta=2, clusters=(2, 3), window=3, temperature=5.0, neighbors=4)
    x = blocks(embedded(), 0, 1)
    front, patches = x[:, :1], x[:, 1:]
    centers = ops.cluster_superpixels(patches, (4, 6), (2, 3), window=3, temperature=5.0)
    assert centers.shape == (2, 6, 8)
    x = blocks(jnp.concatenate([front, centers], 1), 1, 3)
    patches = ops.reconstruct_tokens(patches, centers, x[:, 1:], neighbors=4, temperature=5.0)
    expected = blocks(jnp.concatenate([x[:, :1], patches], 1), 3, 4)
    np.testing.assert_allclose(apply(expedite), expected, atol=1e-4)
    assert np.abs(apply(expedite) - apply()).max() > 0.01
    assert apply(expedite, "features")[0].shape == (2, 4, 6, 8)


def test_logits_are_reconstructed():
    """A linear head before the reconstruction equals the same head on reconstructed tokens."""
    settings = {"alpha": 1, "beta": 3, "clusters": (2, 3), "temperature": 99.0, "neighbors": 4}

    def dense(where):
        model = VisionTransformer(ViTSettings(**SMALL, expedite=settings | {"where": where}))

        def run(module, images):
            tokens, restore = module.encode(images, False)
            return restore(tokens[..., :3])

        return jax.jit(functools.partial(model.apply, method=run))(variables(), IMAGES)

    model = VisionTransformer(ViTSettings(**SMALL, expedite=settings | {"where": "logits"}))
    tokens = model.apply(variables(), IMAGES, train=False, method="tokens")
    assert tokens.shape == (2, 7, 8)
    patches = blocks(embedded(), 0, 1)[:, 1:]
    centers = ops.cluster_superpixels(patches, (4, 6), (2, 3), temperature=99.0)
    normed = model.apply(variables(), tokens[:, 1:], method=lambda module, x: module.norm(x))
    expected = ops.reconstruct_tokens(patches, centers, normed, neighbors=4, temperature=99.0)
    np.testing.assert_allclose(
        dense("logits"), expected[..., :3].reshape(2, 4, 6, 3), rtol=1e-3, atol=1e-4
    )
    assert np.abs(dense("blocks") - dense("logits")).max() > 0.01


def test_a_smaller_image():
    """All blocks see the map of the resized image; the result is resized."""
    settings = {"alpha": 0, "beta": 4, "clusters": (2, 3), "mode": "bilinear"}
    small = jax.image.resize(IMAGES, (2, 32, 48, 3), "bilinear")
    expected = apply(images=small, method="features")[0]
    expected = jax.image.resize(expected, (2, 4, 6, 8), "bilinear")
    (found,) = apply(settings | {"where": "logits"}, "features")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(
        apply(settings, "__call__"), apply(images=small, method="__call__"), atol=1e-5
    )


def test_as_many_centers_as_tokens_change_nothing():
    """Every token is its only neighbour, and its own nearest centre."""
    expedite = {"alpha": 2, "beta": 1, "clusters": (4, 6), "window": 1, "neighbors": 1}
    np.testing.assert_allclose(apply(expedite), apply(), atol=1e-5)
    np.testing.assert_allclose(apply(expedite, "__call__"), apply(method="__call__"), atol=1e-5)


def test_the_temperature_follows_the_tokens_of_each_image():
    """0.05 times the median squared distance of neighbours, found with loops."""
    scale = np.array([0.01, 1, 30], np.float32)[:, None, None, None]
    maps = scale * np.random.default_rng(1).normal(size=(3, 5, 7, 4)).astype(np.float32)
    wanted = []
    for x in maps.astype(np.float64):
        pairs = [(x[i, j], x[i + 1, j]) for i in range(4) for j in range(7)]
        pairs += [(x[i, j], x[i, j + 1]) for i in range(5) for j in range(6)]
        wanted.append(0.05 * np.median([np.sum((a - b) ** 2) for a, b in pairs]))
    setting = Expedite(alpha=1, beta=2, clusters=(3, 3))
    np.testing.assert_allclose(setting.temperature_for(maps), wanted, rtol=1e-5)

    tokens = maps.reshape(3, 35, 4)
    centers = setting.cluster(tokens, (5, 7))
    found = setting.reconstruct(tokens, centers, centers, (5, 7))
    for i in range(3):
        fixed, x = dataclasses.replace(setting, temperature=wanted[i]), tokens[i : i + 1]
        by_number = fixed.cluster(x, (5, 7))
        tolerance = 1e-4 * scale[i].item()
        np.testing.assert_allclose(centers[i], by_number[0], atol=tolerance)
        by_number = fixed.reconstruct(x, by_number, by_number, (5, 7))
        np.testing.assert_allclose(found[i], by_number[0], atol=tolerance)


def test_equal_tokens_and_single_tokens_have_a_temperature():
    for maps in (np.full((2, 4, 4, 3), 7.0), np.zeros((2, 4, 4, 3)), np.ones((2, 1, 1, 3))):
        tokens = maps.astype(np.float32).reshape(2, -1, 3)
        setting = Expedite(alpha=1, beta=1, clusters=maps.shape[1:3])
        centers = setting.cluster(tokens, maps.shape[1:3])
        found = setting.reconstruct(tokens, centers, centers, maps.shape[1:3])
        np.testing.assert_allclose(found, tokens, atol=1e-5)
    setting = Expedite(alpha=1, beta=1, clusters=(2, 2))
    one = np.zeros((1, 16, 3), np.float32)
    one[0, 5] = 9  # most neighbours are equal
    assert np.isfinite(setting.cluster(one, (4, 4))).all()


def test_there_may_be_more_rows_of_centers_than_of_tokens():
    found = apply({"alpha": 1, "beta": 3, "clusters": (6, 2), "temperature": 5.0}, "features")[0]
    assert found.shape == (2, 4, 6, 8) and np.isfinite(found).all()


def test_the_parameters_are_those_of_the_host():
    expedite = {"alpha": 1, "beta": 3, "clusters": (2, 2)}
    model = VisionTransformer(ViTSettings(**SMALL, expedite=expedite))
    found = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, variables())
    hash(model)


@pytest.mark.parametrize(
    ("expedite", "message"),
    [
        (
            {"alpha": -1, "beta": 1},
            "expedite.alpha=-1 is not valid; valid: whole numbers from 0",
        ),
        (
            {"alpha": 2, "beta": 3},
            "expedite.beta=3 is not valid; valid: 1 to 2 in a model or stage of 4",
        ),
        ({"alpha": 4, "beta": 1}, "expedite.alpha=4 is not valid"),
        (
            {"alpha": 1, "beta": 1, "window": 4},
            "expedite.window=4 is not valid; valid: odd numbers",
        ),
        ({"alpha": 1, "beta": 1, "temperature": 0.0}, "expedite.temperature=0.0 is not valid"),
        (
            {"alpha": 1, "beta": 1, "temperature": "Auto"},
            "expedite.temperature='Auto' is not valid; valid: numbers from .*; or auto",
        ),
        (
            {"alpha": 1, "beta": 1, "clusters": (5, 6)},
            r"clusters=\(5, 6\) is not valid; .*24 .* 4 x 6",
        ),
        (
            {"alpha": 1, "beta": 1, "mode": "hard", "neighbors": 3},
            "neighbors=3 is not valid; valid: 20 with expedite.mode='hard', where it has no effect",
        ),
        (
            {"alpha": 1, "beta": 1, "iterations": 0, "window": 3},
            "window=3 is not valid; valid: 5 with expedite.iterations=0, where it has no effect",
        ),
        ({"alpha": 1, "beta": 1, "clusters": (0, 6)}, r"clusters=\(0, 6\) is not valid"),
        ({"alpha": 1, "beta": 1, "tau": 3}, "expedite has no 'tau'; valid: alpha, beta, clusters"),
        ({"beta": 1}, "expedite.alpha is missing"),
        ({"alpha": 0, "beta": 4}, "mode='soft' is not valid with expedite.alpha=0"),
        ({"alpha": 1, "beta": 1, "mode": "nearest"}, "mode='nearest' is not valid; valid: soft"),
        ({"alpha": 1, "beta": 2, "where": "logits"}, "beta=2 is not valid with .*valid: 3, all"),
    ],
)
def test_mistakes_are_named(expedite, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: apply({"clusters": (2, 3)} | expedite))


def test_a_reducer_leaves_no_map_to_reconstruct():
    expedite = {"alpha": 1, "beta": 1, "clusters": (2, 3)}
    with pytest.raises(UserError, match="expedite is not valid with a token_reducer"):
        apply(expedite, token_reducer={"keep": (9, 9, 9, 9)})
