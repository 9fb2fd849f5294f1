"""Linear layers: values and gradients, and other platforms get the program of autodiff."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tokenvit_jax import ops


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
