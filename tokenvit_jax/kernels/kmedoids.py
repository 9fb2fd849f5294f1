"""K-Medoids on NVIDIA GPUs, in one program per image through all rounds.

The products of all pairs of tokens of an image do not fit into the registers of a multiprocessor
(256 KiB for 256 tokens), so a program writes them once and then reads them from the L2 cache in
every round. Medoids and clusters go through memory, too: Triton cannot index registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

# One row of products must fit into the registers of a program.
MAX_TOKENS = 1024
_NONE = 2**31 - 1  # index of nothing


def kmedoids_misfit(length: int) -> str | None:
    """Returns why :func:`kmedoids_of_images` cannot take images of ``length`` tokens, or None."""
    return f"{length} tokens; at most {MAX_TOKENS}" if length > MAX_TOKENS else None


def kmedoids_of_images(
    tokens: Float[Array, "B N C"],
    weights: Float[Array, "B N"],
    initial: Int32[Array, "B K"],
    *,
    iterations: int,
    interpret: bool = False,
) -> tuple[Int32[Array, "B K"], Int32[Array, "B N"], Int32[Array, "B K"]]:
    """Computes :func:`tokenvit_jax.ops.kmedoids`.

    Products of two 16-bit numbers are exact in float32, so tokens of 16 bits are multiplied as they
    are; float32 tokens are centred and multiplied by three TF32 products.

    Args:
      tokens: (B, N, C), N at most :data:`MAX_TOKENS`.
      weights: (B, N) float32.
      initial: indices of the initial medoids (B, K).
      iterations: number of rounds.
      interpret: whether to run without a GPU, for tests.

    Returns:
      Indices of the medoids (B, K), cluster of each token (B, N), and sizes of the clusters (B, K).
    """
    batch, length, channels = tokens.shape
    num_clusters = initial.shape[1]
    precision = None
    if tokens.dtype == jnp.float32:
        tokens = tokens - tokens.mean(1, keepdims=True)
        three = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = lax.Precision.HIGHEST if interpret else three
    padded = max(pl.next_power_of_2(length), 16)
    num_warps = min(max(padded // 16, 4), 16 if precision is None else 8)
    kernel = functools.partial(
        _kernel,
        tile=128 if length > 64 and precision is None else 64,
        rows=min(1024 * num_warps // padded, 64),  # 32 products per thread
        padded=padded,
        precision=precision,
        barrier=(lambda: None) if interpret else plt.debug_barrier,
        iterations=iterations,
    )
    stride = pl.cdiv(length, 16) * 16  # aligned rows
    sizes = ((length, channels), (length,), (num_clusters,))
    results = ((num_clusters,), (length,), (num_clusters,), (length, stride))
    dtypes = (jnp.int32, jnp.int32, jnp.int32, jnp.float32)
    block = lambda size: pl.BlockSpec((None, *size), lambda b: (b,) + (0,) * len(size))  # noqa: E731
    medoids, assignment, counts, _ = pl.pallas_call(
        kernel,
        grid=(batch,),
        in_specs=[block(size) for size in sizes],
        out_specs=[block(size) for size in results],
        out_shape=[
            jax.ShapeDtypeStruct((batch, *size), dtype)
            for size, dtype in zip(results, dtypes, strict=True)
        ],
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=2),
        interpret=interpret,
        name="kmedoids",
    )(tokens, weights, initial)
    return medoids, assignment, counts


def _kernel(
    tokens, weights, initial, medoids, assignment, counts, products,
    *, tile, rows, padded, precision, barrier, iterations,
):  # fmt: skip
    """Clusters one image.

    Args:
      tokens: reference to (N, C).
      weights: reference to (N,).
      initial: reference to (K,).
      medoids: reference to the result (K,).
      assignment: reference to the result (N,).
      counts: reference to the result (K,).
      products: reference to (N, at least N), products of tokens, used by this program alone.
      tile: rows and columns of a product of blocks.
      rows: rows of products, or clusters, that are in registers together.
      padded: the power of two from N on.
      precision: precision of the products.
      barrier: makes what was written visible to all threads of the program.
      iterations: number of rounds.
    """
    length, num_clusters = tokens.shape[0], initial.shape[0]
    column = _arange(padded)
    exists = column < length
    blocks = pl.cdiv(num_clusters, rows)

    _multiply(tokens, products, tile, precision)
    _each_block(
        num_clusters, rows,
        lambda at, cluster, valid: _store(medoids, at, _load(initial, at, valid), valid),
    )  # fmt: skip
    barrier()
    square = plt.load(products.at[column, column], mask=exists, other=0.0)

    def distances(token, block_of_products):
        """Returns squared distances (rows, padded) of some tokens (rows,) to all tokens."""
        own = plt.load(products.at[token, token])
        apart = jnp.maximum(own[:, None] + square[None] - 2 * block_of_products, 0.0)
        return jnp.where(token[:, None] == column[None], 0.0, apart)

    def assign():
        def step(i, nearest):
            at = i * rows
            cluster = at + _arange(rows)
            valid = cluster < num_clusters
            token = _load(medoids, at, valid)
            mask = valid[:, None] & exists[None]
            block = plt.load(products.at[token[:, None], column[None]], mask=mask, other=0.0)
            apart = jnp.where(mask, distances(token, block), jnp.inf)
            least = apart.min(0)
            index = jnp.where(apart == least[None], cluster[:, None], _NONE).min(0)
            closer = least < nearest[1]
            return jnp.where(closer, index, nearest[0]), jnp.where(closer, least, nearest[1])

        start = jnp.zeros(padded, jnp.int32), jnp.full(padded, jnp.inf, jnp.float32)
        cluster, _ = lax.fori_loop(0, blocks, step, start)
        _store(assignment, 0, cluster, exists)
        return cluster

    def costs(cluster):
        """Returns the weighted distance of each token to the tokens of its cluster (padded,)."""

        def step(i, cost):
            at = i * rows
            token = at + _arange(rows)
            valid = token < length
            mask = valid[:, None] & exists[None]
            block = plt.load(products.at[pl.ds(at, rows), pl.ds(0, padded)], mask=mask, other=0.0)
            apart = distances(jnp.where(valid, token, 0), block)
            same = _load(assignment, at, valid)[:, None] == cluster[None]
            weight = plt.load(weights.at[pl.ds(at, rows)], mask=valid, other=0.0)
            return cost + jnp.where(same & mask, apart * weight[:, None], 0.0).sum(0)

        return lax.fori_loop(0, pl.cdiv(length, rows), step, jnp.zeros(padded, jnp.float32))

    def move(_, carry):
        cluster = assign()
        barrier()
        cost = costs(cluster)

        def step(at, number, valid):
            member = (number[:, None] == cluster[None]) & exists[None]
            least = jnp.where(member, cost[None], jnp.inf).min(1)
            best = jnp.where(member & (cost[None] == least[:, None]), column[None], _NONE).min(1)
            # A cluster is empty only if its medoid equals an earlier one.
            medoid = jnp.where(best < length, best, _load(medoids, at, valid))
            _store(medoids, at, medoid, valid)

        _each_block(num_clusters, rows, step)
        barrier()
        return carry

    lax.fori_loop(0, iterations, move, 0)
    cluster = assign()

    def count(at, number, valid):
        member = (number[:, None] == cluster[None]) & exists[None]
        _store(counts, at, member.sum(1, dtype=jnp.int32), valid)

    _each_block(num_clusters, rows, count)


def _multiply(tokens, products, tile, precision):
    """Writes the products of all tokens with all tokens, block by block; they are symmetric."""
    length, channels = tokens.shape
    chunk = 32 if tokens.dtype.itemsize == 4 else 64

    def read(start, first):
        row, channel = start + _arange(tile), first + _arange(chunk)
        mask = (row < length)[:, None] & (channel < channels)[None]
        return plt.load(tokens.at[pl.ds(start, tile), pl.ds(first, chunk)], mask=mask, other=0.0)

    def write(product, start, column_start):
        row, column = start + _arange(tile), column_start + _arange(tile)
        mask = (row < length)[:, None] & (column < products.shape[1])[None]
        plt.store(products.at[pl.ds(start, tile), pl.ds(column_start, tile)], product, mask=mask)

    def row_of_blocks(i, carry):
        def one(j, carry):
            def step(c, total):
                left, right = read(i * tile, c * chunk), read(j * tile, c * chunk)
                return total + lax.dot_general(
                    left, right, (((1,), (1,)), ((), ())), precision=precision,
                    preferred_element_type=jnp.float32,
                )  # fmt: skip

            zeros = jnp.zeros((tile, tile), jnp.float32)
            product = lax.fori_loop(0, pl.cdiv(channels, chunk), step, zeros)
            write(product, i * tile, j * tile)
            write(product.T, j * tile, i * tile)
            return carry

        return lax.fori_loop(0, i + 1, one, carry)

    lax.fori_loop(0, pl.cdiv(length, tile), row_of_blocks, 0)


def _each_block(count, size, run):
    """Calls ``run(start, numbers, valid)`` for blocks of the numbers below ``count``."""

    def step(i, carry):
        number = i * size + _arange(size)
        run(i * size, number, number < count)
        return carry

    lax.fori_loop(0, pl.cdiv(count, size), step, 0)


def _arange(size):
    return jnp.arange(size, dtype=jnp.int32)


def _load(numbers, start, valid):
    return plt.load(numbers.at[pl.ds(start, valid.shape[0])], mask=valid, other=0)


def _store(numbers, start, values, valid):
    plt.store(numbers.at[pl.ds(start, valid.shape[0])], values.astype(numbers.dtype), mask=valid)
