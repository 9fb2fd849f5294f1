"""The kernel for long attention on TPUs, interpreted, against attention with logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as plt

from tokenvit_jax import ops
from tokenvit_jax.kernels import flash_attention_tpu as kernels
from tokenvit_jax.kernels.attention import attend_heads_first
from tokenvit_jax.kernels.platforms import noted_misfits


@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients(monkeypatch, masked):
    """Two blocks of queries and of keys, the last of which are not full."""
    monkeypatch.setattr(kernels, "BLOCK", 128)
    rng = np.random.default_rng(0)
    q, k, v, dy = (
        jnp.asarray(rng.normal(size=(2, length, 2, 8)), jnp.float32)
        for length in (150, 140, 140, 150)
    )
    mask = jnp.asarray(rng.random((2, 140)) < 0.5) if masked else None

    def run(form):
        y, backward = jax.vjp(lambda q, k, v: form(q, k, v, mask, scale=0.4), q, k, v)
        return y, *backward(dy)

    with plt.force_tpu_interpret_mode():
        found = jax.jit(functools.partial(run, kernels.attend_by_flash))()
    expected = jax.jit(functools.partial(run, attend_heads_first))()
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("queries", "keys", "dim", "dtype", "serves"),
    [(1024, 1024, 64, jnp.bfloat16, True), (1023, 1024, 64, jnp.bfloat16, False),
     (16384, 64, 32, jnp.bfloat16, True), (1024, 1024, 12, jnp.bfloat16, False),
     (1024, 1024, 192, jnp.bfloat16, False), (1024, 1024, 64, jnp.float32, False)],
)  # fmt: skip
def test_when_it_serves(queries, keys, dim, dtype, serves):
    q, k = (jax.ShapeDtypeStruct((1, n, 2, dim), dtype) for n in (queries, keys))
    assert (kernels.is_long(q, k) and kernels.flash_misfit(q, k) is None) == serves
    with noted_misfits() as misfits:  # too few logits are no misfit
        jax.eval_shape(ops.dot_product_attention.__wrapped__, q, k, k)
    noted = [misfit.reason for misfit in misfits if misfit.platform == "tpu"]
    assert len(noted) == (kernels.is_long(q, k) and not serves)
    if serves:  # the operator lowers with the kernel
        attend = jax.jit(ops.dot_product_attention).trace(q, k, k)
        assert "tpu_custom_call" in attend.lower(lowering_platforms=("tpu",)).as_text()
        assert "tpu_custom_call" not in attend.lower(lowering_platforms=("cpu",)).as_text()
