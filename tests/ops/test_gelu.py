"""GELU behind a bias, against the definition in float64, and by the kernel."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax import ops

RNG = np.random.default_rng(0)
X, DY = RNG.normal(0, 2, (2, 3, 5, 7)), RNG.normal(size=(2, 3, 5, 7))
BIAS = RNG.normal(size=7)


def reference():
    """Returns the result, and the gradients of x and of the bias, number by number."""
    y, dx, dbias = np.zeros_like(X), np.zeros_like(X), np.zeros_like(BIAS)
    for place in np.ndindex(*X.shape):
        value = X[place] + BIAS[place[-1]]
        distribution = 0.5 * math.erfc(-value / math.sqrt(2))
        density = math.exp(-value * value / 2) / math.sqrt(2 * math.pi)
        y[place] = value * distribution
        dx[place] = DY[place] * (distribution + value * density)
        dbias[place[-1]] += dx[place]
    return y, dx, dbias


def run(dtype):
    x, dy = (jnp.asarray(a, dtype) for a in (X, DY))
    bias = jnp.asarray(BIAS, np.promote_types(dtype, np.float32))
    y, backward = jax.vjp(ops.bias_gelu, x, bias)
    return y, *backward(dy)


def by_form(form, operator, *args, default, cuda=None, tpu=None, **options):
    """Stands for `by_platform`: takes the forms of a platform on any other."""
    del operator, options
    if form == "cuda":
        return cuda(*args, interpret=True)
    return default(*args) if tpu is None else tpu(*args)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float64, 1e-14), (jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("form", ["default", "cuda", "tpu"])
def test_bias_gelu(monkeypatch, form, dtype, tolerance):
    if form != "default":
        if form == "cuda" and dtype == jnp.float64:
            pytest.skip("kernels compute in float32")
        module = importlib.import_module("tokenvit_jax.ops.gelu")  # hidden by its function
        monkeypatch.setattr(module, "by_platform", functools.partial(by_form, form))
    with jax.enable_x64(dtype == jnp.float64):
        found = jax.jit(run, static_argnums=0)(dtype)
    for x, expected in zip(found, reference(), strict=True):
        scale = np.abs(expected).max()
        x = np.asarray(x, np.float64)
        np.testing.assert_allclose(x, expected, tolerance, tolerance * scale)
    assert [x.dtype for x in found[:2]] == [dtype] * 2
