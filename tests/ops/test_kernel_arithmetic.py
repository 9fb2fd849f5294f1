"""Arithmetic of kernels in single instructions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from tokenvit_jax.kernels import cudnn
from tokenvit_jax.kernels.arithmetic import (
    exp2,
    fma,
    maximum,
    minimum,
    narrow,
    negative,
    reciprocal,
    widen,
)
from tokenvit_jax.kernels.channel_sums import gelu, gelu_and_slope

NAMES = {
    fma: "fma.rn.f32", exp2: "ex2.approx.ftz.f32", reciprocal: "rcp.approx.ftz.f32",
    maximum: "max.NaN.f32", minimum: "min.NaN.f32", widen: "shl.b32", narrow: "cvt.rn.bf16x2.f32",
}  # fmt: skip
ORDINARY = {
    fma: lambda a, b, c: a * b + c, exp2: np.exp2, reciprocal: lambda x: 1 / x, widen: lambda x: x,
    maximum: np.maximum, minimum: np.minimum,
}  # fmt: skip


def in_a_kernel(function, *args, interpret=False):
    """Calls a function of vectors in a kernel."""

    def kernel(*refs):
        *inputs, result = refs
        result[...] = function(*(ref[...] for ref in inputs))

    params = plt.CompilerParams()
    shape = jax.eval_shape(function, *args)
    call = pl.pallas_call(kernel, shape, interpret=interpret, compiler_params=params)
    return call(*args)


def to_bfloat16(x):
    return narrow(x, jnp.bfloat16)


def arguments(function):
    vector = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, 16), jnp.float32)
    if function is widen:
        return (vector.astype(jnp.bfloat16),)
    if function in (maximum, minimum):
        return vector, vector[::-1].at[3].set(jnp.nan)
    return (vector, vector[::-1], vector + 1) if function is fma else (vector,)


@pytest.mark.parametrize("function", ORDINARY)
def test_they_are_the_ordinary_operations(function):
    args = arguments(function)
    expected = ORDINARY[function](*(np.asarray(x, np.float64) for x in args))
    np.testing.assert_allclose(in_a_kernel(function, *args, interpret=True), expected, rtol=3e-7)
    np.testing.assert_allclose(function(*args), expected, rtol=3e-7)


def test_arguments_are_broadcast():
    x = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    np.testing.assert_array_equal(fma(x[:1], 2, x[:, :1]), 2 * x[:1] + x[:, :1])


def test_types():
    x = jnp.asarray([1.2345678, -1e-3, 3e38, np.inf, np.nan], jnp.float32)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        short = narrow(x, dtype)
        assert short.dtype == dtype
        np.testing.assert_array_equal(widen(short), x.astype(dtype).astype(jnp.float32))
    zeros = jnp.asarray([0.0, -0.0])
    np.testing.assert_array_equal(jnp.signbit(negative(zeros)), [True, False])
    np.testing.assert_array_equal(negative(x), -x)


def test_gelu_of_kernels():
    x = np.linspace(-12, 12, 4801).astype(np.float32)
    wide = x.astype(np.float64)
    tail = np.vectorize(math.erfc)(np.abs(wide) / 2**0.5) / 2
    distribution = np.where(wide < 0, tail, 1 - tail)
    slope = distribution + wide * np.exp(-wide * wide / 2) / (2 * np.pi) ** 0.5
    y, found_slope = gelu_and_slope(jnp.asarray(x))
    for found in (y, gelu(jnp.asarray(x))):
        np.testing.assert_allclose(found, wide * distribution, atol=4e-7)
        # Small values are near in proportion, too.
        inside = (x > -5) & (x < 0)
        np.testing.assert_allclose(found[inside], (wide * distribution)[inside], rtol=2e-4)
    np.testing.assert_allclose(found_slope, slope, atol=6e-7)
    x = jnp.asarray([-1e4, 1e4, 0.0, np.nan])
    np.testing.assert_allclose(gelu(x), [0, 1e4, 0, np.nan], atol=1e-15)


@pytest.mark.parametrize("function", [to_bfloat16 if f is narrow else f for f in NAMES])
def test_they_are_one_instruction_on_a_gpu(function):
    check = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    run = jax.jit(lambda *args: in_a_kernel(function, *args))
    with cudnn.assumed():
        exported = export.export(run, platforms=["cuda"], disabled_checks=[check])
        assert (
            NAMES[narrow if function is to_bfloat16 else function]
            in exported(*arguments(function)).mlir_module()
        )
