"""Pieces that several Pallas kernels share."""

import math
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from tokenvit_jax.kernels.arithmetic import exp2, fma, reciprocal

LOG2_E = math.log2(math.e)
# Logit of a key that does not count. A block may have no key that does: the difference of two such
# logits, each times a factor, must be 0 however it is rounded, hence finite and a power of two.
MASKED = -(2.0**100)


def range_of(start: int | Int32[Array, ""], size: int) -> Int32[Array, " size"]:
    """Returns ``size`` indices from ``start`` on."""
    return start + jnp.arange(size, dtype=jnp.int32)


def sortable(scores: Float[Array, "..."]) -> Int32[Array, "..."]:
    """Returns integers that order like float32 scores; -0 is below 0, and NaN has a place, too."""
    raw = lax.bitcast_convert_type(scores, jnp.int32)
    return raw ^ ((raw >> 31) & 0x7FFFFFFF)


def dot(
    a: Float[Array, "_ _"], b: Float[Array, "_ _"], contract: tuple[int, int] = (1, 0)
) -> Float[Array, "_ _"]:
    """Multiplies two matrices along an axis of each, and adds in float32."""
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def three_products(interpret: bool) -> lax.Precision | lax.DotAlgorithmPreset:
    """Returns the precision of float32 products on tensor cores: three TF32 products for each.

    Args:
      interpret: whether a CPU interprets the kernel; it does not know the algorithm.
    """
    return lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3


class Attended(NamedTuple):
    """Attention of queries to the keys so far, as in flash attention (Dao 2023).

    Attributes:
      output: values, weighted with exp2(logit - largest) and added up (queries, D).
      largest: largest logit of each query (queries,).
      total: sum of the weights (queries,).
    """

    output: jax.Array
    largest: jax.Array
    total: jax.Array

    @classmethod
    def to_none(cls, num_queries: int, dim: int) -> Self:
        """Returns the attention before the first key."""
        zero = jnp.zeros((num_queries,), jnp.float32)
        return cls(jnp.zeros((num_queries, dim), jnp.float32), zero + MASKED, zero)

    def and_to(self, products: jax.Array, factor: float, v: jax.Array) -> Self:
        """Adds keys.

        Args:
          products: of queries and keys, MASKED for keys that do not count (queries, keys).
          factor: positive factor that makes them logits to base 2.
          v: values (keys, D).
        """
        largest = jnp.maximum(self.largest, jnp.max(products, 1) * factor)
        shrink = exp2(self.largest - largest)
        weights = exp2(fma(products, factor, -largest[:, None]))
        output = self.output * shrink[:, None] + dot(weights.astype(v.dtype), v)
        return type(self)(output, largest, self.total * shrink + jnp.sum(weights, 1))

    def normalised(self) -> tuple[jax.Array, jax.Array]:
        """Returns the output (queries, D), and the log-normaliser to base 2 (queries,)."""
        return self.output * reciprocal(self.total)[:, None], self.largest + jnp.log2(self.total)
