"""IRFFN and separable projections against the layer-by-layer composition that they stand for."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.layers import gelu
from tokenvit_jax.layers.conv import conv_init, depthwise_init, linear_init
from tokenvit_jax.layers.pale_attention import SeparableProjection
from tokenvit_jax.models.dgt import InvertedResidualFFN

SHAPE = (4, 3, 5, 6)


def norm(x, train, name, axis_name=None):
    layer = nn.BatchNorm(
        momentum=0.9, epsilon=1e-5, dtype=x.dtype, axis_name=axis_name, name=name
    )  # fmt: skip
    return layer(x, use_running_average=not train)


def depthwise(x, use_bias=True):
    return nn.Conv(
        x.shape[-1], (3, 3), feature_group_count=x.shape[-1], kernel_init=depthwise_init,
        use_bias=use_bias, dtype=x.dtype, name="depthwise",
    )(x)  # fmt: skip


class Composition(nn.Module):
    """IRFFN by flax's layers."""

    @nn.compact
    def __call__(self, x, train):
        channels = x.shape[-1]
        x = nn.Dense(2 * channels, kernel_init=conv_init, dtype=x.dtype, name="expand")(x)
        x = norm(gelu(x), train, "norm1")
        x = norm(gelu(x + depthwise(x)), train, "norm2")
        x = nn.Dense(channels, kernel_init=conv_init, dtype=x.dtype, name="reduce")(x)
        return norm(x, train, "norm3")


class ProjectionComposition(nn.Module):
    """Separable projection by flax's layers."""

    @nn.compact
    def __call__(self, x, train):
        x = norm(depthwise(x, use_bias=False), train, "norm")
        return nn.Dense(x.shape[-1], kernel_init=linear_init, dtype=x.dtype, name="pointwise")(x)


def irffn(dtype, axis_name=None):
    return InvertedResidualFFN(ratio=2, dtype=dtype, axis_name=axis_name)


CASES = {
    "irffn": (irffn, Composition),
    "separable": (lambda dtype: SeparableProjection(SHAPE[-1]), ProjectionComposition),
}


def perturbed(variables):
    """Returns variables without special values, such as biases of zero."""
    leaves, tree = jax.tree.flatten(variables)
    rng = np.random.default_rng(0)
    return tree.unflatten([x + 0.2 * rng.random(x.shape).astype(x.dtype) for x in leaves])


def result(module, train, variables, x):
    """Returns output, new statistics and gradients of a module."""
    weights = jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def loss(params, x):
        y, state = module.apply({**variables, "params": params}, x, train, mutable=["batch_stats"])
        return jnp.sum(y * weights), (y, state)

    gradients, aux = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)
    return *aux, gradients


@pytest.mark.parametrize("case", CASES)
def test_equals_the_composition(case):
    module, composition = CASES[case][0](jnp.float32), CASES[case][1]()
    x = jax.random.normal(jax.random.key(0), SHAPE)
    variables, expected = (
        jax.jit(functools.partial(m.init, train=False))(jax.random.key(1), x)
        for m in (module, composition)
    )
    shape = variables["params"]["depthwise"]["kernel"].shape
    kernel = expected["params"]["depthwise"]["kernel"]
    assert kernel.size == np.prod(shape)
    expected["params"]["depthwise"]["kernel"] = variables["params"]["depthwise"]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    variables = perturbed(variables)

    def reshaped(tree, shape):
        kernel = tree["depthwise"]["kernel"]
        return {**tree, "depthwise": {**tree["depthwise"], "kernel": kernel.reshape(shape)}}

    theirs = {**variables, "params": reshaped(variables["params"], (3, 3, 1, shape[-1]))}
    for train in (True, False):
        got = jax.jit(functools.partial(result, module, train))(variables, x)
        y, state, (params, dx) = jax.jit(functools.partial(result, composition, train))(theirs, x)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5),
            got, (y, state, (reshaped(params, shape), dx)),
        )  # fmt: skip


def test_statistics_span_a_mapped_axis():
    """Two parts of a batch under pmap's axis give the results of the whole batch."""
    x = jax.random.normal(jax.random.key(0), SHAPE)
    module = irffn(jnp.float32, "batch")
    init = jax.jit(functools.partial(module.init, train=False))
    variables = perturbed(init(jax.random.key(1), x))

    def apply(module, x):
        return module.apply(variables, x, train=True, mutable=["batch_stats"])

    mapped = jax.vmap(functools.partial(apply, module), axis_name="batch")
    y, state = jax.jit(mapped)(x.reshape(2, 2, *SHAPE[1:]))
    expected, expected_state = jax.jit(functools.partial(apply, irffn(jnp.float32)))(x)
    np.testing.assert_allclose(y.reshape(SHAPE), expected, atol=2e-5)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_allclose(got[1], want, rtol=1e-5)
        np.testing.assert_array_equal(got[0], got[1])


def test_bfloat16_is_as_close_as_the_composition():
    """Both are compared with float32: what is folded costs no precision on average."""
    x = jax.random.normal(jax.random.key(0), SHAPE)
    init = jax.jit(functools.partial(irffn(jnp.float32).init, train=False))
    variables = perturbed(init(jax.random.key(1), x))
    kernel = variables["params"]["depthwise"]["kernel"]

    def run(module, x, shape):
        params = variables["params"]
        depthwise = {**params["depthwise"], "kernel": kernel.reshape(shape)}
        theirs = {**variables, "params": {**params, "depthwise": depthwise}}
        return jax.tree.leaves(jax.jit(functools.partial(result, module, True))(theirs, x))

    exact = run(irffn(jnp.float32), x, kernel.shape)
    x = x.astype(jnp.bfloat16)
    forms = (irffn(jnp.bfloat16), kernel.shape), (Composition(), (3, 3, 1, kernel.shape[-1]))
    ours, composition = (
        np.mean([
            np.linalg.norm(np.ravel(got).astype(np.float64) - np.ravel(want)) / np.linalg.norm(want)
            for got, want in zip(run(module, x, shape), exact, strict=True)
            if np.linalg.norm(want) > 1e-3  # not the biases that a norm cancels
        ])
        for module, shape in forms
    )  # fmt: skip
    assert ours <= 1.5 * composition  # rounding, which differs between versions of XLA
    assert ours < 0.02
