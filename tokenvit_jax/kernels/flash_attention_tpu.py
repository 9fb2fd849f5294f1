"""Attention on TPUs without logits in memory, by JAX's own kernel (Pallas-Mosaic)."""

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as library
from jaxtyping import Array, Bool, Float

# Queries and keys of a block, at most; a register has this many lanes.
BLOCK, LANES = 512, 128
# From so many logits per head on, the kernel needs less time and memory than XLA's operations:
# compiled for v5e with 1,024 x 1,024, a third of the bytes; with 196 x 196, twice as many.
MIN_LOGITS = 2**20


def serves(q: Float[Array, "B L N D"], k: Float[Array, "B S N D"]) -> bool:
    """Returns whether :func:`attend_by_flash` is the better form, and can take the arguments."""
    dim = q.shape[-1]
    return (
        q.dtype == k.dtype == jnp.bfloat16
        and q.shape[1] * k.shape[1] >= MIN_LOGITS
        and dim % (8 if dim < LANES else LANES) == 0
    )


def attend_by_flash(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    key_mask: Bool[Array, "B S"] | None,
    *,
    scale: float,
) -> Float[Array, "B L N D"]:
    """Attends block by block; the arguments are those of `ops.dot_product_attention`."""
    (batch, queries), keys = q.shape[:2], k.shape[1]
    block_q, block_k = (min(BLOCK, -(-length // LANES) * LANES) for length in (queries, keys))
    q, k, v = _padded(q, block_q), _padded(k, block_k), _padded(v, block_k)
    segments = None
    if key_mask is not None or k.shape[2] > keys:
        # Only tokens of the same segment attend to each other.
        mask = jnp.ones((batch, keys), bool) if key_mask is None else key_mask
        mask = jnp.pad(mask, ((0, 0), (0, k.shape[2] - keys))).astype(jnp.int32)
        segments = library.SegmentIds(jnp.ones((batch, q.shape[2]), jnp.int32), mask)
    sizes = library.BlockSizes(
        block_q=block_q, block_k_major=block_k, block_k=block_k, block_b=1,
        block_q_major_dkv=block_q, block_k_major_dkv=block_k, block_k_dkv=block_k,
        block_q_dkv=block_q, block_k_major_dq=block_k, block_k_dq=block_k, block_q_dq=block_q,
    )  # fmt: skip
    y = library.flash_attention(
        q, k, v, segment_ids=segments, sm_scale=scale, block_sizes=sizes
    )  # fmt: skip
    return jnp.swapaxes(y[:, :, :queries], 1, 2)


def _padded(x, block):
    """Returns tokens (B, L, N, D) with heads first and whole blocks, (B, N, padded L, D)."""
    x = jnp.swapaxes(x, 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)))
