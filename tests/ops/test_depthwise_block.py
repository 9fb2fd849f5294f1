"""Depthwise convolutions with their surroundings, against the plain composition and by kernels."""

import contextlib
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from sampled import sampled

from tokenvit_jax import ops
from tokenvit_jax.kernels import channel_sums, cudnn
from tokenvit_jax.kernels import depthwise_block as kernels
from tokenvit_jax.kernels.depthwise_block import Block
from tokenvit_jax.ops.gelu import gelu

EVERYTHING = Block(deferred=True, residual=True, activate=True, with_sums=True)
ALONE = Block(with_sums=True)


def arrays(shape, dtype):
    """Returns x, kernel, bias, input bias, scale and shift; gradients of the map and the sums."""
    rng = np.random.default_rng(0)
    channels = shape[-1]
    shapes = [shape, (3, 3, channels), *[(channels,)] * 4, shape, (2, channels)]
    maps = (0, 6)
    return [
        jnp.asarray(rng.normal(size=s), dtype if i in maps else np.promote_types(dtype, np.float32))
        for i, s in enumerate(shapes)
    ]


def of_block(block, x, kernel, bias, input_bias, scale, shift):
    """The operators under test, with everything around the convolution or nothing."""
    # Inside their jit, so that they are traced again when the forms are replaced.
    defer_gelu, depthwise_block = (op.__wrapped__ for op in (ops.defer_gelu, ops.depthwise_block))
    if block == ALONE:
        return depthwise_block(x, kernel, with_sums=True)
    x, sums = defer_gelu(x, input_bias, with_sums=True)
    y, more_sums = depthwise_block(
        x, kernel, bias, input_bias=input_bias, scale=scale, shift=shift, **block._asdict()
    )
    return y, jnp.stack([*more_sums, *sums])


def reference(block, x, kernel, bias, input_bias, scale, shift):
    """The same, step by step, with JAX's own gradient."""

    def conv(u):
        padded = jnp.pad(u, ((0, 0), (1, 1), (1, 1), (0, 0)))
        _, height, width, _ = u.shape
        return sum(
            padded[:, i : i + height, j : j + width] * kernel[i, j] for i, j in np.ndindex(3, 3)
        )

    def sums(y):
        return [y.sum((0, 1, 2)), (y * y).sum((0, 1, 2))]

    if block == ALONE:
        y = conv(x)
        return y, jnp.stack(sums(y))
    g = gelu(x + input_bias)
    u = scale * g + shift
    y = gelu(u + conv(u) + bias)
    return y, jnp.stack([*sums(y), *sums(g)])


def values_and_gradients(function, inputs):
    *inputs, dy, _ = inputs
    (y, sums), backward = jax.vjp(function, *inputs)
    dsums = jnp.linspace(-1, 1, sums.size).reshape(sums.shape)
    return [y, sums, *backward((dy, dsums.astype(sums.dtype)))]


@pytest.mark.parametrize("block", [EVERYTHING, ALONE], ids=["everything", "alone"])
def test_equals_the_composition(block):
    with jax.enable_x64(True):
        inputs = arrays((2, 4, 5, 3), np.float64)
        got, expected = (
            jax.jit(functools.partial(values_and_gradients, functools.partial(f, block)))(inputs)
            for f in (of_block, reference)
        )
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


# One shape has a last strip and a last block of channels that are not full.
@pytest.mark.parametrize(
    ("block", "shape", "dtype"),
    sampled(
        [
            (EVERYTHING, (3, 2, 3, 36), np.float32),
            (EVERYTHING, (1, 1, 2, 16), jnp.bfloat16),
            (ALONE, (2, 4, 2, 5), np.float32),
        ]
    ),
)
def test_kernels_equal_the_form_of_xla(monkeypatch, block, shape, dtype):
    """The same operator, with the kernels in interpret mode in place of the forms for CPUs."""
    inputs = arrays(shape, dtype)

    def run(inputs):
        return values_and_gradients(functools.partial(of_block, block), inputs)

    expected = jax.jit(lambda inputs: run(inputs))(inputs)
    called = []

    def by_kernel(operator, *args, cuda, **_):
        called.append(operator)
        return cuda(*args, interpret=True)

    for name in ("depthwise_conv", "gelu"):  # hidden by their functions
        module = importlib.import_module(f"tokenvit_jax.ops.{name}")
        monkeypatch.setattr(module, "by_platform", by_kernel)
    got = jax.jit(lambda inputs: run(inputs))(inputs)
    assert len(called) == (2 if block == ALONE else 4)
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype
        x, y = (np.asarray(a, np.float64) for a in (x, y))
        # bfloat16: u is not rounded by the kernels, and each form rounds its results to 8 bits.
        tolerance = 2e-6 if dtype == np.float32 else 2e-2
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(y).max())


