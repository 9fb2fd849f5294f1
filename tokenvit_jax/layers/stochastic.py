"""Dropout and stochastic depth that give the same numbers on any number of devices.

Masks are drawn for the global batch from a key that all devices share. Under jit over a mesh that
is what a plain draw does; under a mapped axis every device draws the whole mask, which is small,
and takes its part.
"""

import flax.linen as nn
import jax
from jax import lax


def _keep_mask(rng, rate: float, shape: tuple[int, ...], axis_name: str | None) -> jax.Array:
    if axis_name is None:
        return jax.random.bernoulli(rng, 1 - rate, shape)
    batch, *rest = shape
    mask = jax.random.bernoulli(rng, 1 - rate, (batch * lax.axis_size(axis_name), *rest))
    return _own_part(mask, batch, axis_name)


def image_keys(rng: jax.Array, batch: int, axis_name: str | None) -> jax.Array:
    """Returns a random key for each of the ``batch`` images of a device."""
    if axis_name is None:
        return jax.random.split(rng, batch)
    return _own_part(jax.random.split(rng, batch * lax.axis_size(axis_name)), batch, axis_name)


def _own_part(x: jax.Array, batch: int, axis_name: str) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axis_name) * batch, batch)


class Dropout(nn.Module):
    """Drops single entries of x (B, ...) with probability ``rate`` and scales up the others."""

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.rate == 0:
            return x
        keep = _keep_mask(
            self.make_rng("dropout"), self.rate, self.mask_shape(x.shape), self.axis_name
        )
        return x * (keep.astype(x.dtype) / (1 - self.rate))

    def mask_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of what is dropped or kept as one."""
        return shape


class DropPath(Dropout):
    """Stochastic depth: drops a residual branch for whole images (Huang et al. 2016)."""

    def mask_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0],) + (1,) * (len(shape) - 1)
