"""Types that sums and exponentials are computed in."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def softmax_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the type of distances, softmax and statistics: float64 stays, all else is float32."""
    return jnp.promote_types(dtype, jnp.float32)
