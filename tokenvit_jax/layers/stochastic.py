"""Dropout and stochastic depth whose masks do not depend on the number of devices.

Masks are drawn for the global batch from a key that all devices share. Under jit over a mesh a
plain draw does this; under a mapped axis every device draws the whole mask, which is small, and
uses its own part.
"""

from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Key


def _keep_mask(rng, share: ArrayLike, shape: tuple[int, ...], axis_name: str | None) -> Array:
    if axis_name is None:
        return jax.random.bernoulli(rng, share, shape)
    batch, *rest = shape
    mask = jax.random.bernoulli(rng, share, (batch * lax.axis_size(axis_name), *rest))
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
            self.make_rng("dropout"), 1 - self.rate, self.mask_shape(x.shape), self.axis_name
        )
        return x * (keep.astype(x.dtype) / (1 - self.rate))

    def mask_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the mask; x entries that share a mask entry are dropped together."""
        return shape


class ChannelDropout(Dropout):
    """Drops whole channels of an image: x (B, ..., C), as `torch.nn.Dropout2d`.

    References:
      Tompson et al. 2015, "Efficient Object Localization Using Convolutional Networks".
    """

    def mask_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], *(1,) * (len(shape) - 2), shape[-1])


# The factors of a block's two residual branches, for each image; None stands for 1.
Factors: TypeAlias = tuple[Float[Array, " B"] | None, Float[Array, " B"] | None]
KEPT: Factors = (None, None)


class DropPaths(nn.Module):
    """Stochastic depth: drops the residual branches of blocks for whole images.

    The rate grows linearly from 0 at the first block. One draw serves all blocks: a key and a draw
    for each branch would be 250 operations, together a third of those of DGT-T's training step.

    Attributes:
      rate: probability that a branch of the last block is dropped, in [0, 1).
      depth: number of blocks; each has two branches.
      axis_name: mapped axis that the batch is divided over, for pmap; None under jit.

    References:
      Huang et al. 2016, "Deep Networks with Stochastic Depth".
    """

    rate: float
    depth: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, batch: int, train: bool) -> list[Factors]:
        """Returns the factors of the branches of every block, for :func:`drop_branch`.

        Args:
          batch: images on a device.
          train: whether branches are dropped.
        """
        if not train or self.rate == 0 or self.depth == 1:
            return [KEPT] * self.depth
        rates = np.linspace(0, self.rate, self.depth, dtype=np.float32)[1:]
        shape = (batch, self.depth - 1, 2)
        keep = _keep_mask(self.make_rng("dropout"), 1 - rates[:, None], shape, self.axis_name)
        # GPUs compute in one launch what is written this way, and copy parts of an array in many.
        keep = lax.optimization_barrier(jnp.moveaxis(keep, 0, -1))
        blocks = zip(keep, rates, strict=True)
        return [KEPT, *(tuple(mask / (1 - rate) for mask in block) for block, rate in blocks)]


def drop_branch(
    branch: Float[Array, "B ..."], factors: Float[Array, " B"] | None
) -> Float[Array, "B ..."]:
    """Multiplies the branch of each image by its factor; None stands for 1."""
    if factors is None:
        return branch
    return branch * factors.astype(branch.dtype).reshape(-1, *[1] * (branch.ndim - 1))
