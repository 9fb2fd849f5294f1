"""Cosine attention of Swin v2 (Liu et al. 2022, Eq. 2): a learned scale per head, limited."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

INITIAL_LOGIT_SCALE = 10.0
MAX_LOGIT_SCALE = 100.0

# Of the parameter `logit_scale` (N,), which is a logarithm.
logit_scale_init = nn.initializers.constant(np.log(INITIAL_LOGIT_SCALE))


def cosine_heads(q: jax.Array, k: jax.Array, logit_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns queries and keys (..., N, D) whose products are the logits.

    Args:
      q: queries (..., N, D).
      k: keys (..., N, D).
      logit_scale: logarithm of the factor of each head (N,).

    Returns:
      Keys of length 1 and queries of the length of the factor, at most 100, in their types.
    """
    factor = jnp.exp(jnp.minimum(logit_scale, np.log(MAX_LOGIT_SCALE)))[:, None]
    return (unit_length(q) * factor).astype(q.dtype), unit_length(k).astype(k.dtype)


def unit_length(x: jax.Array) -> jax.Array:
    """Returns vectors (..., D) of length 1, in float32 or float64; of zeros: zeros."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-12)
