"""Depthwise convolution against loops and against XLA's own convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from tokenvit_jax import ops
from tokenvit_jax.kernels.depthwise_conv import (
    convolve_by_shifts,
    convolve_on_tpu,
    kernel_gradient_by_library,
    kernel_gradient_by_lines,
    kernel_gradient_by_sums,
    kernel_gradient_on_tpu,
)


def inputs(kernel=(3, 3), dtype=np.float32):
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(2, 6, 9, 5)).astype(dtype),
        rng.normal(size=(*kernel, 5)).astype(dtype),
    )


@pytest.mark.parametrize("kernel", [(3, 3), (1, 5), (7, 3)])
def test_equals_the_loops(kernel):
    x, weights = inputs(kernel)
    padded = np.pad(
        x.astype(np.float64), ((0, 0), (kernel[0] // 2,) * 2, (kernel[1] // 2,) * 2, (0, 0))
    )
    expected = np.zeros(x.shape)
    for i, j in np.ndindex(x.shape[1:3]):
        window = padded[:, i : i + kernel[0], j : j + kernel[1]]
        expected[:, i, j] = np.sum(window * weights, (1, 2))
    np.testing.assert_allclose(ops.depthwise_conv(x, weights), expected, atol=1e-5)


def test_gradient_is_that_of_the_convolution():
    x, weights = inputs((3, 5))
    dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def reference(x, weights):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, weights[:, :, None], (1, 1), "SAME",
            dimension_numbers=numbers, feature_group_count=5,
        )  # fmt: skip

    for gradient, expected in zip(
        jax.vjp(jax.jit(ops.depthwise_conv), x, weights)[1](dy),
        jax.vjp(jax.jit(reference), x, weights)[1](dy),
        strict=True,
    ):
        np.testing.assert_allclose(gradient, expected, atol=2e-5)
    for form in (kernel_gradient_by_library, kernel_gradient_by_lines, kernel_gradient_by_sums):
        np.testing.assert_allclose(form(x, dy, weights.shape), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("images", "dtype", "by_library"),
    [(8, jnp.bfloat16, (True, True)), (7, jnp.bfloat16, (False, True)),
     (8, jnp.float32, (False, False))],
)  # fmt: skip
def test_forms_for_tpus(images, dtype, by_library):
    """XLA's convolution takes over where it is exact and images fill the registers."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(images, 4, 5, 3)), dtype) for _ in range(2))
    weights = jnp.asarray(rng.normal(size=(3, 3, 3)), dtype)
    forms = (
        (convolve_on_tpu, convolve_by_shifts, (x, weights)),
        (lambda *a: kernel_gradient_on_tpu(*a, weights.shape),
         lambda *a: kernel_gradient_by_sums(*a, weights.shape), (x, dy)),
    )  # fmt: skip
    for (form, reference, arrays), library in zip(forms, by_library, strict=True):
        assert ("conv_general_dilated" in str(jax.make_jaxpr(form)(*arrays))) == library
        found, expected = (np.asarray(f(*arrays), np.float32) for f in (form, reference))
        tolerance = 1e-2 if library else 1e-6  # the library returns 16 bits
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_float64_gradient_by_finite_differences():
    with jax.enable_x64(True):
        arrays = inputs(dtype=np.float64)
        assert ops.depthwise_conv(*arrays).dtype == jnp.float64
        check_grads(ops.depthwise_conv, arrays, order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


def test_bfloat16_sums_in_float32():
    x, weights = (jnp.asarray(a, jnp.bfloat16) for a in inputs())
    y = ops.depthwise_conv(x, weights)
    assert y.dtype == jnp.bfloat16
    exact = ops.depthwise_conv(x.astype(jnp.float32), weights.astype(jnp.float32))
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_bad_shapes_are_named():
    x, weights = inputs()
    with pytest.raises(ValueError, match=r"kernel has shape \(2, 3, 5\); rows and columns must"):
        ops.depthwise_conv(x, weights[:2])
    with pytest.raises(ValueError, match=r"expected \(rows, columns, 5\)"):
        ops.depthwise_conv(x, weights[..., :4])
    with pytest.raises(ValueError, match=r"x has shape \(6, 9, 5\)"):
        ops.depthwise_conv(x[0], weights)
