"""The model of segmentation by masks: sizes, types, devices, gradients and clustered backbones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from lowering import array, lowers
from random_variables import random_variables

from tokenvit_jax.errors import UserError
from tokenvit_jax.heads import Mask2Former
from tokenvit_jax.models import create_model
from tokenvit_jax.tasks.masks.model import MaskSegmenter

SWIN = {
    "dims": (8, 16, 32, 64), "num_heads": (1, 2, 2, 4), "depths": (0, 0, 2, 0), "window_size": 4,
    "num_classes": 0,
}  # fmt: skip
HEAD = Mask2Former(
    3, num_queries=5, channels=32, num_heads=4, num_points=2, encoder_depth=1, encoder_hidden=16,
    depth=3, hidden=16,
)  # fmt: skip
IMAGES = np.random.default_rng(0).normal(size=(2, 40, 52, 3)).astype(np.float32)


def small_model(name="swin_t", head=HEAD, **changes):
    return MaskSegmenter(create_model(name, **SWIN | changes), head)


@functools.cache
def variables():
    """Returns random variables: LayerNorms scale by about 1, biases are not 0."""
    noise = random_variables(small_model(), IMAGES)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x / 2 + (path[-1].key == "scale"), noise
    )


@functools.cache
def predicted(train=True):
    return jax.jit(small_model().apply, static_argnums=2)(variables(), IMAGES, train)


def loss(variables, images):
    found = small_model().apply(variables, images, True)
    return sum(jnp.mean(jnp.sin(x)) for x in found)


def test_shapes():
    """Sides that no stride divides are rounded up."""
    for train, number in ((True, 4), (False, 1)):
        found = predicted(train)
        assert found.logits.shape == (number, 2, 5, 4)
        assert found.masks.shape == (number, 2, 5, 10, 13)
        assert np.all(np.isfinite(found.logits))
        assert np.all(np.isfinite(found.masks))


@pytest.mark.slow
def test_images_do_not_depend_on_each_other():
    other = jax.jit(small_model().apply, static_argnums=2)(variables(), IMAGES[::-1], True)
    for x, y in zip(predicted(), other, strict=True):
        np.testing.assert_allclose(x[:, ::-1], y, atol=1e-5 * np.abs(x).max())
        assert np.abs(x[-1, 0] - x[-1, 1]).max() > 0.03 * np.abs(x).max()


@pytest.mark.slow
def test_devices():
    given = variables()
    run = jax.pmap(lambda x: small_model().apply(given, x, True), out_axes=1)
    for x, y in zip(predicted(), run(IMAGES[:, None]), strict=True):
        np.testing.assert_allclose(x, y[:, :, 0], atol=1e-5 * np.abs(x).max())


@pytest.mark.slow
def test_any_number_of_images():
    given, (batch,) = variables(), export.symbolic_shape("b")
    run = jax.jit(lambda x: small_model().apply(given, x, False))
    exported = export.export(run)(array(batch, *IMAGES.shape[1:]))
    for x, y in zip(predicted(False), exported.call(IMAGES), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(x).max())


@pytest.mark.slow
def test_gradients():
    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(variables(), IMAGES)):
        assert np.all(np.isfinite(leaf))
        assert np.any(leaf)


@pytest.mark.slow
def test_narrow_types():
    """The backbone and the queries compute in bfloat16, the pixel decoder in float32."""
    head = HEAD.clone(dtype=jnp.bfloat16)
    model = small_model(head=head, dtype=jnp.bfloat16)
    run = functools.partial(
        model.apply, train=True, capture_intermediates=True, mutable="intermediates"
    )
    found, state = jax.jit(run)(variables(), IMAGES)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.float32)}
    inner = state["intermediates"]["head"]
    types = lambda tree: {x.dtype.name for x in jax.tree.leaves(tree)}  # noqa: E731
    assert types(inner["pixel_decoder"]) == {"float32"}
    assert types(inner["decoder"]["layer_0"]["__call__"]) == {"bfloat16"}
    assert types(state["intermediates"]["map_norm_1"]) == {"bfloat16"}


def test_norms_of_maps():
    """Maps that end in a LayerNorm, as ClusTR's, get no second one."""
    clustr = create_model("clustr_t", depths=(1, 1, 1, 1), num_classes=0)
    for model, count in ((small_model(), 4), (MaskSegmenter(clustr, HEAD), 0)):
        shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
        norms = {f"map_norm_{i}" for i in range(1, count + 1)}
        assert shapes.keys() == {"backbone", "head", *norms}


@pytest.mark.slow
def test_clustered_backbone():
    """Clustering changes maps from the third on, and no parameters."""
    expedite = {"alpha": 1, "beta": 1, "clusters": (2, 3), "window": 3, "temperature": 1.0}
    model = small_model(expedite=expedite)
    found = jax.jit(model.apply, static_argnums=2)(variables(), IMAGES, True)
    for x, y in zip(predicted(), found, strict=True):
        assert np.abs(x - y).max() > 1e-3 * np.abs(x).max()


@pytest.mark.slow
def test_lowers_for_accelerators():
    shapes = jax.tree.map(lambda x: array(*x.shape), variables())
    lowers(jax.grad(loss), shapes, array(2, 64, 96, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_queries": 0}, "num_queries=0 is not valid"),
        ({"channels": 48}, "num_groups=32 does not divide 48 channels"),
        ({"num_heads": 5}, "num_heads=5 does not divide 32 channels"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(small_model(head=HEAD.clone(**changes)).init, jax.random.key(0), IMAGES)
