"""Group attention in blocks of queries and keys on GPUs, without logits in memory.

It is flash attention (Dao 2023) with one difference: a logit counts if the group of its query is a
bit of its key's words (:mod:`tokenvit_jax.kernels.group_routing`). Every sum has a fixed order, so
results are deterministic.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from tokenvit_jax.kernels.arithmetic import exp2, fma, widen
from tokenvit_jax.kernels.group_routing import WORD, WORD_BITS
from tokenvit_jax.kernels.joined import Parts, gradient_refs, gradients_of, inputs_of
from tokenvit_jax.kernels.pieces import LOG2_E, MASKED, Attended, dot, range_of

# Queries and keys in a block; the last block may be shorter.
_BLOCK = 64
# Tokens whose gradients one program computes: the gradients of so many queries fit into registers.
_MOST_AT_ONCE = 256


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attend_fused(
    parts: Parts,
    groups: Int32[Array, "B N L"],
    words: Int32[Array, "B N words L"],
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B L N D"]:
    """Attends from each query to the keys that its group selected.

    Args:
      parts: queries, keys and values (B, L, N, D).
      groups: group of each query (B, N, L).
      words: which groups selected each key (B, N, words, L), by
        :func:`tokenvit_jax.kernels.group_routing.route`; each group selected at least one.
      scale: factor of the logits.
      interpret: whether to run without a GPU, for tests.

    Returns:
      (B, L, N, D) in the type of the values.

    References:
      Dao 2023, "FlashAttention-2".
    """
    return _forward(parts, groups, words, scale, interpret)[0]


def _forward(parts, groups, words, scale, interpret):
    batch, heads, length = groups.shape
    dim, dtype = parts[-1].shape[-1], parts[-1].dtype
    tokens, per_query, per_key = _specs(length, dim, words)
    inputs, specs = inputs_of(parts, tokens)
    output, log_total = pl.pallas_call(
        functools.partial(_of_own_rows, functools.partial(_attend_block, scale=scale), length),
        grid=(batch, heads, pl.cdiv(length, _BLOCK)),
        in_specs=[*specs, per_query, per_key],
        out_specs=[tokens, per_query],
        out_shape=[
            jax.ShapeDtypeStruct((batch, length, heads, dim), dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="group_attention",
    )(*inputs, groups, words)
    return output, (parts, groups, words, output, log_total)


def _backward(scale, interpret, residuals, d_output):
    parts, groups, words, output, log_total = residuals
    batch, length, heads, dim = output.shape
    tokens, per_query, per_key = _specs(length, dim, words)
    inputs, specs = inputs_of(parts, tokens)
    shapes, out_specs = gradients_of(parts, tokens)
    if length <= _MOST_AT_ONCE:
        run = functools.partial(_differentiate_head, scale=scale, interpret=interpret)
        blocks, stages = 1, 1
    else:
        run = functools.partial(_differentiate_block, scale=scale)
        run = functools.partial(_of_own_rows, run, length)
        blocks, stages = pl.cdiv(length, _BLOCK), 2
    *gradients, _ = pl.pallas_call(
        run,
        grid=(batch, heads, blocks),
        in_specs=[*specs, per_query, per_key, tokens, per_query, tokens],
        # The last one is memory of the program: the products of d output and output.
        out_specs=[*out_specs, per_query],
        out_shape=[*shapes, jax.ShapeDtypeStruct(log_total.shape, log_total.dtype)],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=stages),
        interpret=interpret,
        name="group_attention_gradient",
    )(*inputs, groups, words, output, log_total, d_output)
    return tuple(gradients), None, None


attend_fused.defvjp(_forward, _backward)


def _specs(length, dim, words):
    """Returns the specs of tokens (B, L, N, D), (B, N, L) and (B, N, words, L)."""
    tokens = pl.BlockSpec((None, length, None, dim), lambda b, n, i: (b, 0, n, 0))
    per_query = pl.BlockSpec((None, None, length), lambda b, n, i: (b, n, 0))
    per_key = pl.BlockSpec((None, None, words.shape[2], length), lambda b, n, i: (b, n, 0, 0))
    return tokens, per_query, per_key


class _Rows:
    """Rows ``[start, start + size)`` of refs (length, ...), 0 beyond the end."""

    def __init__(self, start, size, length):
        self.start, self.size = start, size
        self.at = pl.ds(start, size)
        self.inside = range_of(start, size) < length

    def matrix(self, ref):
        return plt.load(ref.at[self.at, :], mask=self.inside[:, None], other=0)

    def vector(self, ref):
        return plt.load(ref.at[self.at], mask=self.inside, other=0)

    def words(self, ref):
        numbers = [jnp.int32(w) for w in range(ref.shape[0])]
        load = lambda w: plt.load(ref.at[w, self.at], mask=self.inside, other=0)  # noqa: E731
        return _in_pairs([load(w) for w in numbers])

    def store(self, to, matrix):
        """Stores rows in ``(reference, indices in front of the last axis)``."""
        ref, part = to
        at = self.at, *map(jnp.int32, part), slice(None)
        plt.store(ref.at[at], matrix.astype(ref.dtype), mask=self.inside[:, None])


def _blocks(length):
    """Returns the number of full blocks, and the rows of a shorter block at the end, or 0.

    Of 196 tokens, 4 are in the last block: as a full block, it would take a quarter of the time.
    """
    full, rest = divmod(length, _BLOCK)
    rest = max(pl.next_power_of_2(rest), 16) if rest else 0
    return (full + 1, 0) if rest == _BLOCK else (full, rest)


def _of_own_rows(run, length, *refs):
    """Calls ``run(rows, *refs)`` for the block of rows of a program."""
    number, (full, rest) = pl.program_id(2), _blocks(length)
    of = lambda size: lambda: run(_Rows(number * _BLOCK, size, length), *refs)  # noqa: E731
    if full and rest:
        lax.cond(number < full, of(_BLOCK), of(rest))
    else:
        of(rest or _BLOCK)()


def _for_all_rows(own, length, add, carry):
    """Returns ``carry`` after ``add(rows, carry)`` for all blocks of rows.

    Args:
      own: the rows of the program.
      length: L.
      add: the function.
      carry: its second argument for the first block.
    """
    full, rest = _blocks(length)
    step = lambda i, carry: add(_Rows(i * _BLOCK, _BLOCK, length), carry)  # noqa: E731
    carry = lax.fori_loop(0, full, step, carry)
    # JAX refuses slices that it knows to end beyond an array, even if they are masked.
    start = full * _BLOCK + 0 * own.start
    return add(_Rows(start, rest, length), carry) if rest else carry


def _bits_of(groups, num_words):
    """Returns the bit of each group in pairs of words, for :func:`_is_selected`."""
    number, bit = groups >> (WORD_BITS + 1), jnp.int32(1) << (groups & (2 * WORD - 1))
    return [jnp.where(number == pair, bit, 0) for pair in range(pl.cdiv(num_words, 2))]


def _in_pairs(words):
    """Returns half as many words with twice as many bits."""
    return [
        functools.reduce(jnp.bitwise_or, [word << i * WORD for i, word in enumerate(pair)])
        for pair in (words[i : i + 2] for i in range(0, len(words), 2))
    ]


def _is_selected(bits, words):
    """Says whether groups selected keys: words (q, 1) and words (1, k), or the other way round."""
    common = [bit & word for bit, word in zip(bits, words, strict=True)]
    return functools.reduce(jnp.bitwise_or, common) != 0


def _attend_block(
    rows, q_ref, k_ref, v_ref, groups_ref, words_ref, output_ref, total_ref, *, scale
):
    length, dim = q_ref.shape
    q = rows.matrix(q_ref)
    bits = [word[:, None] for word in _bits_of(rows.vector(groups_ref), words_ref.shape[0])]

    def attend(keys, attended):
        k, v = keys.matrix(k_ref), keys.matrix(v_ref)
        words = [word[None] for word in keys.words(words_ref)]  # 0 beyond the end: not selected
        products = jnp.where(_is_selected(bits, words), dot(q, k, (1, 1)), MASKED)
        return attended.and_to(products, scale * LOG2_E, v)

    attended = _for_all_rows(rows, length, attend, Attended.to_none(rows.size, dim))
    output, log_total = attended.normalised()
    rows.store((output_ref, ()), output)
    plt.store(total_ref.at[rows.at], log_total, mask=rows.inside)


def _differentiate_block(
    own, q_ref, k_ref, v_ref, groups_ref, words_ref, output_ref, total_ref, d_output_ref,
    *refs, scale,
):  # fmt: skip
    """Computes the gradients of one block of queries, and of the block of keys at its place."""
    (length, dim), num_words = q_ref.shape, words_ref.shape[0]
    to_queries, to_keys, to_values = gradient_refs(refs[:-1])
    zero = jnp.zeros((own.size, dim), jnp.float32)
    own_k, own_v = own.matrix(k_ref), own.matrix(v_ref)
    own_words = [word[:, None] for word in own.words(words_ref)]

    def of_queries(rows):
        """Returns d output, and its product with the output, per query."""
        d_output = rows.matrix(d_output_ref)
        return d_output, jnp.sum(widen(d_output) * widen(rows.matrix(output_ref)), 1)

    def add_to_keys(rows, carry):
        d_k, d_v = carry
        q, (d_output, delta) = rows.matrix(q_ref), of_queries(rows)
        logits = fma(dot(own_k, q, (1, 1)), scale * LOG2_E, -rows.vector(total_ref)[None])
        bits = [word[None] for word in _bits_of(rows.vector(groups_ref), num_words)]
        weights = jnp.where(_is_selected(bits, own_words), exp2(logits), 0)  # (k, q)
        d_v += dot(weights.astype(d_output.dtype), d_output)
        d_logits = weights * (dot(own_v, d_output, (1, 1)) - delta[None])
        return d_k + dot(d_logits.astype(q.dtype), q), d_v

    d_k, d_v = _for_all_rows(own, length, add_to_keys, (zero, zero))
    own.store(to_keys, d_k * scale)
    own.store(to_values, d_v)

    own_q, (own_d, own_delta) = own.matrix(q_ref), of_queries(own)
    own_bits = [word[:, None] for word in _bits_of(own.vector(groups_ref), num_words)]
    own_total = own.vector(total_ref)[:, None]

    def add_to_queries(keys, d_q):
        k, v = keys.matrix(k_ref), keys.matrix(v_ref)
        words = [word[None] for word in keys.words(words_ref)]
        logits = fma(dot(own_q, k, (1, 1)), scale * LOG2_E, -own_total)
        weights = jnp.where(_is_selected(own_bits, words), exp2(logits), 0)  # (q, k)
        d_logits = weights * (dot(own_d, v, (1, 1)) - own_delta[:, None])
        return d_q + dot(d_logits.astype(k.dtype), k)

    d_q = _for_all_rows(own, length, add_to_queries, zero)
    own.store(to_queries, d_q * scale)


def _differentiate_head(
    q_ref, k_ref, v_ref, groups_ref, words_ref, output_ref, total_ref, d_output_ref,
    *refs, scale, interpret,
):  # fmt: skip
    """Computes all gradients of a head; those of the queries stay in registers."""
    (length, dim), num_words, delta_ref = q_ref.shape, words_ref.shape[0], refs[-1]
    to_queries, to_keys, to_values = gradient_refs(refs[:-1])
    zero = 0 * pl.program_id(0)
    full, rest = _blocks(length)
    queries = [_Rows(zero + i * _BLOCK, _BLOCK, length) for i in range(full)]
    queries += [_Rows(zero + full * _BLOCK, rest, length)] * bool(rest)
    for rows in queries:
        products = widen(rows.matrix(d_output_ref)) * widen(rows.matrix(output_ref))
        plt.store(delta_ref.at[rows.at], jnp.sum(products, 1), mask=rows.inside)
    if not interpret:
        plt.debug_barrier()

    def of_keys(keys, d_qs):
        k, v = keys.matrix(k_ref), keys.matrix(v_ref)
        words = [word[:, None] for word in keys.words(words_ref)]
        d_k, d_v = (jnp.zeros((keys.size, dim), jnp.float32) for _ in range(2))
        found = []
        for rows, d_q in zip(queries, d_qs, strict=True):
            q, d_output = rows.matrix(q_ref), rows.matrix(d_output_ref)
            logits = fma(dot(k, q, (1, 1)), scale * LOG2_E, -rows.vector(total_ref)[None])
            bits = [word[None] for word in _bits_of(rows.vector(groups_ref), num_words)]
            weights = jnp.where(_is_selected(bits, words), exp2(logits), 0)  # (k, q)
            d_v += dot(weights.astype(d_output.dtype), d_output)
            d_logits = weights * (dot(v, d_output, (1, 1)) - rows.vector(delta_ref)[None])
            d_logits = d_logits.astype(q.dtype)
            d_k += dot(d_logits, q)
            found.append(d_q + dot(d_logits, k, (0, 0)))
        keys.store(to_keys, d_k * scale)
        keys.store(to_values, d_v)
        return found

    zeros = [jnp.zeros((rows.size, dim), jnp.float32) for rows in queries]
    d_qs = _for_all_rows(queries[-1], length, of_keys, zeros)
    for rows, d_q in zip(queries, d_qs, strict=True):
        rows.store(to_queries, d_q * scale)
