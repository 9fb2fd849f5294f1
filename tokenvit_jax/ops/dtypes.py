"""Types in which sums and exponentials are computed."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def softmax_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the type of distances, softmax and statistics: float64 for float64, else float32."""
    return jnp.promote_types(dtype, jnp.float32)