def test_only_gradients_need_what_is_in_front_of_the_activation(monkeypatch):
    *inputs, _, _ = arrays((1, 2, 3, 16), np.float32)
    stored = []

    def by_kernel(operator, *args, cuda, **_):
        results = cuda(*args, interpret=True)
        if operator == "depthwise block":
            stored.append(results[1] is not None)
        return results

    for name in ("depthwise_conv", "gelu"):  # hidden by their functions
        module = importlib.import_module(f"tokenvit_jax.ops.{name}")
        monkeypatch.setattr(module, "by_platform", by_kernel)
    run = functools.partial(of_block, EVERYTHING)
    y, sums = jax.jit(run)(*inputs)
    (z, more_sums), _ = jax.jit(functools.partial(jax.vjp, run))(*inputs)
    assert stored == [False, True]
    np.testing.assert_allclose(y, z, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(sums, more_sums, rtol=1e-5)


def of_branches(x, *kernels):
    # Inside their jit, so that they are traced again when the forms are replaced.
    return ops.depthwise_branches.__wrapped__(x, kernels, with_sums=True)


def reference_of_branches(x, *kernels):
    results = [reference(ALONE, x, kernel, *[None] * 4) for kernel in kernels]
    maps, sums = zip(*results, strict=True)
    return maps, jnp.stack(sums)


@pytest.mark.parametrize("form", ["xla", "kernel"])
def test_branches_equal_convolutions_one_by_one(monkeypatch, form):
    """Values and gradients; the maps have a last strip that is not full."""
    rng = np.random.default_rng(0)
    shapes = (3, 2, 3, 36), *[(3, 3, 36)] * 3
    if form == "kernel":
        module = importlib.import_module("tokenvit_jax.ops.depthwise_conv")
        by_kernel = lambda _, *args, cuda, **options: cuda(*args, interpret=True)  # noqa: E731
        monkeypatch.setattr(module, "by_platform", by_kernel)

    def run(function, inputs):
        y, backward = jax.vjp(function, *inputs)
        dy = jax.tree.map(lambda y: jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape), y)
        return y, backward(dy)

    with jax.enable_x64(form == "xla"):
        inputs = [jnp.asarray(rng.normal(size=s), float) for s in shapes]
        got, expected = (
            jax.jit(functools.partial(run, function))(inputs)
            for function in (of_branches, reference_of_branches)
        )
        tolerance = 1e-9 if form == "xla" else 1e-5
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            scale = np.abs(y).max()
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ((), "kernels is empty; valid: at least one kernel"),
        (((3, 3, 4), (1, 3, 4)), r"kernels have shapes \(3, 3, 4\), \(1, 3, 4\)"),
        (((3, 3, 4), (3, 3, 5)), r"kernel has shape \(3, 3, 5\); expected \(rows, columns, 4\)"),
    ],
)
def test_branches_name_what_is_wrong(shapes, message):
    kernels = tuple(jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        ops.depthwise_branches(jnp.zeros((1, 2, 2, 4)), kernels)


def test_sums_of_channels(monkeypatch):
    """By XLA's form and by the kernel: sums, affine function and gradients."""
    x, dy = (jnp.asarray(np.random.default_rng(i).normal(size=(3, 70, 20))) for i in range(2))
    factor, offset = jnp.linspace(1, 2, 20), jnp.linspace(-1, 0, 20)
    module = importlib.import_module("tokenvit_jax.ops.channel_affine")

    def run(sums, affine):
        def both(x, factor, offset):
            return sums(x), affine(x, factor, offset)

        results, backward = jax.vjp(both, x, factor, offset)
        return results, backward((results[0], dy))

    reference = run(
        lambda x: jnp.stack([x.sum((0, 1)), (x * x).sum((0, 1))]), lambda x, f, o: x * f + o
    )
    form = functools.partial(channel_sums.product_sums, interpret=True)
    for by_kernel in (False, True):
        if by_kernel:
            monkeypatch.setattr(module, "by_platform", lambda _, *args, **__: form(*args))
        got = run(ops.channel_sums, ops.channel_affine)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(reference), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_gelu_of_kernels_is_exact_enough():
    x = jnp.linspace(-9, 9, 4097)
    y, slope = channel_sums.gelu_and_slope(x)
    dy = jax.vmap(jax.grad(gelu))(x)
    np.testing.assert_allclose(y, gelu(x), rtol=2e-7, atol=6e-7)
    np.testing.assert_allclose(channel_sums.gelu(x), y, rtol=2e-7, atol=6e-7)
    np.testing.assert_allclose(slope, dy, rtol=2e-7, atol=6e-7)
    assert np.isnan(channel_sums.gelu_and_slope(jnp.nan)[0])
    assert np.isnan(channel_sums.gelu(jnp.nan))


def test_kernels_lower_for_gpus_and_nowhere_else():
    check = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    inputs = arrays((2, 4, 3, 16), jnp.bfloat16)
    run = functools.partial(values_and_gradients, functools.partial(of_block, EVERYTHING))
    for platform, calls in (("cuda", 4), ("tpu", 0)):
        with cudnn.assumed() if platform == "cuda" else contextlib.nullcontext():
            traced = export.export(jax.jit(run), platforms=[platform], disabled_checks=[check])
            lowered = traced(inputs)
        assert lowered.mlir_module().count("__gpu$xla.gpu.triton") == calls


def test_what_kernels_cannot_take():
    assert kernels.misfit((2, 6, 4, 5), (3, 3, 5)) is None
    assert kernels.misfit((2, 6, 4, 5), (5, 3, 5)) == "a kernel of 5 x 3 is not 3 x 3"
    assert kernels.misfit((2**16, 32, 32, 32)) == "the map has 2^31 values or more"
