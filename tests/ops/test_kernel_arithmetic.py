"""Arithmetic of kernels in single instructions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from tokenvit_jax.kernels.arithmetic import exp2, fma, reciprocal

NAMES = {fma: "fma.rn.f32", exp2: "ex2.approx.ftz.f32", reciprocal: "rcp.approx.ftz.f32"}
ORDINARY = {fma: lambda a, b, c: a * b + c, exp2: np.exp2, reciprocal: lambda x: 1 / x}


def in_a_kernel(function, *args, interpret=False):
    """Calls a function of vectors in a kernel."""

    def kernel(*refs):
        *inputs, result = refs
        result[...] = function(*(ref[...] for ref in inputs))

    params = plt.CompilerParams()
    call = pl.pallas_call(kernel, args[0], interpret=interpret, compiler_params=params)
    return call(*args)


def arguments(function):
    vector = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, 16), jnp.float32)
    return (vector, vector[::-1], vector + 1) if function is fma else (vector,)


@pytest.mark.parametrize("function", NAMES)
def test_they_are_the_ordinary_operations(function):
    args = arguments(function)
    expected = ORDINARY[function](*(np.asarray(x, np.float64) for x in args))
    np.testing.assert_allclose(in_a_kernel(function, *args, interpret=True), expected, rtol=3e-7)
    np.testing.assert_allclose(function(*args), expected, rtol=3e-7)


def test_arguments_are_broadcast():
    x = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    np.testing.assert_array_equal(fma(x[:1], 2, x[:, :1]), 2 * x[:1] + x[:, :1])


@pytest.mark.parametrize("function", NAMES)
def test_they_are_one_instruction_on_a_gpu(function):
    check = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    run = jax.jit(lambda *args: in_a_kernel(function, *args))
    exported = export.export(run, platforms=["cuda"], disabled_checks=[check])
    assert NAMES[function] in exported(*arguments(function)).mlir_module()
