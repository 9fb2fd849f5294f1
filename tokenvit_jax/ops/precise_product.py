"""Matrix products with the precision of float32."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tokenvit_jax.kernels.platforms import by_platform


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def precise_product(
    spec: str, x: Float[Array, "B ..."], y: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """Returns ``jnp.einsum(spec, x, y)`` with the precision of float32, for distances.

    GPUs multiply on tensor cores, three times in TF32: nearest tokens are the same as with float32.

    Args:
      spec: such as "bnc,bmc->bnm"; the batch comes first, and every index occurs twice.
      x: first array (B, ...).
      y: second array (B, ...).
    """
    exact, fast = (
        functools.partial(jnp.einsum, spec, precision=precision)
        for precision in (lax.Precision.HIGHEST, lax.DotAlgorithmPreset.TF32_TF32_F32_X3)
    )
    return by_platform("precise product", x, y, default=exact, cuda=fast)


def _forward(spec, x, y):
    return precise_product(spec, x, y), (x, y)


def _backward(spec, residuals, d_result):
    x, y = residuals
    of_x, of_y, of_result = (*spec.split("->")[0].split(","), spec.split("->")[1])
    d_x = precise_product(f"{of_result},{of_y}->{of_x}", d_result, y)
    d_y = precise_product(f"{of_x},{of_result}->{of_y}", x, d_result)
    return d_x, d_y


precise_product.defvjp(_forward, _backward)
