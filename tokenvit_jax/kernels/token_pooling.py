"""K-Medoids and K-Means on NVIDIA GPUs, in one program per image through all rounds.

The products of all pairs of tokens of an image do not fit into the registers of a multiprocessor
(256 KiB for 256 tokens), so a program writes them once and then reads them from the L2 cache in
every round. Centres and clusters go through memory, too: Triton cannot index registers. The rounds
of K-Means also need no tokens: the product of a mean with a token is a mean of products.

Products of two 16-bit numbers are exact in float32, so tokens of 16 bits are multiplied as they
are; float32 tokens are centred and multiplied by three TF32 products.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from tokenvit_jax.kernels.arithmetic import fma, maximum
from tokenvit_jax.kernels.pieces import range_of, three_products

# One row of products must fit into the registers of a program.
MAX_TOKENS = 1024
_NONE = 2**31 - 1  # index of nothing


def pooling_misfit(length: int) -> str | None:
    """Returns why the kernels cannot cluster images of ``length`` tokens, or None."""
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

    Args:
      tokens: (B, N, C), N at most :data:`MAX_TOKENS`.
      weights: (B, N) float32.
      initial: indices of the initial medoids (B, K).
      iterations: number of rounds.
      interpret: whether to run without a GPU, for tests.

    Returns:
      Indices of the medoids (B, K), cluster of each token (B, N), and sizes of the clusters (B, K).
    """
    length, num_clusters = tokens.shape[1], initial.shape[1]
    if tokens.dtype == jnp.float32:
        tokens = tokens - tokens.mean(1, keepdims=True)
    results = {
        "medoids": ((num_clusters,), jnp.int32),
        "assignment": ((length,), jnp.int32),
        "counts": ((num_clusters,), jnp.int32),
        "distances": ((length, _stride(length)), jnp.float32),
        "squares": ((length,), jnp.float32),
    }
    # 32 products per thread; three TF32 products need twice the registers of a thread.
    num_warps = _num_warps(length, 16 if tokens.dtype.itemsize == 2 else 8)
    run = functools.partial(_kmedoids, iterations=iterations)
    return _cluster(run, (tokens, weights, initial), results, num_warps, interpret)[:3]


def kmeans_of_images(
    tokens: Float[Array, "B N C"],
    weights: Float[Array, "B N"],
    initial: Int32[Array, "B K"],
    *,
    iterations: int,
    interpret: bool = False,
) -> tuple[Float[Array, "B K C"], Int32[Array, "B N"], Int32[Array, "B K"], Int32[Array, "B N"]]:
    """Computes :func:`tokenvit_jax.ops.kmeans`.

    Args:
      tokens: (B, N, C), N at most :data:`MAX_TOKENS`.
      weights: (B, N) float32.
      initial: indices of the initial centres (B, K).
      iterations: number of rounds.
      interpret: whether to run without a GPU, for tests.

    Returns:
      Means (B, K, C) in float32, cluster of each token (B, N), sizes of the clusters (B, K), and
      cluster of each token when the means were computed (B, N).
    """
    length, channels = tokens.shape[1:]
    num_clusters = initial.shape[1]
    mean = None
    if tokens.dtype == jnp.float32:
        mean = tokens.mean(1, keepdims=True)
        tokens = tokens - mean
    matrix = (num_clusters, _stride(length)), jnp.float32
    results = {
        "centers": ((num_clusters, channels), jnp.float32),
        "assignment": ((length,), jnp.int32),
        "counts": ((num_clusters,), jnp.int32),
        "members": ((length,), jnp.int32),
        "products": ((length, _stride(length)), jnp.float32),
        "shares": matrix,
        "sums": matrix,
        "squares": ((num_clusters,), jnp.float32),
    }
    run = functools.partial(_kmeans, iterations=iterations)
    args = tokens, weights, initial
    centers, *rest = _cluster(run, args, results, _num_warps(length, 8), interpret)[:4]
    return centers if mean is None else centers + mean, *rest


def _stride(length):
    return pl.cdiv(length, 16) * 16  # aligned rows


