"""Convolutions against float64 loops, and their initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import sampled

from tokenvit_jax import layers, ops
from tokenvit_jax.layers.conv import convolve_same
from tokenvit_jax.ops import standardize

RNG = np.random.default_rng(0)


def convolve(x, kernel, stride, before, after):
    """Slides a kernel over maps with zeros before and after them, along both axes."""
    side = len(kernel)
    x = np.pad(x, ((0, 0), (before[0], after[0]), (before[1], after[1]), (0, 0)))
    rows, columns = ((size - side) // stride + 1 for size in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            cells = x[:, i * stride : i * stride + side, j * stride : j * stride + side]
            y[:, i, j] = np.einsum("bijc,ijcd->bd", cells, kernel)
    return y


def apply(module, params, x):
    to_32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    return module.apply({"params": jax.tree.map(to_32, params)}, to_32(x))


def near(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(5, 8), (6, 7)])
@pytest.mark.parametrize(
    ("side", "stride"), sampled([(1, 1), (3, 1), (3, 2), (7, 2), (1, 2)], keep=(1, 2))
)
def test_standardized_convolutions(side, stride, size):
    x, kernel = RNG.normal(size=(2, *size, 3)), 2 + RNG.normal(size=(side, side, 3, 4))
    mean, var = kernel.mean((0, 1, 2)), kernel.var((0, 1, 2))
    # TensorFlow's "SAME": the smaller half of the zeros comes first.
    zeros = [max((-(-n // stride) - 1) * stride + side - n, 0) for n in size]
    before = [n // 2 for n in zeros]
    after = [n - n // 2 for n in zeros]
    expected = convolve(x, (kernel - mean) / np.sqrt(var + 1e-8), stride, before, after)
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    (kernel,) = ops.standardize_kernels([kernel], 1e-8, jnp.float32)
    near(convolve_same(x, kernel, stride), expected)


@pytest.mark.parametrize("joined", [False, True])
def test_kernels_are_standardised_alone_or_joined(joined, monkeypatch):
    """Values and gradients against float64; two kernels have 12 inputs, one has 18."""
    if joined:  # the form for accelerators
        choose = lambda _, *args, default, **__: default(*args)  # noqa: E731
        monkeypatch.setattr(standardize, "by_platform", choose)
    shapes = [(2, 2, 3, 4), (3, 3, 2, 5), (1, 1, 12, 3)]
    kernels = [1 + RNG.normal(size=shape) for shape in shapes]
    cotangents = [RNG.normal(size=shape) for shape in shapes]

    def definition(kernel):
        kernel = kernel - kernel.mean((0, 1, 2))
        return kernel / jnp.sqrt(jnp.square(kernel).mean((0, 1, 2)) + 0.1)

    def values_and_gradients(function, dtype):
        def run(kernels, cotangents):
            values, pull = jax.vjp(function, kernels)
            return values, pull(cotangents)[0]

        return jax.jit(run)(*jax.tree.map(lambda x: jnp.asarray(x, dtype), (kernels, cotangents)))

    with jax.enable_x64(True):
        expected = values_and_gradients(lambda x: [*map(definition, x)], jnp.float64)
        expected = jax.tree.map(np.asarray, expected)
    found = values_and_gradients(lambda x: ops.standardize_kernels(x, 0.1, jnp.float32), np.float32)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    kernels = [jnp.asarray(x, jnp.float32) for x in kernels]
    narrow = ops.standardize_kernels(kernels, 0.1, jnp.bfloat16)
    assert [x.dtype for x in narrow] == [jnp.bfloat16] * 3
    assert [x.shape for x in narrow] == shapes


@pytest.mark.parametrize(("side", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_padding_is_symmetric(side, stride):
    """Unlike "SAME", with a stride and an even size."""
    x, kernel = RNG.normal(size=(2, 4, 6, 3)), RNG.normal(size=(side, side, 3, 4))
    bias, padding = RNG.normal(size=4), (side // 2,) * 2
    found = apply(layers.Conv(4, side, stride=stride), {"kernel": kernel, "bias": bias}, x)
    near(found, convolve(x, kernel, stride, padding, padding) + bias)


@pytest.mark.parametrize("factor", [2, 4])
def test_transposed_convolutions(factor):
    x, kernel = RNG.normal(size=(2, 3, 2, 5)), RNG.normal(size=(factor, factor, 5, 4))
    bias = RNG.normal(size=4)
    expected = np.zeros((2, 3 * factor, 2 * factor, 4)) + bias
    for i in range(3 * factor):
        for j in range(2 * factor):
            expected[:, i, j] += x[:, i // factor, j // factor] @ kernel[i % factor, j % factor]
    params = {"kernel": kernel, "bias": bias}
    near(apply(layers.PatchConvTranspose(4, factor), params, x), expected)


def test_residual_convolution_unit():
    x = RNG.normal(size=(2, 4, 3, 5))
    params = {
        name: {"kernel": RNG.normal(size=(3, 3, 5, 5)), "bias": RNG.normal(size=5)}
        for name in ("conv1", "conv2")
    }
    y = x
    for layer in params.values():
        y = convolve(np.maximum(y, 0), layer["kernel"], 1, (1, 1), (1, 1)) + layer["bias"]
    np.testing.assert_allclose(apply(layers.ResidualConvUnit(), params, x), x + y, rtol=1e-4)


def test_initial_values_are_pytorchs():
    """Uniform up to 1 / sqrt(fan in); that of a transposed convolution has the output channels."""
    values = np.abs(layers.uniform_init(16)(jax.random.key(0), (2000,)))
    assert 0.249 < values.max() <= 0.25 and abs(values.mean() - 0.125) < 0.01
    x = jnp.zeros((1, 2, 2, 4))
    params = layers.PatchConvTranspose(16, 2).init(jax.random.key(0), x)["params"]
    assert 0.12 < np.abs(params["kernel"]).max() <= 0.125
