"""What a training step exchanges between devices: shards of parameters, and sums of gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from tokenvit_jax.ops.packed import Packing, norm_packed

FSDP = "fsdp"  # axis of the mesh over which parameters are sharded
WHOLE = -1  # in place of a dimension: an array is not sharded


class Exchange(NamedTuple):
    """The exchanges of a step, which sees one device's part of the batch and of the parameters.

    Attributes:
      axis_name: mapped axis or axes of all devices; None: there is one device.
      dimensions: tree like the parameters, with the dimension of each array that the axis `FSDP`
        divides, or `WHOLE`; None: no array is sharded.
    """

    axis_name: str | tuple[str, ...] | None
    dimensions: Any = None

    def gather(self, params: Any) -> Any:
        """Returns whole arrays from shards, in the types of the shards.

        Args:
          params: this device's shards, best in the type of the computation: half the bytes travel.
        """
        if self.dimensions is None:
            return params

        def whole(x, dimension):
            return x if dimension == WHOLE else lax.all_gather(x, FSDP, axis=dimension, tiled=True)

        return jax.tree.map(whole, params, self.dimensions)

    def reduce(self, grads: Any, means: Any, sums: Any, dtype: DTypeLike) -> tuple[Any, Any, Any]:
        """Returns gradients, means and sums over all devices; each array travels once.

        Args:
          grads: gradients of whole arrays, of the loss of this device's images.
          means: tree of arrays whose means over the devices are needed.
          sums: tree of arrays to be added.
          dtype: type in which the gradients travel and are added.

        Returns:
          The mean gradients, of this device's shards, in their own types; the means; the sums.
        """
        if self.axis_name is None:
            return grads, means, sums
        # Divided before they are added: on a GPU, a quotient of a sum is a launch for each array.
        size = lax.axis_size(self.axis_name)
        parts, means = jax.tree.map(lambda x: x / size, (grads, means))
        parts = jax.tree.map(lambda x: x.astype(dtype), parts)
        if self.dimensions is None:
            packing = Packing(grads)  # so that all vectors are one part of the sum
            added, means, sums = lax.psum((packing.pack(parts), means, sums), self.axis_name)
            added = packing.unpack(added)
        else:
            added = self._scatter(parts)
            means, sums = lax.psum((means, sums), self.axis_name)
        return jax.tree.map(lambda x, old: x.astype(old.dtype), added, grads), means, sums

    def norm(self, grads: Any) -> jax.Array:
        """Returns the global norm of the results of :meth:`reduce`."""
        if self.dimensions is None:
            return norm_packed(grads)
        pairs = self._pairs(grads)
        whole = norm_packed([x for x, dimension in pairs if dimension == WHOLE])
        shards = norm_packed([x for x, dimension in pairs if dimension != WHOLE])
        return jnp.sqrt(whole**2 + lax.psum(shards**2, FSDP))

    def _scatter(self, grads):
        """Adds gradients over all devices; each device gets the sums of its shards only."""
        others = tuple(axis for axis in self.axis_name if axis != FSDP)
        pairs = self._pairs(grads)
        shards = [
            lax.psum_scatter(x, FSDP, scatter_dimension=dimension, tiled=True)
            for x, dimension in pairs
            if dimension != WHOLE
        ]
        shards = iter(lax.psum(shards, others))
        whole = iter(lax.psum([x for x, dim in pairs if dim == WHOLE], self.axis_name))
        added = [next(whole if dimension == WHOLE else shards) for _, dimension in pairs]
        return jax.tree.unflatten(jax.tree.structure(grads), added)

    def _pairs(self, grads):
        return list(zip(jax.tree.leaves(grads), jax.tree.leaves(self.dimensions), strict=True))
