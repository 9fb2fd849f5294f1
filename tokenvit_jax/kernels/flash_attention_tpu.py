"""Attention on TPUs without logits in memory, by JAX's own kernel (Pallas-Mosaic)."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as library
from jaxtyping import Array, Bool, Float

# Queries and keys of a block, at most; a register has this many lanes.
BLOCK, LANES = 512, 128
# From so many logits per head on, the kernel moves fewer bytes than XLA's operations: compiled for
# v5e with 1,024 x 1,024, a third; with 196 x 196, more, in a training step twice as many.
MIN_LOGITS = 2**20


def is_long(q: Float[Array, "B L N D"], k: Float[Array, "B S N D"]) -> bool:
    """Returns whether :func:`attend_by_flash` is the better form for so many tokens."""
    return q.shape[1] * k.shape[1] >= MIN_LOGITS


def flash_misfit(q: Float[Array, "B L N D"], k: Float[Array, "B S N D"]) -> str | None:
    """Returns why :func:`attend_by_flash` cannot take the arguments, or None."""
    if not q.dtype == k.dtype == jnp.bfloat16:
        return f"q and k of types {q.dtype} and {k.dtype} instead of bfloat16"
    precision = jax.config.jax_default_matmul_precision
    if precision not in (None, "default", "fastest", "bfloat16"):
        return f"products in precision {precision}"  # Mosaic knows no other one of bfloat16
    dim = q.shape[-1]
    step = 8 if dim < LANES else LANES
    return f"head dim {dim} is not a multiple of {step}" if dim % step else None


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
    y = library.flash_attention(q, k, v, segment_ids=segments, sm_scale=scale, block_sizes=sizes)
    return jnp.swapaxes(y[:, :, :queries], 1, 2)


def _padded(x, block):
    """Returns tokens (B, L, N, D) with heads first and whole blocks, (B, N, padded L, D)."""
    x = jnp.swapaxes(x, 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)))
