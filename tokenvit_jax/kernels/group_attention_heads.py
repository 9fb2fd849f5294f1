"""Group attention on TPUs: one program per image and block of heads, without logits in memory.

A program holds all tokens of the heads that share the 128 lanes of a register. Nothing is cut out
of the lanes: a product with the queries of one head, and zeros in the other lanes, is that head's.
Groups have lanes in the same way, and the mask rides on the product, as in
:mod:`tokenvit_jax.kernels.group_attention_dense`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as plt
from jaxtyping import Array, Bool, Float, Int32

from tokenvit_jax.kernels.group_routing import largest
from tokenvit_jax.kernels.pieces import MASKED
from tokenvit_jax.kernels.tpus import LARGE_VMEM, has_large_vmem

# Lanes of a register, lanes for the groups of a head, and queries whose logits are held at a time.
_LANES, _GROUPS, _QUERIES = 128, 64, 256
# Largest numbers of tokens in bfloat16, which are held in VMEM with their scores: on any TPU, and
# on TPUs with much of it.
MAX_LENGTH, MAX_LENGTH_IN_LARGE_VMEM = 1024, 4096
# Smallest head dim with which so many tokens fit.
_SMALLEST_DIM = 16


def heads_misfit(q: Float[Array, "B L N D"], num_groups: int) -> str | None:
    """Returns why :func:`attend_heads` cannot take these queries, or None."""
    _, length, heads, dim = q.shape
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{q.dtype} instead of bfloat16 or float32"
    if _LANES % dim or (heads * dim > _LANES and heads * dim % _LANES):
        return f"{heads} heads of dim {dim} do not fill {_LANES} lanes"
    if num_groups > _GROUPS:
        return f"{num_groups} groups are more than {_GROUPS}"
    most = MAX_LENGTH_IN_LARGE_VMEM if has_large_vmem() else MAX_LENGTH
    if q.dtype == jnp.float32:
        most //= 4  # twice the bytes, and products in several parts
    if dim < _SMALLEST_DIM:
        most = most * dim // _SMALLEST_DIM  # more heads in a register, hence more scores
    if length > most:
        return f"{length} tokens of {q.dtype} are more than {most}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def attend_heads(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B L N D"],
    v: Float[Array, "B L N D"],
    centroids: Float[Array, "N G D"],
    top_k: int,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B L N D"], Int32[Array, "B N L"], Float[Array, "B blocks L lanes"]]:
    """Routes and attends.

    Args:
      q: queries (B, L, N, D).
      k: keys (B, L, N, D).
      v: values (B, L, N, D).
      centroids: (N, G, D), unit norm; they get no gradient.
      top_k: number of keys that each group selects, at most L.
      scale: factor of the logits.
      interpret: whether to run without a TPU, for tests.

    Returns:
      Output (B, L, N, D) in the type of ``v``, the group of each query (B, N, L), and the biases of
      the keys for the groups of a block of heads, which :func:`selected_keys` reads.
    """
    return _forward(q, k, v, centroids, top_k, scale, interpret)[0]


def selected_keys(
    bias: Float[Array, "B blocks L lanes"], heads: int, num_groups: int
) -> Bool[Array, "B N L G"]:
    """Returns the keys that each group selected, from the result of :func:`attend_heads`."""
    batch, blocks, length, lanes = bias.shape
    bias = bias.reshape(batch, blocks, length, lanes // _GROUPS, _GROUPS)[..., :num_groups]
    return jnp.moveaxis(bias, 2, 3).reshape(batch, heads, length, num_groups) == 0


def _forward(q, k, v, centroids, top_k, scale, interpret):
    batch, length, heads, dim = q.shape
    num_groups = centroids.shape[1]
    blocks = pl.cdiv(heads * dim, _LANES)
    lanes = heads // blocks * _GROUPS
    tokens, per_block, of_groups, of_keys = _specs(q)
    flat = [x.reshape(batch, length, heads * dim) for x in (q, k, v)]
    in_lanes = _in_lanes(centroids.astype(q.dtype), blocks)
    output, groups, bias = pl.pallas_call(
        functools.partial(_attend, num_groups=num_groups, dim=dim, top_k=top_k, scale=scale),
        grid=(batch, blocks),
        in_specs=[tokens, tokens, tokens, per_block],
        out_specs=[tokens, of_groups, of_keys],
        out_shape=[
            jax.ShapeDtypeStruct(flat[0].shape, v.dtype),
            jax.ShapeDtypeStruct((batch, blocks, heads // blocks, length), jnp.int32),
            jax.ShapeDtypeStruct((batch, blocks, length, lanes), k.dtype),
        ],
        compiler_params=plt.CompilerParams(vmem_limit_bytes=LARGE_VMEM),
        interpret=interpret,
        name="group_attention",
    )(*flat, in_lanes)
    result = output.reshape(v.shape), groups.reshape(batch, heads, length), bias
    return result, (q, k, v, centroids, bias)


def _backward(top_k, scale, interpret, residuals, d_result):
    del top_k
    q, k, v, centroids, bias = residuals
    batch, length, heads, dim = q.shape
    num_groups = centroids.shape[1]
    blocks = bias.shape[1]
    tokens, per_block, _, of_keys = _specs(q)
    flat = [x.reshape(batch, length, heads * dim) for x in (q, k, v, d_result[0])]
    gradients = pl.pallas_call(
        functools.partial(_differentiate, num_groups=num_groups, dim=dim, scale=scale),
        grid=(batch, blocks),
        in_specs=[*[tokens] * 4, per_block, of_keys],
        out_specs=[tokens] * 3,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat[:3]],
        compiler_params=plt.CompilerParams(vmem_limit_bytes=LARGE_VMEM),
        interpret=interpret,
        name="group_attention_gradient",
    )(*flat, _in_lanes(centroids.astype(q.dtype), blocks), bias)
    return (*(x.reshape(q.shape) for x in gradients), jnp.zeros_like(centroids))


attend_heads.defvjp(_forward, _backward)


def _specs(q):
    """Returns the specs of tokens, centroids of a block of heads, groups, and biases."""
    _, length, heads, dim = q.shape
    width = min(heads * dim, _LANES)
    lanes = width // dim * _GROUPS
    tokens = pl.BlockSpec((None, length, width), lambda b, j: (b, 0, j))
    per_block = pl.BlockSpec((None, lanes, width), lambda b, j: (j, 0, 0))
    of_groups = pl.BlockSpec((None, None, width // dim, length), lambda b, j: (b, j, 0, 0))
    of_keys = pl.BlockSpec((None, None, length, lanes), lambda b, j: (b, j, 0, 0))
    return tokens, per_block, of_groups, of_keys


def _in_lanes(centroids, blocks):
    """Places centroids (N, G, D) in the lanes of their heads: (blocks, groups of all heads, D')."""
    heads, num_groups, dim = centroids.shape
    heads = heads // blocks
    centroids = centroids.reshape(blocks, heads, num_groups, dim)
    centroids = jnp.pad(centroids, ((0, 0), (0, 0), (0, _GROUPS - num_groups), (0, 0)))
    placed = jnp.einsum("jhgd,hi->jhgid", centroids, jnp.eye(heads, dtype=centroids.dtype))
    return placed.reshape(blocks, heads * _GROUPS, heads * dim)


def _dot(a, b, contract=(1, 0)):
    """Multiplies two matrices along an axis of each; float32 exactly.

    Mosaic knows one precision of bfloat16, whatever `jax.default_matmul_precision` asks for.
    """
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _lane(count):
    return lax.broadcasted_iota(jnp.int32, (1, count), 1)


def _member(q, centroids, head, num_groups):
    """Returns the one-hot group of each query among the lanes of all groups, for one head."""
    lane = _lane(centroids.shape[0])
    scores = _dot(q, centroids, (1, 1))
    first, last = head * _GROUPS, head * _GROUPS + num_groups - 1
    scores = jnp.where((lane >= first) & (lane <= last), scores, -jnp.inf)
    best = jnp.max(scores, 1, keepdims=True)
    number = lane.astype(jnp.float32)
    group = jnp.min(jnp.where(scores == best, number, float(last)), 1, keepdims=True)
    return (number == jnp.clip(group, first, last)).astype(q.dtype)  # in range for NaN, too


def _of_head(x, head, dim):
    """Returns x with zeros in the lanes of other heads."""
    lane = _lane(x.shape[1])
    return jnp.where((lane >= head * dim) & (lane < head * dim + dim), x, jnp.zeros_like(x))


def _for_blocks(length, heads, run, carry):
    """Runs ``carry = run(rows, carry)`` for slices of the queries, at multiples of 16.

    Whole slices are turns of one loop: the compiler would keep the logits of all slices of an
    unrolled loop at once, which do not fit into VMEM.
    """
    most = max(_QUERIES * 4 // max(heads, 4), 16)
    equal = [size for size in range(16, min(most, length) + 1, 16) if length % size == 0]
    size = pl.cdiv(pl.cdiv(length, pl.cdiv(length, most)), 16) * 16
    if length > most and equal:
        size = equal[-1]
    whole = length // size
    if whole > 1:
        rows = lambda i: pl.ds(pl.multiple_of(i * size, 16), size)  # noqa: E731
        carry = lax.fori_loop(0, whole, lambda i, carry: run(rows(i), carry), carry)
    elif whole:
        carry = run(slice(0, size), carry)
    return run(slice(whole * size, length), carry) if length % size else carry


def _weights(q, k, member, bias, scale):
    """Returns the attention of queries to all keys."""
    logits = _dot(q, k, (1, 1)) * scale + _dot(member, bias, (1, 1))
    weights = jnp.exp(logits - jnp.max(logits, 1, keepdims=True))
    return weights, jnp.sum(weights, 1, keepdims=True)


def _attend(
    q_ref, k_ref, v_ref, centroids_ref, output_ref, groups_ref, bias_ref,
    *, num_groups, dim, top_k, scale,
):  # fmt: skip
    length, width = q_ref.shape
    k, v, centroids = k_ref[...], v_ref[...], centroids_ref[...]
    selected = largest(_dot(k, centroids, (1, 1)), length, top_k, axis=0)
    bias = jnp.where(selected, 0.0, MASKED).astype(k.dtype)
    bias_ref[...] = bias
    # A product turns the groups of queries, one per row, into a row; 8 rows fill a register.
    number = lax.broadcasted_iota(jnp.int32, (8, centroids.shape[0]), 1) & (_GROUPS - 1)
    number = number.astype(jnp.float32).astype(k.dtype)
    for head in range(width // dim):
        groups = _dot(number, _member(q_ref[...], centroids, head, num_groups), (1, 1))
        groups_ref[head : head + 1, :] = groups[:1].astype(jnp.int32)

    def attend_rows(rows, _):
        q = q_ref[rows, :]
        output = jnp.zeros(q.shape, jnp.float32)
        for head in range(width // dim):
            member = _member(q, centroids, head, num_groups)
            weights, total = _weights(_of_head(q, head, dim), k, member, bias, scale)
            output += _of_head(_dot(weights.astype(v.dtype), v) / total, head, dim)
        output_ref[rows, :] = output.astype(output_ref.dtype)

    _for_blocks(length, width // dim, attend_rows, None)


def _differentiate(
    q_ref, k_ref, v_ref, d_output_ref, centroids_ref, bias_ref, d_q_ref, d_k_ref, d_v_ref,
    *, num_groups, dim, scale,
):  # fmt: skip
    length, width = q_ref.shape
    k, v, centroids = k_ref[...], v_ref[...], centroids_ref[...]
    bias = bias_ref[...]

    def differentiate_rows(rows, carry):
        d_k, d_v = carry
        q, d_output = q_ref[rows, :], d_output_ref[rows, :]
        d_q = jnp.zeros(q.shape, jnp.float32)
        for head in range(width // dim):
            member = _member(q, centroids, head, num_groups)
            own_q, own_d = (_of_head(x, head, dim) for x in (q, d_output))
            weights, total = _weights(own_q, k, member, bias, scale)
            weights = weights / total
            # Lanes of other heads are zero on one side of each product.
            d_v += _dot(weights.astype(v.dtype), own_d, (0, 0))
            d_weights = _dot(own_d, v, (1, 1))
            delta = jnp.sum(weights * d_weights, 1, keepdims=True)
            d_logits = (weights * (d_weights - delta) * scale).astype(q.dtype)
            d_q += _of_head(_dot(d_logits, k), head, dim)
            d_k += _dot(d_logits, own_q, (0, 0))
        d_q_ref[rows, :] = d_q.astype(d_q_ref.dtype)
        return d_k, d_v

    zero = jnp.zeros((length, width), jnp.float32)
    d_k, d_v = _for_blocks(length, width // dim, differentiate_rows, (zero, zero))
    d_k_ref[...] = d_k.astype(d_k_ref.dtype)
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)
