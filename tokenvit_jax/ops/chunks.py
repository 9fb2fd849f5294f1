"""Division of many tokens into chunks of a size that suits the platform."""

from collections.abc import Callable

import jax
from jax import lax

# Numbers of a chunk: on CPU it stays in the cache, elsewhere it fills the machine (not measured).
CPU_CHUNK, ACCELERATOR_CHUNK = 5 << 18, 1 << 25
# Tokens of a chunk come in multiples of this, and at least twice as many.
LANES = 16


def in_chunks(
    run: Callable[[int], jax.Array], length: int, width: int, chunk_size: int | None
) -> jax.Array:
    """Returns ``run(size)`` for the number of tokens that a chunk should have.

    A chunk begins at ``i * size`` or, if that is nearer to the front, at ``length - size``, where
    ``lax.dynamic_slice`` puts it: the last one repeats tokens instead of having fewer.

    Args:
      run: computes everything in chunks of so many tokens.
      length: N.
      width: numbers that a token takes in a chunk, of all images together.
      chunk_size: tokens of a chunk; None: what suits the platform.
    """
    if chunk_size is not None:
        return run(min(chunk_size, length))

    def even(numbers):
        most = min(max(numbers // width, 2 * LANES), length)
        size = -(-length // num_chunks(length, most))
        return min(-(-size // LANES) * LANES, length)

    cpu, other = even(CPU_CHUNK), even(ACCELERATOR_CHUNK)
    if cpu == other:
        return run(cpu)
    return lax.platform_dependent(cpu=lambda: run(cpu), default=lambda: run(other))


def num_chunks(length: int, size: int) -> int:
    """Returns the number of chunks of ``size`` tokens that ``length`` tokens need."""
    return -(-length // size)
