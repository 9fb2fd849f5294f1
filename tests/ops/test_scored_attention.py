"""Sums of attention by a kernel equal the sums of all weights, values and gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from tokenvit_jax import ops
from tokenvit_jax.kernels import cudnn, scored_attention
from tokenvit_jax.kernels.scored_attention import received_attention


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of queries and of keys, the last of them ragged, for short inputs."""
    monkeypatch.setattr(scored_attention, "BLOCK", 8)


def inputs(queries, keys, dim):
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(2, n, 3, dim)).astype(np.float32) for n in (queries, keys))
    size = rng.integers(0, 5, (2, keys)).astype(np.float32)
    return q, k, size


@pytest.mark.parametrize(
    ("queries", "keys", "dim", "sized", "diagonal"),
    [(11, 19, 16, False, True), (19, 19, 12, True, False)],
)
def test_the_kernel_sums_up_all_weights(small_blocks, queries, keys, dim, sized, diagonal):
    q, k, size = inputs(queries, keys, dim)
    size = size if sized else None
    key_bias = None if size is None else jnp.maximum(jnp.log(size), cudnn.NEVER)

    def by_kernel(q, k):
        return received_attention(q, k, key_bias, 0.4, diagonal, True)

    def from_weights(q, k):
        weights = ops.attention_weights(q, k, size, scale=0.4)
        if not diagonal:
            weights = weights * (1 - jnp.eye(queries))
        return weights.sum((1, 2))

    @functools.partial(jax.jit, static_argnums=2)
    def value_and_gradients(q, k, fn):
        value, pull = jax.vjp(fn, q, k)
        return value, pull(jnp.sin(value))

    found, expected = (value_and_gradients(q, k, fn) for fn in (by_kernel, from_weights))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_both_parts_for_a_gpu(small_blocks, monkeypatch):
    """The form for GPUs, its kernels run by jax, equals the form with all logits."""
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(
        scored_attention,
        "received_attention",
        functools.partial(received_attention, interpret=True),
    )
    q, k, size = inputs(19, 19, 16)
    found, expected = (
        jax.jit(functools.partial(form, scale=0.4, diagonal=False))(q, k, 2 * k, size)
        for form in (scored_attention.score_by_kernels, scored_attention.score_with_logits)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def test_lowers_for_a_gpu_that_is_not_there():
    q = jax.ShapeDtypeStruct((2, 70, 3, 32), jnp.bfloat16)
    checks = [
        export.DisabledSafetyCheck.custom_call(name)
        for name in ("__gpu$xla.gpu.triton", "__cudnn$fmhaSoftmax")
    ]
    with cudnn.assumed():
        exported = export.export(
            jax.jit(ops.scored_attention), platforms=["cuda"], disabled_checks=checks
        )(q, q, q)
    text = exported.mlir_module()
    assert all(check.is_custom_call() in text for check in checks)
