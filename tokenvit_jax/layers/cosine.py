"""Cosine attention of Swin v2 (Liu et al. 2022, Eq. 2), with a bounded learned scale per head."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from tokenvit_jax.ops.unit_norm import unit_norm

INITIAL_LOGIT_SCALE = 10.0
MAX_LOGIT_SCALE = 100.0
# Added to the squared length of queries and keys.
EPSILON = 1e-12

# Initializer of the parameter `logit_scale` (N,), the logarithm of the scale.
logit_scale_init = nn.initializers.constant(np.log(INITIAL_LOGIT_SCALE))


def cosine_heads(
    q: Float[Array, "... N D"], k: Float[Array, "... N D"], logit_scale: Float[Array, " N"]
) -> tuple[Float[Array, "... N D"], Float[Array, "... N D"]]:
    """Scales queries and keys so that their products are the logits of cosine attention.

    Args:
      q: queries (..., N, D).
      k: keys (..., N, D).
      logit_scale: logarithm of the scale of each head (N,).

    Returns:
      Queries whose length is the scale, at most 100, and keys of length 1, in the input types.
    """
    factor = jnp.exp(jnp.minimum(logit_scale, np.log(MAX_LOGIT_SCALE)))[:, None]
    return (unit_length(q) * factor).astype(q.dtype), unit_length(k).astype(k.dtype)


def unit_length(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Scales vectors (..., D) to length 1 for cosine attention; zeros stay zeros."""
    return unit_norm(x, EPSILON)
