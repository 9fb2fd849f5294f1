import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from ml_collections import ConfigDict

from tokenvit_jax.tasks.classification.mixing import Mixing, draw_mixing, mix_batch

HEIGHT, WIDTH = 12, 20


def mix_config(mixup=0.0, cutmix=0.0, probability=1.0, switch_probability=0.5):
    return ConfigDict(
        {
            "mixup": mixup,
            "cutmix": cutmix,
            "probability": probability,
            "switch_probability": switch_probability,
        }
    )


def draw_many(config, count=400):
    draw = jax.jit(jax.vmap(lambda key: draw_mixing(key, config, HEIGHT, WIDTH)))
    return jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), count)))


def naive_mix(images, targets, ratio, box, cutmix):
    mixed_images, mixed_targets = images.copy(), targets.copy()
    top, bottom, left, right = box
    for i in range(len(images)):
        partner = i + 1 if i % 2 == 0 else i - 1
        if cutmix:
            for row in range(top, bottom):
                for column in range(left, right):
                    mixed_images[i, row, column] = images[partner, row, column]
        else:
            mixed_images[i] = ratio * images[i] + (1 - ratio) * images[partner]
        mixed_targets[i] = ratio * targets[i] + (1 - ratio) * targets[partner]
    return mixed_images, mixed_targets


@pytest.mark.parametrize("cutmix", [False, True])
def test_mix_batch_equals_loops(cutmix):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(6, HEIGHT, WIDTH, 3)).astype(np.float32)
    targets = rng.dirichlet(np.ones(4), 6).astype(np.float32)
    box = (2, 9, 0, 7)
    mixing = Mixing(jnp.float32(0.3), jnp.array(box), jnp.array(cutmix))
    found = mix_batch(jnp.asarray(images), jnp.asarray(targets), mixing)
    expected = naive_mix(images, targets, np.float32(0.3), box, cutmix)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)


def test_ratio_of_cutmix_is_the_area_outside_the_box():
    drawn = draw_many(mix_config(cutmix=1.0))
    assert drawn.cutmix.all()
    top, bottom, left, right = drawn.box.T
    assert (top >= 0).all() and (bottom <= HEIGHT).all()
    assert (left >= 0).all() and (right <= WIDTH).all()
    area = (bottom - top) * (right - left)
    np.testing.assert_allclose(drawn.ratio, 1 - area / (HEIGHT * WIDTH), rtol=1e-6)
    # Some boxes are clipped at a border and thus smaller than the drawn ratio.
    assert (top == 0).any() and (right == WIDTH).any()


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8, 1.0, 5.0])
def test_mixup_ratio_follows_its_beta_distribution(alpha):
    ratio = draw_many(mix_config(mixup=alpha), 20_000).ratio
    assert np.all((ratio >= 0) & (ratio <= 1))
    assert scipy.stats.kstest(ratio, "beta", (alpha, alpha)).pvalue > 1e-3


def test_mixing_has_no_loop():
    """In every round of a loop, a GPU would wait for the host."""
    config = mix_config(mixup=0.8, cutmix=1.0)
    draw = jax.jit(lambda key: draw_mixing(key, config, HEIGHT, WIDTH))
    lowered = draw.trace(jax.random.key(0)).lower(lowering_platforms=("cuda",))
    assert "stablehlo.while" not in lowered.as_text()


def test_switching_takes_each_kind_with_its_probability():
    drawn = draw_many(mix_config(mixup=0.8, cutmix=1.0, switch_probability=0.25), 2000)
    assert drawn.cutmix.mean() == pytest.approx(0.25, abs=0.04)


def test_unmixed_batches_keep_their_images():
    drawn = draw_many(mix_config(mixup=0.8, cutmix=1.0, probability=0.5), 2000)
    assert (drawn.ratio == 1).mean() == pytest.approx(0.5, abs=0.05)
    images = jax.random.normal(jax.random.key(1), (2, HEIGHT, WIDTH, 3))
    targets = jnp.eye(2)
    index = int(np.flatnonzero((drawn.ratio == 1) & drawn.cutmix)[0])
    mixing = jax.tree.map(lambda x: jnp.asarray(x[index]), drawn)
    np.testing.assert_array_equal(mix_batch(images, targets, mixing)[0], images)
    np.testing.assert_array_equal(mix_batch(images, targets, mixing)[1], targets)


def test_odd_batch_is_refused():
    mixing = Mixing(jnp.float32(0.5), jnp.zeros(4, jnp.int32), jnp.array(False))
    with pytest.raises(ValueError, match="batch of 3 cannot be paired"):
        mix_batch(jnp.zeros((3, HEIGHT, WIDTH, 3)), jnp.zeros((3, 2)), mixing)
