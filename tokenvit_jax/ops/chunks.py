"""Divides many tokens into chunks whose size suits the platform."""

from collections.abc import Callable
from typing import Any

from jax import lax

from tokenvit_jax.kernels.platforms import device_batch

# Elements per chunk. On CPU a chunk stays in the cache; elsewhere it should fill the device (this
# has not been measured).
CPU_CHUNK, ACCELERATOR_CHUNK = 5 << 18, 1 << 25
# The number of tokens per chunk is a multiple of this, and at least twice this.
LANES = 16


def in_chunks(
    run: Callable[[int], Any], batch: int, length: int, width: int, chunk_size: int | None
) -> Any:
    """Calls ``run`` with the number of tokens per chunk that suits the platform.

    Chunk i begins at ``i * size``, or at ``length - size`` if that is less, because
    ``lax.dynamic_slice`` clamps the start: the last chunk repeats tokens instead of having fewer.

    Args:
      run: function that computes the whole result in chunks with the given number of tokens.
      batch: number of images.
      length: N, number of tokens of an image.
      width: number of elements per token of an image in a chunk.
      chunk_size: tokens per chunk; None: chosen for the platform.

    Returns:
      The result of ``run``.
    """
    if chunk_size is not None:
        return run(min(chunk_size, length))

    def even(numbers):
        most = min(max(numbers // (device_batch(batch) * width), 2 * LANES), length)
        size = -(-length // num_chunks(length, most))
        return min(-(-size // LANES) * LANES, length)

    cpu, other = even(CPU_CHUNK), even(ACCELERATOR_CHUNK)
    if cpu == other:
        return run(cpu)
    return lax.platform_dependent(cpu=lambda: run(cpu), default=lambda: run(other))


def num_chunks(length: int, size: int) -> int:
    """Returns the number of chunks of ``size`` tokens that ``length`` tokens need."""
    return -(-length // size)
