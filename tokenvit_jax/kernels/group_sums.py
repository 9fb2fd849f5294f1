"""Sums of the unit-norm queries in each group on GPUs, deterministic and in one pass."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from tokenvit_jax.kernels.arithmetic import maximum
from tokenvit_jax.kernels.group_routing import MAX_GROUPS
from tokenvit_jax.kernels.pieces import dot, range_of

# Queries at a time, and the least number of programs, which occupy a GPU.
_QUERIES = 64
_PROGRAMS = 256


def group_sums_misfit(q: Float[Array, "B L N D"], num_groups: int) -> str | None:
    """Returns why :func:`sum_groups` cannot take these queries, or None."""
    if q.shape[-1] not in (16, 32, 64, 128):
        return f"head dim {q.shape[-1]} is not a power of two from 16 to 128"
    if num_groups > MAX_GROUPS:
        return f"{num_groups} groups are more than {MAX_GROUPS}"
    return None


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def sum_groups(
    q: Float[Array, "B L N D"],
    groups: Int32[Array, "B N L"],
    num_groups: int,
    interpret: bool = False,
) -> Float[Array, "parts N G D+1"]:
    """Sums the unit-norm queries in each group over parts of the batch; no gradient passes.

    Args:
      q: queries (B, L, N, D).
      groups: group of each query (B, N, L), in [0, num_groups).
      num_groups: G.
      interpret: whether to run without a GPU, for tests.

    Returns:
      Sums and the number of queries, (parts, N, G, D + 1) in float32, one part per program.
    """
    batch, length, heads, dim = q.shape
    images = _images_of_program(batch, heads)
    parts = batch // images
    return pl.pallas_call(
        functools.partial(_sum, num_groups=num_groups),
        grid=(parts, heads),
        in_specs=[
            pl.BlockSpec((images, length, None, dim), lambda p, n: (p, 0, n, 0)),
            pl.BlockSpec((images, None, length), lambda p, n: (p, n, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, num_groups, dim + 1), lambda p, n: (p, n, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((parts, heads, num_groups, dim + 1), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="group_sums",
    )(q, groups)


@sum_groups.defjvp
def _without_gradient(num_groups, interpret, primals, _):
    sums = sum_groups(*primals, num_groups, interpret)
    return sums, jnp.zeros_like(sums)


def _images_of_program(batch, heads):
    """Returns the largest divisor of the batch, a power of two, that leaves enough programs."""
    images = 1
    while batch % (2 * images) == 0 and batch // (2 * images) * heads >= _PROGRAMS:
        images *= 2
    return images


def _sum(q_ref, groups_ref, sums_ref, *, num_groups):
    images, length, dim = q_ref.shape
    blocks = pl.cdiv(length, _QUERIES)
    rows = max(16, pl.next_power_of_2(num_groups))
    group = range_of(0, rows)

    def add(i, carry):
        sums, counts = carry
        i = i.astype(jnp.int32)  # jax may count in 64 bits
        image = lax.div(i, jnp.int32(blocks))
        start = (i - image * blocks) * _QUERIES
        at, inside = pl.ds(start, _QUERIES), range_of(start, _QUERIES) < length
        q = plt.load(q_ref.at[image, at, :], mask=inside[:, None], other=0).astype(jnp.float32)
        groups = plt.load(groups_ref.at[image, at], mask=inside, other=-1)
        square = maximum(jnp.sum(q * q, 1), jnp.finfo(jnp.float32).tiny)
        left = q * lax.rsqrt(square)[:, None]
        # Threads hold columns of (queries, groups): sums over queries need few exchanges.
        member = groups[:, None] == group[None]
        # The tensor cores add numbers of 8 bits: three of them hold a float32.
        for _ in range(3):
            part = left.astype(jnp.bfloat16)
            sums += dot(member.astype(jnp.bfloat16), part, (0, 0))
            left -= part.astype(jnp.float32)
        return sums, counts + jnp.sum(member.astype(jnp.float32), 0)

    zero = jnp.zeros((rows, dim), jnp.float32), jnp.zeros((rows,), jnp.float32)
    sums, counts = lax.fori_loop(0, images * blocks, add, zero)
    # A start that jax does not see: jax 0.12 refuses slices that are known to end outside.
    at, inside = pl.ds(pl.program_id(0) * 0, rows), group < num_groups
    plt.store(sums_ref.at[at, pl.ds(0, dim)], sums, mask=inside[:, None])
    plt.store(sums_ref.at[at, jnp.int32(dim)], counts, mask=inside)
