"""Convolutions against float64 loops, with gradients, and where the products come first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tokenvit_jax import ops
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.ops import convolution
from tokenvit_jax.ops.resize import linear_weights

RNG = np.random.default_rng(0)


def naive_conv(x, kernel, stride, padding):
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    side = kernel.shape[0]
    height, width = ((n - side) // stride + 1 for n in x.shape[1:3])
    y = np.zeros((len(x), height, width, kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            seen = x[:, stride * i : stride * i + side, stride * j : stride * j + side]
            y[:, i, j] = np.tensordot(seen, kernel, 3)
    return y


def naive_resize(x, size, align_corners):
    rows, columns = (
        linear_weights(old, new, align_corners) for old, new in zip(x.shape[1:3], size, strict=True)
    )
    return np.einsum("hH,wW,bHWc->bhwc", rows, columns, x)


def gradients(naive, inputs, dy):
    """Returns the gradients of a function that is affine in each of its arrays, by its values."""
    found, value = [], np.sum(naive(*inputs) * dy)
    for number, x in enumerate(inputs):
        dx = np.zeros(x.shape)
        for place in np.ndindex(x.shape):
            changed = x.copy()
            changed[place] += 1
            dx[place] = np.sum(naive(*inputs[:number], changed, *inputs[number + 1 :]) * dy) - value
        found.append(dx)
    return found


def single(arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def check(run, naive, inputs):
    """Compares values and gradients with loops."""
    expected = naive(*inputs)
    dy = RNG.normal(size=expected.shape)
    y, pull = jax.vjp(jax.jit(run), *single(inputs))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    found = pull(jnp.asarray(dy, jnp.float32))
    for grad, by_loops in zip(found, gradients(naive, inputs, dy), strict=True):
        np.testing.assert_allclose(grad, by_loops, atol=3e-5)


@pytest.mark.parametrize("by_products", [True, False])
@pytest.mark.parametrize(
    ("stride", "padding"), [(1, ((1, 1), (1, 1))), (2, ((0, 1), (1, 0))), (2, ((1, 1), (1, 1)))]
)
def test_convolution_equals_its_definition(monkeypatch, stride, padding, by_products):
    if by_products:
        monkeypatch.setattr(convolution, "_MANY_PIXELS", 0)
        monkeypatch.setattr(convolution, "_MANY_CHANNELS", 0)
    inputs = RNG.normal(size=(2, 5, 4, 3)), RNG.normal(size=(3, 3, 3, 2))
    naive = functools.partial(naive_conv, stride=stride, padding=padding)
    run = lambda x, kernel: ops.conv_with_padding(x, kernel, stride, padding)  # noqa: E731
    check(run, naive, inputs)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [1, 3, 5])
def test_padding_keeps_the_size(side, stride):
    x, kernel = RNG.normal(size=(2, 5, 4, 3)), RNG.normal(size=(side, side, 3, 2))
    y = ops.conv(*single((x, kernel)), stride)
    expected = naive_conv(x, kernel, stride, ((side // 2, side // 2),) * 2)
    assert y.shape == (2, -(-5 // stride), -(-4 // stride), 2)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_gradient_of_the_kernel_by_products_is_that_of_xla():
    """At the smallest shape that takes the products on a CPU."""
    x, kernel = RNG.normal(size=(1, 32, 32, 128)), RNG.normal(size=(3, 3, 128, 128))
    x, kernel, dy = single((x, kernel, RNG.normal(size=x.shape)))

    def plain(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

    def grad(run):
        return jax.jit(lambda x, kernel, dy: jax.vjp(run, x, kernel)[1](dy))

    lowered = grad(ops.conv).lower(x, kernel, dy)
    assert "stablehlo.while" in lowered.as_text()
    assert "stablehlo.while" not in grad(plain).lower(x, kernel, dy).as_text()
    pairs = zip(lowered.compile()(x, kernel, dy), grad(plain)(x, kernel, dy), strict=True)
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


# Shapes of the maps, size, side of the kernel, align_corners.
RESIZED = [
    ([(4, 6, 2), (2, 3, 1), (1, 1, 2), (3, 3, 1)], (4, 6), 3, False),
    ([(2, 3, 2)], (6, 6), 3, False),
    ([(3, 2, 2)], (6, 8), 3, True),
    ([(3, 4, 1)], (6, 8), 5, True),
    ([(4, 3, 2), (5, 5, 1)], (6, 5), 1, False),  # not a whole number of times as large, larger
    ([(8, 8, 1)], (4, 4), 3, False),  # smaller: nothing is saved
]


@pytest.mark.parametrize(("shapes", "size", "side", "align_corners"), RESIZED)
def test_products_first_equal_the_convolution_of_resized_maps(shapes, size, side, align_corners):
    def naive(*inputs):
        *maps, kernel = inputs
        joined = np.concatenate([naive_resize(x, size, align_corners) for x in maps], -1)
        return naive_conv(joined, kernel, 1, ((side // 2, side // 2),) * 2)

    def run(*inputs):
        *maps, kernel = inputs
        return ops.conv_of_resized(maps, kernel, size, align_corners)

    maps = [RNG.normal(size=(2, *shape)) for shape in shapes]
    kernel = RNG.normal(size=(side, side, sum(shape[-1] for shape in shapes), 2))
    check(run, naive, [*maps, kernel])
    narrow = run(*(jnp.asarray(x, jnp.bfloat16) for x in (*maps, kernel)))
    assert narrow.dtype == jnp.bfloat16
    expected = naive(*maps, kernel)
    np.testing.assert_allclose(narrow.astype(float), expected, atol=0.03 * np.abs(expected).max())


def test_products_are_counted_as_if_maps_were_resized_first():
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    maps = [shape(1, 8, 6, 5), shape(1, 4, 3, 7)]
    run = lambda maps, kernel: ops.conv_of_resized(maps, kernel, (8, 6))  # noqa: E731
    assert count_macs(run, maps, shape(3, 3, 12, 2)) == 8 * 6 * 9 * 12 * 2


def test_products_are_on_the_small_maps():
    """Of a map of half the size, a quarter of the products is left."""
    x, kernel = jnp.zeros((1, 8, 8, 16)), jnp.zeros((3, 3, 16, 32))
    run = functools.partial(ops.conv_of_resized, size=(16, 16))
    jaxpr = jax.make_jaxpr(lambda x, kernel: run([x], kernel))(x, kernel).jaxpr
    [call] = jaxpr.eqns
    assert count_macs(jax.extend.core.jaxpr_as_fun(call.params["jaxpr"]), x, kernel) == (
        8 * 8 * 9 * 16 * 32
    )
