"""Dropout and stochastic depth whose masks do not depend on the number of devices.

Masks are drawn for the global batch from a key that all devices share. Under jit over a mesh a
plain draw does this; under a mapped axis every device draws the whole mask, which is small, and
uses its own part.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key


def _keep_mask(rng, rate: float, shape: tuple[int, ...], axis_name: str | None) -> Array:
    if axis_name is None:
        return jax.random.bernoulli(rng, 1 - rate, shape)
    batch, *rest = shape
    mask = jax.random.bernoulli(rng, 1 - rate, (batch * lax.axis_size(axis_name), *rest))
    return _own_part(mask, batch, axis_name)


def image_keys(rng: Key[Array, ""], batch: int, axis_name: str | None) -> Key[Array, " B"]:
    """Returns a random key for each of the ``batch`` images on a device.

    Args:
      rng: key that all devices share.
      batch: images on a device.
      axis_name: mapped axis that the batch is divided over, for pmap; None under jit.
    """
    if axis_name is None:
        return jax.random.split(rng, batch)
    return _own_part(jax.random.split(rng, batch * lax.axis_size(axis_name)), batch, axis_name)


def _own_part(x: Array, batch: int, axis_name: str) -> Array:
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axis_name) * batch, batch)


class Dropout(nn.Module):
    """Drops entries of x (B, ...) with probability ``rate`` and scales up the others.

    Attributes:
      rate: probability, in [0, 1).
      axis_name: mapped axis that the batch is divided over, for pmap; None under jit.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B ..."], train: bool) -> Float[Array, "B ..."]:
        if not train or self.rate == 0:
            return x
        keep = _keep_mask(
            self.make_rng("dropout"), self.rate, self.mask_shape(x.shape), self.axis_name
        )
        return x * (keep.astype(x.dtype) / (1 - self.rate))

    def mask_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the mask; x entries that share a mask entry are dropped together."""
        return shape


class DropPath(Dropout):
    """Stochastic depth: drops a residual branch for whole images.

    References:
      Huang et al. 2016, "Deep Networks with Stochastic Depth".
    """

    def mask_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0],) + (1,) * (len(shape) - 1)

    def factors(self, batch: int, train: bool) -> Float[Array, " B"] | None:
        """Returns the factor of each image's branch instead of applying it, or None for 1.

        Args:
          batch: images on a device.
          train: whether branches are dropped.
        """
        if not train or self.rate == 0:
            return None
        return self(jnp.ones(batch, jnp.float32), train)


class ChannelDropout(Dropout):
    """Drops whole channels of an image: x (B, ..., C), as `torch.nn.Dropout2d`.

    References:
      Tompson et al. 2015, "Efficient Object Localization Using Convolutional Networks".
    """

    def mask_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], *(1,) * (len(shape) - 2), shape[-1])