def _num_warps(length, most):
    return min(max(_padded(length) // 16, 4), most)


def _padded(length):
    return max(pl.next_power_of_2(length), 16)


def _cluster(run, args, results, num_warps, interpret):
    """Calls ``run(refs, layout)`` for each image, where ``refs`` has arguments and results by name.

    Args:
      run: the program.
      args: tokens (B, N, C), weights (B, N), initial centres (B, K).
      results: name -> shape and type of a result of one image; memory of the program is a result.
      num_warps: warps of a program.
      interpret: whether to run without a GPU.
    """
    batch, length = args[0].shape[:2]
    names = ("tokens", "weights", "initial", *results)

    def program(*refs):
        layout = _Layout(length, args[2].shape[1], args[0].dtype, num_warps, interpret)
        run(dict(zip(names, refs, strict=True)), layout)

    block = lambda size: pl.BlockSpec((None, *size), lambda b: (b,) + (0,) * len(size))  # noqa: E731
    return pl.pallas_call(
        program,
        grid=(batch,),
        in_specs=[block(x.shape[1:]) for x in args],
        out_specs=[block(size) for size, _ in results.values()],
        out_shape=[jax.ShapeDtypeStruct((batch, *size), kind) for size, kind in results.values()],
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=2),
        interpret=interpret,
        name=run.func.__name__.strip("_"),
    )(*args)


class _Layout:
    """Sizes of blocks, and what depends on how a program runs.

    Attributes:
      length: N.
      num_clusters: K.
      padded: the power of two from N on.
      column: numbers of tokens, along rows of products (padded,).
      exists: whether a token has this number (padded,).
      stored: whether a row of a matrix has this column (padded,); the columns beyond the tokens
        allow loads of four numbers at a time.
      first: 0, where jax does not see it: jax 0.12 refuses slices that are known to end beyond an
        array, even if they are masked.
      rows: rows of products, or clusters, that are in registers together.
      three: precision of products of float32 numbers.
      precision: precision of products of tokens.
      tile: rows and columns of a product of blocks of tokens.
    """

    def __init__(self, length, num_clusters, dtype, num_warps, interpret):
        self.length, self.num_clusters = length, num_clusters
        self.padded = _padded(length)
        self.column = range_of(0, self.padded)
        self.exists = self.column < length
        self.stored = self.column < _stride(length)
        self.first = pl.program_id(0) * 0
        self.rows = min(1024 * num_warps // self.padded, 64)
        self.three = three_products(interpret)
        self.precision = None if dtype.itemsize == 2 else self.three
        self.tile = 128 if length > 64 and num_warps == 16 else 64
        self._interpret = interpret

    def barrier(self):
        """Makes what was written visible to all threads of the program."""
        if not self._interpret:
            plt.debug_barrier()


def _kmedoids(refs, layout, iterations):
    medoids, assignment, distances = (refs[x] for x in ("medoids", "assignment", "distances"))
    length, num_clusters, rows = layout.length, layout.num_clusters, layout.rows
    column, exists = layout.column, layout.exists

    def start(at, _, valid):
        _store(medoids, at, _load_tokens(refs["initial"], at, valid, layout), valid)

    _multiply_tokens(refs["tokens"], distances, layout)
    _each_block(num_clusters, rows, start)
    layout.barrier()
    _to_distances(distances, refs["squares"], layout)

    def to_medoids(at, valid):
        return _load_rows(distances, _load(medoids, at, valid), valid, layout, other=jnp.inf)

    def costs(cluster):
        """Returns the weighted distance of each token to the tokens of its cluster (padded,)."""

        def step(i, cost):
            at = i * rows
            token = range_of(at, rows)
            valid = token < length
            block = _load_rows(distances, token, valid, layout)
            same = _load(assignment, at, valid, other=_NONE)[:, None] == cluster[None]
            weight = _load(refs["weights"], at, valid)[:, None]
            return fma(block, jnp.where(same, weight, 0.0), cost)

        zeros = jnp.zeros((rows, layout.padded), jnp.float32)
        return lax.fori_loop(0, pl.cdiv(length, rows), step, zeros).sum(0)

    def assign():
        cluster = _assign(to_medoids, layout)
        _store(assignment, layout.first, cluster, exists)
        return jnp.where(exists, cluster, -1)

    def move():
        """Moves the medoids once; returns whether any has changed."""
        cluster = assign()
        layout.barrier()
        cost = costs(cluster)

        def step(at, number, valid, moved):
            of_members = jnp.where(number[:, None] == cluster[None], cost[None], jnp.inf)
            least = of_members.min(1)
            best = jnp.where(of_members == least[:, None], column[None], _NONE).min(1)
            before = _load(medoids, at, valid)
            layout.barrier()  # all threads must agree on what has moved
            # A cluster is empty only if its medoid equals an earlier one.
            medoid = jnp.where(least < jnp.inf, best, before)
            _store(medoids, at, medoid, valid)
            return moved | (valid & (medoid != before)).astype(jnp.int32)

        moved = _over_blocks(num_clusters, rows, step, jnp.zeros(rows, jnp.int32))
        layout.barrier()
        return moved.max()

    # Once no medoid moves, none moves later.
    lax.fori_loop(
        0, iterations, lambda _, moved: lax.cond(moved > 0, move, lambda: moved), jnp.int32(1)
    )
    cluster = assign()
    _count(refs["counts"], cluster, layout)


def _to_distances(products, squares, layout):
    """Replaces products of all tokens with all by squared distances; equal tokens are 0 apart."""
    column = layout.column
    square = plt.load(products.at[column, column], mask=layout.exists, other=0.0)
    _store(squares, layout.first, square, layout.exists)
    layout.barrier()

    def step(start, token, valid):
        own, block = _load(squares, start, valid), _load_rows(products, token, valid, layout)
        apart = maximum(own[:, None] + square[None] - 2 * block, 0.0)
        apart = jnp.where(token[:, None] == column[None], 0.0, apart)
        _store_rows(products, token, apart, valid, layout)

    _each_block(layout.length, layout.rows, step)
    layout.barrier()


def _kmeans(refs, layout, iterations):
    """Describes each centre by the share of every token in it (K, N).

    The products of centres and tokens are the shares times the products of tokens.
    """
    products, shares, sums, squares = (
        refs[name] for name in ("products", "shares", "sums", "squares")
    )
    length, num_clusters, rows = layout.length, layout.num_clusters, layout.rows
    column, exists = layout.column, layout.exists

    _multiply_tokens(refs["tokens"], products, layout)
    layout.barrier()

    def start(at, number, valid):
        token = _load_tokens(refs["initial"], at, valid, layout)
        share = (token[:, None] == column[None]).astype(jnp.float32)
        _store_rows(sums, number, _load_rows(products, token, valid, layout), valid, layout)
        _store_rows(shares, number, share, valid, layout)
        _store(squares, at, plt.load(products.at[token, token]), valid)

    _each_block(num_clusters, rows, start)
    layout.barrier()
    weight = plt.load(
        refs["weights"].at[pl.ds(layout.first, layout.padded)], mask=exists, other=0.0
    )

    def to_centers(at, valid):
        # Squared distances without |x|^2, which is the same for all centres.
        block = _load_rows(sums, range_of(at, rows), valid, layout)
        return _load(squares, at, valid, other=jnp.inf)[:, None] - 2 * block

    def move(_, carry):
        cluster = _assign(to_centers, layout)
        _store(refs["members"], layout.first, cluster, exists)

        def share(_, number, valid):
            part = jnp.where((number[:, None] == cluster[None]) & exists[None], weight[None], 0.0)
            total = part.sum(1)
            # An empty cluster keeps its centre.
            _store_rows(shares, number, part / total[:, None], valid & (total > 0), layout)

        _each_block(num_clusters, rows, share)
        layout.barrier()
        _multiply(shares, products, sums, length, layout)
        layout.barrier()

        def square(at, number, valid):
            part, block = (_load_rows(x, number, valid, layout) for x in (shares, sums))
            _store(squares, at, (part * block).sum(1), valid)

        _each_block(num_clusters, rows, square)
        layout.barrier()
        return carry

    lax.fori_loop(0, iterations, move, 0)
    cluster = _assign(to_centers, layout)
    _store(refs["assignment"], layout.first, cluster, exists)
    _count(refs["counts"], cluster, layout)
    _multiply(shares, refs["tokens"], refs["centers"], length, layout)


# ------------------------------------------------------------------------------------------------
# Parts of both
# ------------------------------------------------------------------------------------------------


def _assign(distances, layout):
    """Returns the nearest cluster of each token (padded,), ties to the lowest.

    Args:
      distances: (start, valid) -> distances of some clusters to all tokens (rows, padded); inf for
        clusters that are not valid.
      layout: sizes of blocks.
    """
    rows = layout.rows

    def step(i, nearest):
        cluster = range_of(i * rows, rows)
        apart = distances(i * rows, cluster < layout.num_clusters)
        least = apart.min(0)
        index = jnp.where(apart == least[None], cluster[:, None], _NONE).min(0)
        closer = least < nearest[1]
        return jnp.where(closer, index, nearest[0]), jnp.where(closer, least, nearest[1])

    start = jnp.zeros(layout.padded, jnp.int32), jnp.full(layout.padded, jnp.inf, jnp.float32)
    return lax.fori_loop(0, pl.cdiv(layout.num_clusters, rows), step, start)[0]


def _count(counts, cluster, layout):
    def count(at, number, valid):
        member = (number[:, None] == cluster[None]) & layout.exists[None]
        _store(counts, at, member.sum(1, dtype=jnp.int32), valid)

    _each_block(layout.num_clusters, layout.rows, count)


def _multiply_tokens(tokens, products, layout):
    """Writes the products of all tokens with all tokens (N, N), which are symmetric."""
    tile, channels = layout.tile, tokens.shape[1]
    chunk = 64 if layout.precision is None else 32

    def row_of_blocks(i, carry):
        def one(j, carry):
            def step(c, total):
                left, right = (
                    _load_block(tokens, start * tile, c * chunk, (tile, chunk)) for start in (i, j)
                )
                return total + lax.dot_general(
                    left, right, (((1,), (1,)), ((), ())), precision=layout.precision,
                    preferred_element_type=jnp.float32,
                )  # fmt: skip

            zeros = jnp.zeros((tile, tile), jnp.float32)
            product = lax.fori_loop(0, pl.cdiv(channels, chunk), step, zeros)
            _store_block(products, i * tile, j * tile, product)
            _store_block(products, j * tile, i * tile, product.T)
            return carry

        return lax.fori_loop(0, i + 1, one, carry)

    lax.fori_loop(0, pl.cdiv(layout.length, tile), row_of_blocks, 0)


def _multiply(left, right, result, depth, layout, tile=64, chunk=32):
    """Writes the product of the first ``depth`` columns (K, N) with as many rows (N, M): (K, M)."""

    def row_of_blocks(i, carry):
        def one(j, carry):
            def step(n, total):
                a = _load_block(left, i * tile, n * chunk, (tile, chunk), depth)
                b = _load_block(right, n * chunk, j * tile, (chunk, tile)).astype(jnp.float32)
                return total + jnp.dot(a, b, precision=layout.three)

            zeros = jnp.zeros((tile, tile), jnp.float32)
            total = lax.fori_loop(0, pl.cdiv(depth, chunk), step, zeros)
            _store_block(result, i * tile, j * tile, total)
            return carry

        return lax.fori_loop(0, pl.cdiv(result.shape[1], tile), one, carry)

    lax.fori_loop(0, pl.cdiv(result.shape[0], tile), row_of_blocks, 0)


def _each_block(count, size, run):
    """Calls ``run(start, numbers, valid)`` for blocks of the numbers below ``count``."""

    def step(start, number, valid, carry):
        run(start, number, valid)
        return carry

    _over_blocks(count, size, step, 0)


def _over_blocks(count, size, run, carry):
    """Returns ``carry`` after ``run(start, numbers, valid, carry)`` for blocks of the numbers."""

    def step(i, carry):
        number = range_of(i * size, size)
        return run(i * size, number, number < count, carry)

    return lax.fori_loop(0, pl.cdiv(count, size), step, carry)


def _load(numbers, start, valid, other=0):
    return plt.load(numbers.at[pl.ds(start, valid.shape[0])], mask=valid, other=other)


def _load_tokens(numbers, start, valid, layout):
    """Loads numbers of tokens; those that there are not become the first or the last, as in XLA."""
    return jnp.clip(_load(numbers, start, valid), 0, layout.length - 1)


def _store(numbers, start, values, valid):
    at = numbers.at[pl.ds(start, valid.shape[0])]
    plt.store(at, values.astype(numbers.dtype), mask=valid)


def _load_rows(matrix, row, valid, layout, other=0.0):
    at = matrix.at[row[:, None], layout.column[None]]
    return plt.load(at, mask=valid[:, None] & layout.stored[None], other=other)


def _store_rows(matrix, row, values, valid, layout):
    at = matrix.at[row[:, None], layout.column[None]]
    plt.store(at, values, mask=valid[:, None] & layout.stored[None])


def _load_block(matrix, row, column, size, num_columns=None):
    inside = _inside(matrix, row, column, size, num_columns)
    return plt.load(matrix.at[pl.ds(row, size[0]), pl.ds(column, size[1])], mask=inside, other=0.0)


def _store_block(matrix, row, column, values):
    inside = _inside(matrix, row, column, values.shape, None)
    rows, columns = (pl.ds(*at) for at in zip((row, column), values.shape, strict=True))
    plt.store(matrix.at[rows, columns], values, mask=inside)


def _inside(matrix, row, column, size, num_columns):
    rows, columns = range_of(row, size[0]), range_of(column, size[1])
    num_columns = matrix.shape[1] if num_columns is None else num_columns
    return (rows < matrix.shape[0])[:, None] & (columns < num_columns)[None]
