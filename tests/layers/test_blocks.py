"""GELU and patch embedding against float64 formulas and loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.layers import PatchEmbedding, gelu


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_gelu_and_its_gradient(dtype):
    with jax.enable_x64(True):
        x = np.linspace(-8, 8, 129)  # exact in bfloat16, like dy
        dy = np.linspace(3, -5, 129)
        y, pull = jax.vjp(gelu, jnp.asarray(x, dtype))
        dx = pull(jnp.asarray(dy, dtype))[0]
        assert y.dtype == dx.dtype == dtype
        # erfc does not cancel for x far below 0.
        distribution = np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in x])
        density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
        eps = float(jnp.finfo(dtype).eps)
        # bfloat16 is rounded once, from float32.
        near = {"rtol": eps, "atol": 10 * min(eps, 2**-23)}
        np.testing.assert_allclose(y.astype(float), x * distribution, **near)
        np.testing.assert_allclose(dx.astype(float), dy * (distribution + x * density), **near)


@pytest.mark.parametrize(("kernel_size", "stride", "padding"), [(7, 4, 3), (3, 2, 1)])
def test_patch_embedding_equals_the_loops(kernel_size, stride, padding):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 13, 10, 3)).astype(np.float32)
    layer = PatchEmbedding(5, kernel_size, stride, padding, epsilon=0.1)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    params = jax.tree.map(np.float64, variables["params"])

    around = (padding, kernel_size)  # more zeros beyond the map than any patch reaches
    padded = np.pad(x.astype(np.float64), ((0, 0), around, around, (0, 0)))
    expected = np.zeros((2, math.ceil(13 / stride), math.ceil(10 / stride), 5))
    for i, j in np.ndindex(expected.shape[1:3]):
        top, left = stride * i, stride * j
        patch = padded[:, top : top + kernel_size, left : left + kernel_size]
        expected[:, i, j] = np.einsum("bijc,ijcd->bd", patch, params["conv"]["kernel"])
    expected += params["conv"]["bias"]
    expected -= expected.mean(-1, keepdims=True)
    expected /= np.sqrt((expected**2).mean(-1, keepdims=True) + 0.1)
    expected = expected * params["norm"]["scale"] + params["norm"]["bias"]
    np.testing.assert_allclose(layer.apply(variables, x), expected, atol=1e-5)
