"""Divides many tokens into chunks whose size suits the platform."""

from tokenvit_jax.kernels.platforms import device_batch

# Elements per chunk. On CPU a chunk stays in the cache; elsewhere it should fill the device (this
# has not been measured).
CPU_CHUNK, ACCELERATOR_CHUNK = 5 << 18, 1 << 25
# The number of tokens per chunk is a multiple of this, and at least twice this.
LANES = 16


def chunk_tokens(elements: int, batch: int, length: int, width: int) -> int:
    """Returns the number of tokens per chunk such that a device holds about ``elements`` elements.

    Chunk i begins at ``i * size``, or at ``length - size`` if that is less, because
    ``lax.dynamic_slice`` clamps the start: the last chunk repeats tokens instead of having fewer.

    Args:
      elements: ``CPU_CHUNK`` or ``ACCELERATOR_CHUNK``.
      batch: number of images.
      length: N, number of tokens of an image.
      width: number of elements per token of an image in a chunk.
    """
    most = min(max(elements // (device_batch(batch) * width), 2 * LANES), length)
    size = -(-length // num_chunks(length, most))
    return min(-(-size // LANES) * LANES, length)


def num_chunks(length: int, size: int) -> int:
    """Returns the number of chunks of ``size`` tokens that ``length`` tokens need."""
    return -(-length // size)
