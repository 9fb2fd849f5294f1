"""Kernels of clustering by density peaks for NVIDIA GPUs (Pallas-Triton).

The distances between tokens never leave the registers: a program holds a block of queries and
streams over blocks of keys. All kernels break ties by the lowest index, like the forms in XLA's
operations. Arrays have the batch as their leading axis, and one program works on one image.

Tensor cores multiply tokens of 16 bits once: such products are exact in float32. They multiply
parts of float32 numbers three times (TF32_TF32_F32_X3), which gives the same assignments as full
float32; plain TF32 does not.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from tokenvit_jax.kernels.arithmetic import fma
from tokenvit_jax.kernels.pieces import range_of, three_products

# Limits of the kernels: channels of a token, and neighbours that are kept in registers.
MOST_CHANNELS, MOST_NEIGHBORS = 512, 16
# Queries and keys per block, and tokens per round of the kernel without products.
BLOCK, ROUND = 64, 1024
# Distance of tokens of 16 bits, in parts of their size, below which they count as equal: their
# resolution. The digits that tensor cores drop would otherwise keep equal tokens apart.
RESOLUTION = 2.0**-9
_NO_KEY = 2**31 - 1


def misfit(channels: int, neighbors: int = 1) -> str | None:
    """Returns why the kernels cannot take tokens with so many channels, or None."""
    if channels > MOST_CHANNELS:
        return f"{channels} channels are more than {MOST_CHANNELS}"
    if neighbors > MOST_NEIGHBORS:
        return f"{neighbors} neighbors are more than {MOST_NEIGHBORS}"
    return None


# ------------------------------------------------------------------------------------------------
# Blocks of tokens and of distances
# ------------------------------------------------------------------------------------------------


def _call(kernel, grid, inputs, outputs, interpret, **options):
    """Calls a kernel whose programs see all of one image; the last axis of the grid is the batch.

    Args:
      kernel: function of the references to one image of each input and output.
      grid: (blocks, B).
      inputs: arrays (B, ...).
      outputs: shapes and types of the results (B, ...).
    """

    def whole(x):
        block = (None, *x.shape[1:])
        return pl.BlockSpec(block, lambda _, image: (image, *[0] * (len(block) - 1)))

    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[whole(x) for x in inputs],
        out_specs=[whole(x) for x in outputs],
        out_shape=outputs,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        **options,
    )(*inputs)


def _precision(x, interpret):
    return None if x.dtype.itemsize == 2 else three_products(interpret)


def _blocks(length):
    return -(-length // BLOCK)


def _vector(ref, index, other):
    """Loads ref[index], and ``other`` beyond the end."""
    return plt.load(ref.at[index], mask=index < ref.shape[0], other=other)


def _tile(ref, rows, columns):
    """Loads the rows and columns of a matrix, and zeros beyond its edges."""
    length, channels = ref.shape
    inside = (rows < length)[:, None] & (columns < channels)[None]
    return plt.load(ref.at[rows[:, None], columns[None]], mask=inside, other=0.0)


def squared_distances(
    scores: Float[Array, "..."], squares: Float[Array, "..."], dtype: DTypeLike
) -> Float[Array, "..."]:
    """Returns the squared distances of keys and queries; 0 for tokens that count as equal.

    Args:
      scores: |key|^2 - 2 key.query.
      squares: |query|^2.
      dtype: type of the tokens.
    """
    found = scores + squares
    least = RESOLUTION**2 * squares if jnp.dtype(dtype).itemsize == 2 else 0.0
    return jnp.where(found <= least, 0.0, found)


def _scores(x, bias, rows, precision) -> Callable:
    """Returns a function from keys (K,) to bias[key] - 2 x[key].x[row], (rows, keys).

    Keys beyond the end of x have score inf.
    """
    products = _products(x, rows, precision)
    return lambda keys: fma(products(keys), -2.0, _vector(bias, keys, jnp.inf)[None])


def _products(x, rows, precision) -> Callable:
    """Returns a function from keys (K,) to x[key].x[row], (rows, keys)."""
    width = min(max(pl.next_power_of_2(x.shape[1]), 16), 64)
    parts = -(-x.shape[1] // width)

    def query(part):
        return _tile(x, rows, range_of(part * width, width))

    def products(part, keys, query):
        return lax.dot_general(
            query, _tile(x, keys, range_of(part * width, width)), (((1,), (1,)), ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip

    if parts == 1:
        held = query(0)
        return lambda keys: products(0, keys, held)

    def of_all_parts(keys):
        # All queries would not fit into the registers: they are loaded for every block of keys.
        add = lambda part, total: total + products(part, keys, query(part))  # noqa: E731
        total = jnp.zeros((rows.shape[0], keys.shape[0]), jnp.float32)
        return lax.fori_loop(0, parts, add, total)

    return of_all_parts


def _nearest(scores, num_blocks, none):
    """Returns the smallest score of each row and its key, ties to the lowest.

    Every thread compares its own entries; the rows are compared at the end.

    Args:
      scores: function from keys (BLOCK,) to their scores (rows, BLOCK).
      num_blocks: number of blocks of keys.
      none: keys of the rows where all scores are inf (rows,).
    """

    def step(i, carry):
        best, at = carry
        keys = range_of(i * BLOCK, BLOCK)
        tile = scores(keys)
        nearer = tile < best
        return jnp.where(nearer, tile, best), jnp.where(nearer, keys[None], at)

    shape = none.shape[0], BLOCK
    best = jnp.full(shape, jnp.inf, jnp.float32)
    best, at = lax.fori_loop(0, num_blocks, step, (best, jnp.broadcast_to(none[:, None], shape)))
    low = best.min(1)
    return low, jnp.where(best == low[:, None], at, _NO_KEY).min(1)


# ------------------------------------------------------------------------------------------------
# Pass 1: nearest neighbours
# ------------------------------------------------------------------------------------------------


def nearest_neighbors(
    x: Float[Array, "B N C"],
    square: Float[Array, "B N"],
    bias: Float[Array, "B N"],
    *,
    k: int,
    masked: bool,
    interpret: bool = False,
) -> tuple[Float[Array, "B k N"], Int32[Array, "B k N"], Float[Array, "B N"]]:
    """Finds the k nearest tokens of every token, and the distance of the farthest one.

    Args:
      x: tokens (B, N, C).
      square: |x|^2 (B, N).
      bias: |x|^2, or inf for tokens that are neighbours of no token (B, N).
      k: number of neighbours, at most ``MOST_NEIGHBORS``.
      masked: whether a bias may be inf.
      interpret: run on a CPU, for tests.

    Returns:
      Rising squared distances (B, k, N), inf where there is no neighbour; indices (B, k, N); the
      largest squared distance of each token (B, N), -inf for those with bias inf.
    """
    batch, length, _ = x.shape
    kernel = functools.partial(
        _nearest_kernel, k=k, masked=masked, precision=_precision(x, interpret)
    )
    outputs = [
        jax.ShapeDtypeStruct((batch, k, length), jnp.float32),
        jax.ShapeDtypeStruct((batch, k, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.float32),
    ]
    return _call(kernel, (_blocks(length), batch), (x, square, bias), outputs, interpret)


def _nearest_kernel(x, square, bias, squares, indices, farthest, *, k, masked, precision):
    length = x.shape[0]
    rows = range_of(pl.program_id(0) * BLOCK, BLOCK)
    own, inside = _vector(square, rows, 0.0), rows < length
    scores = _scores(x, bias, rows, precision)
    bound, far = _bounds(scores, own, k, length, 0 if masked else length // BLOCK)

    def step(i, carry):
        return _insert(scores(range_of(i * BLOCK, BLOCK)), i * BLOCK, *carry)

    carry = (bound,) * k, (jnp.zeros((BLOCK,), jnp.int32),) * k
    values, numbers = lax.fori_loop(0, _blocks(length), step, carry)
    for i in range(k):
        at = jnp.full_like(rows, i), rows
        plt.store(squares.at[at], squared_distances(values[i], own, x.dtype), mask=inside)
        plt.store(indices.at[at], numbers[i], mask=inside)
    far = squared_distances(far, own, x.dtype)
    far = jnp.where(_vector(bias, rows, jnp.inf) < jnp.inf, far, -jnp.inf)
    plt.store(farthest.at[rows], far, mask=inside)


def _bounds(scores, own, k, length, full):
    """Returns a score above the k smallest of each row, inf if there are fewer, and the largest.

    Keys with the same place in their block are one group; at least k keys are as near as the k-th
    nearest group. With that bound, only keys that are neighbours are inserted: maps of 56 x 56
    random tokens need half of the rounds, smooth maps a tenth.

    Args:
      scores: function from keys to their scores.
      own: |row|^2 (rows,).
      k: number of neighbours.
      length: N.
      full: number of the first blocks where all keys count.
    """

    def step(i, carry, all_count):
        near, far = carry
        tile = scores(range_of(i * BLOCK, BLOCK))
        # Keys that do not count are infinitely near here.
        farther = tile if all_count else jnp.where(tile < jnp.inf, tile, -jnp.inf)
        return jnp.minimum(near, tile), jnp.maximum(far, farther)

    none = jnp.full((BLOCK, BLOCK), jnp.inf, jnp.float32)
    carry = lax.fori_loop(0, full, functools.partial(step, all_count=True), (none, -none))
    rest = functools.partial(step, all_count=False)
    near, far = lax.fori_loop(full, _blocks(length), rest, carry)
    for _ in range(k):
        bound = near.min(1)
        near = jnp.where(near == bound[:, None], jnp.inf, near)
    # Rounding must not exclude the k-th neighbour.
    return bound + (jnp.abs(bound) + own) * 2.0**-18 + jnp.finfo(jnp.float32).tiny, far.max(1)


def _insert(tile, start, values, numbers):
    """Inserts the entries of a tile that are among the k smallest of their row.

    Every round takes the smallest entry of each row. Few rounds are needed, because few entries of
    a tile are smaller than the k-th so far.

    Args:
      tile: (BLOCK, keys), whose first column is key ``start``.
      values, numbers: k vectors each, the smallest entries so far in rising order and their keys.
    """
    columns = range_of(0, tile.shape[1])[None]

    def improves(carry):
        _, low, values, _ = carry
        return (low < values[-1]).astype(jnp.int32).max() > 0

    def insert(carry):
        tile, low, values, numbers = carry
        at = jnp.where(tile == low[:, None], columns, tile.shape[1]).min(1)
        values, numbers = insert_entry(low, start + at, values, numbers)
        tile = jnp.where(columns == at[:, None], jnp.inf, tile)
        return tile, tile.min(1), values, numbers

    carry = lax.while_loop(improves, insert, (tile, tile.min(1), values, numbers))
    return carry[2:]


def insert_entry(
    new: Float[Array, "..."],
    number: Int32[Array, "..."],
    values: tuple[Float[Array, "..."], ...],
    numbers: tuple[Int32[Array, "..."], ...],
) -> tuple[tuple[Float[Array, "..."], ...], tuple[Int32[Array, "..."], ...]]:
    """Inserts an entry per query into k entries in rising order and drops the largest.

    The new entry comes after its equals, whose keys are lower. Displaced entries keep their order.

    Args:
      new: values of the new entries, one per query.
      number: their keys.
      values: k rising values per query.
      numbers: their keys.

    Returns:
      The new values and numbers.
    """
    before = [new < value for value in values]

    def insert(item, items):
        moved = [jnp.where(before[0], item, items[0])]
        for i in range(1, len(items)):
            entry = jnp.where(before[i], item, items[i])
            moved.append(jnp.where(before[i - 1], items[i - 1], entry))
        return tuple(moved)

    return insert(new, values), insert(number, numbers)


# ------------------------------------------------------------------------------------------------
# Pass 2: nearest denser token
# ------------------------------------------------------------------------------------------------


def nearest_denser(
    x: Float[Array, "B N C"],
    square: Float[Array, "B N"],
    bias: Float[Array, "B N"],
    density: Float[Array, "B N"],
    squares: Float[Array, "B k N"],
    indices: Int32[Array, "B k N"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B N"], Int32[Array, "B N"]]:
    """Finds the nearest denser token of every token.

    The first kernel looks among the k nearest tokens and lists the tokens without a denser one
    there; the second kernel searches all tokens for those in the list. It stops at the end of the
    list of its own image.

    Args:
      x: tokens (B, N, C).
      square: |x|^2 (B, N).
      bias: |x|^2, or inf for tokens that are not searched and not found (B, N).
      density: (B, N); of two equally dense tokens the one with the lower index counts as denser.
      squares: rising squared distances of the k nearest tokens (B, k, N), inf where there is none.
      indices: the k nearest tokens (B, k, N).
      interpret: run on a CPU, for tests.

    Returns:
      Squared distance and index (B, N); inf and the token itself if there is no denser token.
    """
    batch, length, _ = x.shape
    rounds = -(-length // ROUND)
    numbers = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    outputs = [
        jax.ShapeDtypeStruct((batch, length), jnp.float32),
        numbers,
        jax.ShapeDtypeStruct((batch, rounds * ROUND), jnp.int32),
        jax.ShapeDtypeStruct((batch, 1), jnp.int32),
    ]
    found = _call(
        _among_neighbors_kernel, (1, batch), (bias, density, squares, indices), outputs, interpret
    )
    kernel = functools.partial(_search_kernel, precision=_precision(x, interpret))
    inputs = x, square, bias, density, *found
    aliases = {4: 0, 5: 1}  # the kernel replaces the results of the listed tokens
    return _call(
        kernel, (_blocks(length), batch), inputs, outputs[:2], interpret,
        input_output_aliases=aliases,
    )  # fmt: skip


def is_denser(
    density: Float[Array, "..."],
    index: Int32[Array, "..."],
    than_density: Float[Array, "..."],
    than_index: Int32[Array, "..."],
) -> Bool[Array, "..."]:
    """Returns which tokens are denser than others; equally dense ones, if the index is lower.

    Args:
      density: densities of the tokens.
      index: their indices.
      than_density: densities of the others, broadcast against the first.
      than_index: their indices.
    """
    return (density > than_density) | ((density == than_density) & (index < than_index))


def _among_neighbors_kernel(bias, density, squares, indices, found, parent, order, count):
    k, length = squares.shape

    def step(i, listed):
        rows = range_of(i * ROUND, ROUND)
        inside = rows < length
        own = _vector(density, rows, 0.0)
        square, number = jnp.full((ROUND,), jnp.inf, jnp.float32), rows
        for j in reversed(range(k)):  # ties: keep the first one
            neighbor = jnp.full_like(rows, j), rows
            near = plt.load(squares.at[neighbor], mask=inside, other=jnp.inf)
            at = plt.load(indices.at[neighbor], mask=inside, other=0)
            denser = is_denser(plt.load(density.at[at]), at, own, rows) & (near < jnp.inf)
            square, number = jnp.where(denser, near, square), jnp.where(denser, at, number)
        plt.store(found.at[rows], square, mask=inside)
        plt.store(parent.at[rows], number, mask=inside)
        pending = (_vector(bias, rows, jnp.inf) < jnp.inf) & (square == jnp.inf)
        # The tokens of the list come first in ``order``, the others last, so that every place is
        # written once.
        places = listed + jnp.cumsum(pending, dtype=jnp.int32)
        others = order.shape[0] - 1 - (rows - places)
        plt.store(order.at[jnp.where(pending, places - 1, others)], rows)
        return listed + pending.sum(dtype=jnp.int32)

    listed = lax.fori_loop(0, order.shape[0] // ROUND, step, jnp.int32(0))
    plt.store(count.at[range_of(0, 1)], jnp.full((1,), listed, jnp.int32))


def _search_kernel(x, square, bias, density, _, __, order, count, found, parent, *, precision):
    length, start = x.shape[0], pl.program_id(0) * BLOCK
    listed = plt.load(count.at[jnp.int32(0)])

    @pl.when(start < listed)
    def _():
        places = range_of(start, BLOCK)
        rows = plt.load(order.at[places])
        scores = _scores(x, bias, rows, precision)
        own = _vector(density, rows, 0.0)

        def of_denser(keys):
            denser = is_denser(
                _vector(density, keys, 0.0)[None], keys[None], own[:, None], rows[:, None]
            )
            return jnp.where(denser, scores(keys), jnp.inf)

        low, at = _nearest(of_denser, _blocks(length), rows)
        pending = places < listed
        nearest = squared_distances(low, _vector(square, rows, 0.0), x.dtype)
        plt.store(found.at[rows], nearest, mask=pending)
        plt.store(parent.at[rows], at, mask=pending)


# ------------------------------------------------------------------------------------------------
# Nearest centres
# ------------------------------------------------------------------------------------------------


def nearest_center(
    x: Float[Array, "B N C"],
    square: Float[Array, "B N"],
    centers: Int32[Array, "B M"],
    num_used: Int32[Array, " B"],
    *,
    interpret: bool = False,
) -> Int32[Array, "B N"]:
    """Returns the number of the nearest centre of every token.

    Args:
      x: tokens (B, N, C).
      square: |x|^2 (B, N).
      centers: tokens at the centres (B, M).
      num_used: number of centres that can be nearest, the first ones (B,); 0: the result is 0.
      interpret: run on a CPU, for tests.

    Returns:
      (B, N), in [0, M).
    """
    batch, length, _ = x.shape
    kernel = functools.partial(_nearest_center_kernel, precision=_precision(x, interpret))
    inputs = x, square, centers, num_used[:, None]
    outputs = [jax.ShapeDtypeStruct((batch, length), jnp.int32)]
    return _call(kernel, (_blocks(length), batch), inputs, outputs, interpret)[0]


def _nearest_center_kernel(x, square, centers, num_used, nearest, *, precision):
    length = x.shape[0]
    rows = range_of(pl.program_id(0) * BLOCK, BLOCK)
    scores = _scores(x, square, rows, precision)
    used = plt.load(num_used.at[jnp.int32(0)])

    def of_centers(numbers):
        return scores(plt.load(centers.at[numbers], mask=numbers < used, other=length))

    _, number = _nearest(of_centers, _blocks(centers.shape[0]), jnp.zeros_like(rows))
    plt.store(nearest.at[rows], number, mask=rows < length)
