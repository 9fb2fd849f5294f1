"""Dense attention against float64 loops."""

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tokenvit_jax import ops
from tokenvit_jax.kernels import chunked

GOLDEN = Path(__file__).parent / "golden"


def inputs(dtype=np.float32, queries=11, keys=13):
    rng = np.random.default_rng(0)
    shape = lambda length: (2, length, 3, 8)  # noqa: E731
    return tuple(rng.normal(size=shape(n)).astype(dtype) for n in (queries, keys, keys))


def naive(q, k, v, scale):
    output = np.zeros(q.shape)
    for b, i, n in np.ndindex(q.shape[:3]):
        logits = scale * k[b, :, n].astype(np.float64) @ q[b, i, n].astype(np.float64)
        weights = np.exp(logits - logits.max())
        output[b, i, n] = weights @ v[b, :, n] / weights.sum()
    return output


@pytest.mark.parametrize("scale", [None, 0.7])
def test_equals_the_loops(scale):
    q, k, v = inputs()
    output = ops.dot_product_attention(q, k, v, scale=scale)
    np.testing.assert_allclose(output, naive(q, k, v, scale or 8**-0.5), atol=1e-6)


@pytest.mark.parametrize("size", [None, np.array([1, 2.5] * 6 + [4], np.float32)])
def test_weights_are_what_attention_multiplies_with_the_values(size):
    q, k, v = inputs()
    sizes = None if size is None else np.stack([size, size[::-1]])
    weights = ops.attention_weights(q, k, sizes, scale=0.7)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    expected = ops.scored_attention(q, k, v, sizes, scale=0.7)
    found = np.einsum("bnqk,bknd->bqnd", weights, v)
    np.testing.assert_allclose(found, expected.output, atol=1e-6)
    np.testing.assert_allclose(weights.sum((1, 2)), expected.received, atol=1e-5)
    with pytest.raises(ValueError, match="size has shape"):
        ops.attention_weights(q, k, np.ones(13))


def test_float64_gradient_by_finite_differences():
    with jax.enable_x64(True):
        arrays = inputs(np.float64)
        assert ops.dot_product_attention(*arrays).dtype == jnp.float64
        attend = functools.partial(ops.dot_product_attention, scale=0.5)
        check_grads(attend, arrays, order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


def test_large_logits_do_not_overflow():
    q, k, v = inputs()
    output = ops.dot_product_attention(1e4 * q, k, v)
    np.testing.assert_allclose(output, naive(1e4 * q, k, v, 8**-0.5), atol=1e-4)


def test_vmap():
    q, k, v = inputs()
    mapped = jax.vmap(ops.dot_product_attention)(*(x[:, None] for x in (q, k, v)))
    np.testing.assert_allclose(mapped[:, 0], ops.dot_product_attention(q, k, v), atol=1e-6)


def test_bad_shapes_are_named():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"k has shape .* and v .*; they must be equal"):
        ops.dot_product_attention(q, k, v[:, :-1])
    with pytest.raises(ValueError, match=r"and q \(.*\); batch, heads and dim must be equal"):
        ops.dot_product_attention(q[:1], k, v)


def test_keys_that_do_not_count_are_as_if_absent():
    q, k, v = inputs()
    mask = np.zeros(k.shape[:2], bool)
    mask[:, [0, 2]] = True
    output = ops.dot_product_attention(q, k, v, key_mask=mask)
    expected = ops.dot_product_attention(q, k[:, [0, 2]], v[:, [0, 2]])
    np.testing.assert_allclose(output, expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"key_mask has shape \(1,\); expected"):
        ops.dot_product_attention(q, k, v, key_mask=mask[0, :1])


def test_chunks_of_queries_change_nothing(monkeypatch):
    q, k, v = inputs()
    mask = np.arange(k.shape[1])[None] < np.array([[9], [13]])

    def run(q, k, v):
        attend = ops.dot_product_attention.__wrapped__  # not compiled yet: it reads the limit
        output, pull = jax.vjp(lambda *x: attend(*x, key_mask=mask), q, k, v)
        return output, pull(output)

    whole = jax.jit(run)(q, k, v)
    monkeypatch.setattr(chunked, "MAX_LOGITS", 250)  # 858 logits: chunks of 3, 3, 3 and 2
    in_chunks = lambda *x: run(*x)  # noqa: E731  (a function that was not traced yet)
    assert "scan" in str(jax.make_jaxpr(in_chunks)(q, k, v))
    chex.assert_trees_all_close(jax.jit(in_chunks)(q, k, v), whole, atol=1e-6)


@pytest.mark.parametrize("sized", [False, True])
def test_scored_attention(sized):
    """Returns the attention to repeated keys, and how much each key received."""
    q, k, v = inputs()
    size = np.random.default_rng(5).integers(1, 4, k.shape[:2]) if sized else None
    found = ops.scored_attention(q, k, v, size)
    repeats = np.ones(k.shape[:2], int) if size is None else size
    for b in range(len(q)):
        keys, values = (np.repeat(x[b], repeats[b], axis=0)[None] for x in (k, v))
        np.testing.assert_allclose(
            found.output[b], ops.dot_product_attention(q[b : b + 1], keys, values)[0], atol=1e-5
        )
        logits = np.einsum("qhd,khd->hqk", q[b], keys[0]) * q.shape[-1] ** -0.5
        received = np.asarray(jax.nn.softmax(logits)).sum((0, 1))
        ends = np.cumsum(repeats[b])
        sums = np.diff(np.concatenate([[0], np.cumsum(received)[ends - 1]]))
        np.testing.assert_allclose(found.received[b], sums, rtol=1e-4)
    with pytest.raises(ValueError, match=r"size has shape \(1, 2\); expected"):
        ops.scored_attention(q, k, v, np.ones((1, 2)))


def test_scored_attention_without_the_diagonal():
    """The scores equal another implementation's, for the same attention weights."""
    golden = np.load(GOLDEN / "tp_ref_n49_k16.npz")
    weights = golden["attention_h_q_k_with_cls"]  # (heads, queries, keys)
    # The keys are orthonormal: up to a constant, the queries are the logits.
    q = np.log(weights).transpose(1, 0, 2)[None]
    k = np.broadcast_to(np.eye(50)[:, None], (50, 3, 50))[None]
    with jax.enable_x64(True):
        for diagonal, name in ((True, "sum_heads_queries"), (False, "minus_diagonal_ibm")):
            found = ops.scored_attention(q, k, k, scale=1.0, diagonal=diagonal)
            np.testing.assert_allclose(found.received[0, 1:], golden[f"significance_{name}"])
    with pytest.raises(ValueError, match="diagonal=False needs as many queries as keys, not 49"):
        ops.scored_attention(q[:, 1:], k, k, diagonal=False)
