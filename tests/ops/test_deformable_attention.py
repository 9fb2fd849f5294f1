"""Deformable attention against float64 loops: both forms, gradients and transformations."""

import functools
import importlib
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.ops import deformable_attention

MODULE = importlib.import_module("tokenvit_jax.ops.deformable_attention")  # `ops` has an equal name
SHAPES = ((2, 3), (5, 4), (1, 7))
CELLS = sum(height * width for height, width in SHAPES)
BATCH, QUERIES, HEADS, POINTS, DIM = 2, 6, 3, 2, 4
attend = functools.partial(deformable_attention, shapes=SHAPES)


def draw(seed=0, spread=1.0):
    """Returns values, places and weights; with a spread of 1, a part of the places is outside."""
    rng = np.random.default_rng(seed)
    value = rng.normal(size=(BATCH, CELLS, HEADS, DIM))
    places = 0.5 + spread * (
        rng.uniform(size=(BATCH, QUERIES, HEADS, len(SHAPES), POINTS, 2)) - 0.5
    )
    weights = rng.normal(size=places.shape[:-1])
    return value, places, weights


def single(*arrays):
    return tuple(np.asarray(x, np.float32) for x in arrays)


def naive(value, places, weights, shapes=SHAPES):
    """Sums up cell by cell in float64."""
    y = np.zeros((*weights.shape[:3], value.shape[-1]))
    starts = [0, *itertools.accumulate(height * width for height, width in shapes)]
    for image, query, head, level, point in np.ndindex(*weights.shape):
        height, width = shapes[level]
        left, top = places[image, query, head, level, point] * (width, height) - 0.5
        sample = np.zeros(value.shape[-1])
        for row in (math.floor(top), math.floor(top) + 1):
            for column in (math.floor(left), math.floor(left) + 1):
                if 0 <= row < height and 0 <= column < width:
                    cell = value[image, starts[level] + row * width + column, head]
                    sample += (1 - abs(top - row)) * (1 - abs(left - column)) * cell
        y[image, query, head] += weights[image, query, head, level, point] * sample
    return y


def loss(*arrays):
    return jnp.sum(jnp.sin(attend(*arrays)))


@pytest.mark.parametrize("spread", [0.6, 1.6, 9.0])
def test_equals_loops(spread):
    arrays = draw(spread=spread)
    expected = naive(*arrays)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(attend(*single(*arrays)), expected, atol=3e-6)


def test_forms_agree():
    """The forms of a CPU, which all other tests run here, and those of accelerators."""
    value, places, weights = single(*draw(1, 1.6))
    corners = MODULE._corners_of_levels(places, weights, SHAPES)
    levels = list(zip(MODULE._levels(value, SHAPES), *corners, strict=True))
    total = sum(MODULE._sum_at_once(*level, jnp.float32) for level in levels)
    expected = naive(value, places, weights)
    np.testing.assert_allclose(total.swapaxes(1, 2), expected, atol=3e-6)
    d_output = jax.random.normal(jax.random.key(0), total.shape)
    for level in levels:
        at_once = MODULE._gradients_at_once(*level, d_output)
        of_einsum = MODULE._gradients_of_einsum(*level, d_output)
        for found, other in zip(at_once, of_einsum, strict=True):
            assert np.abs(other).max() > 0.5
            np.testing.assert_allclose(found, other, atol=3e-6)


@pytest.mark.parametrize("spread", [0.6, 1.6])
def test_gradients_are_slopes(spread):
    """Moves along a random direction change the loops' sum as the gradients say."""
    arrays, probe = draw(2, spread), np.random.default_rng(3).normal(size=(2, 6, 3, 4))
    gradients = jax.jit(jax.grad(lambda *x: jnp.sum(probe * attend(*x)), (0, 1, 2)))(
        *single(*arrays)
    )
    for i, gradient in enumerate(gradients):
        direction = np.random.default_rng(i).normal(size=gradient.shape)
        step = 1e-6 * direction
        ends = (
            np.sum(probe * naive(*arrays[:i], arrays[i] + sign * step, *arrays[i + 1 :]))
            for sign in (1, -1)
        )
        slope = (next(ends) - next(ends)) / 2e-6
        assert abs(slope) > 0.5
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-4)


def test_places_outside():
    """The border is where a cell's share ends: half a cell outside of the map."""
    value, places, weights = single(*draw())
    for outside in (-1.0, 2.0, 1e20, -1e20, np.inf):
        y, pull = jax.vjp(attend, value, np.full_like(places, outside), weights)
        assert not np.any(y)
        assert not any(np.any(x) for x in pull(jnp.ones_like(y)))
    half = np.zeros_like(places)
    half[..., 1] = 0.5  # the left border, at half the height
    shapes, weights = ((1, 2),), np.ones_like(weights[:, :, :, :1])
    y = deformable_attention(value[:, :2], half[:, :, :, :1], weights, shapes=shapes)
    np.testing.assert_allclose(y[:, 0], POINTS * value[:, 0] / 2, rtol=1e-6)


def test_transformations():
    arrays = single(*draw(4, 1.6))
    y, gradients = attend(*arrays), jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
    np.testing.assert_allclose(jax.jit(attend)(*arrays), y, atol=3e-6)
    one_by_one = jax.vmap(lambda *x: attend(*(part[None] for part in x))[0])
    np.testing.assert_allclose(one_by_one(*arrays), y, atol=3e-6)
    split = [x.reshape(2, 1, *x.shape[1:]) for x in arrays]
    np.testing.assert_allclose(jax.pmap(attend)(*split)[:, 0], y, atol=3e-6)
    of_devices = jax.pmap(jax.grad(loss, (0, 1, 2)))(*split)
    for found, expected in zip(of_devices, gradients, strict=True):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found[:, 0], expected, atol=2e-6)


def test_types():
    value, places, weights = single(*draw())
    y = attend(value.astype(jnp.bfloat16), places, weights.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), naive(value, places, weights), atol=0.08)
    with jax.enable_x64(True):
        exact = attend(*(jnp.asarray(x, jnp.float64) for x in draw()))
        assert exact.dtype == jnp.float64
    np.testing.assert_allclose(exact, naive(*draw()), atol=1e-12)


def test_any_number_of_images():
    arrays = single(*draw())
    (batch,) = export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in arrays]
    exported = export.export(jax.jit(attend))(*shapes)
    np.testing.assert_allclose(exported.call(*arrays), attend(*arrays), atol=3e-6)


def test_cost():
    macs = count_macs(attend, *single(*draw()))
    assert macs == 4 * BATCH * QUERIES * HEADS * len(SHAPES) * POINTS * DIM


def test_wrong_shapes():
    value, places, weights = single(*draw())
    with pytest.raises(ValueError, match=r"value has shape \(2, 32, 3, 4\); expected \(batch, 33"):
        attend(value[:, 1:], places, weights)
    with pytest.raises(ValueError, match=r"weights has shape .* expected \(2, queries, 3, 3, poi"):
        attend(value, places, weights[:, :, :, :2])
    with pytest.raises(ValueError, match=r"places has shape .* expected \(2, 6, 3, 3, 2, 2\)"):
        attend(value, places[..., :1], weights)
