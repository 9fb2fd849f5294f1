"""Linear layers: values and gradients, and other platforms get the program of autodiff."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tokenvit_jax import ops
from tokenvit_jax.ops import linear


def plain_product(x, kernel):
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def gradients(product):
    def run(x, kernel, dy):
        y, pull = jax.vjp(product, x, kernel)
        return y, *pull(dy)

    return jax.jit(run)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 4), (2, 600, 8, 4), (1100, 4, 8), (6, 4)])
def test_equals_the_product_in_float64(shape):
    *tokens, channels, dim = shape
    rng = np.random.default_rng(0)
    shapes = (*tokens, channels), (channels, dim), (*tokens, dim)
    x, kernel, dy = (rng.normal(size=shape) for shape in shapes)
    found = gradients(ops.linear_product)(*(a.astype(np.float32) for a in (x, kernel, dy)))
    expected = x @ kernel, dy @ kernel.T, x.reshape(-1, channels).T @ dy.reshape(-1, dim)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max() + 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_get_the_program_of_autodiff(platform, dtype):
    x, kernel = jnp.ones((2, 600, 8), dtype), jnp.ones((8, 4), dtype)

    def program(product):
        traced = gradients(product).trace(x, kernel, x[..., :4])
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        # The choice of a form is a constant, which the compiler removes with its conditional.
        operations = re.findall(r"= stablehlo\.(?!constant)(\w+)[^,]*(.*)", text)
        assert len(operations) == 4  # three products and a transposition
        return operations

    assert program(ops.linear_product) == program(plain_product)


def parts_and_gradients(x, kernel, bias, gradients):
    parts, pull = jax.vjp(lambda *args: ops.linear_parts(*args, 3), x, kernel, bias)
    return *parts, *pull(gradients)


def test_parts_equal_those_of_the_whole_layer_in_float64():
    rng = np.random.default_rng(0)
    x, kernel, bias, dy = (rng.normal(size=size) for size in ((2, 5, 4), (4, 6), (6,), (2, 5, 6)))
    narrow = [a.astype(np.float32) for a in (x, kernel, bias)]
    found = parts_and_gradients(*narrow, tuple(np.split(dy.astype(np.float32), 3, -1)))
    y, rows, gradients = x @ kernel + bias, x.reshape(-1, 4), dy.reshape(-1, 6)
    expected = *np.split(y, 3, -1), dy @ kernel.T, rows.T @ gradients, gradients.sum(0)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_parts_by_products_of_their_own():
    rng = np.random.default_rng(0)
    arguments = [rng.normal(size=size).astype(np.float32) for size in ((2, 5, 4), (4, 6), (6,))]
    for a, b in zip(
        linear._by_parts(*arguments, parts=3), ops.linear_parts(*arguments, 3), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "platform", "differentiated", "products"),
    [
        (2048, "cuda", False, 3),
        (2048, "cuda", True, 1),
        (2048, "tpu", False, 1),
        (64, "cuda", False, 1),  # small parts
    ],
)
def test_products_of_the_parts(tokens, platform, differentiated, products):
    x, kernel, bias = jnp.ones((8, tokens, 4)), jnp.ones((4, 192)), jnp.ones(192)

    def run(x):
        return ops.linear_parts(x, kernel, bias, 3)

    function = (lambda x: jax.vjp(run, x)[0]) if differentiated else run
    text = jax.jit(function).trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.dot_general") == products


def test_parts_of_different_sizes():
    with pytest.raises(ValueError, match="parts=4 does not divide the 6 outputs"):
        ops.linear_parts(jnp.ones((2, 3)), jnp.ones((3, 6)), jnp.ones(6), 4)
