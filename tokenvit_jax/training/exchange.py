"""What a training step exchanges between devices: shards of parameters, and sums of gradients."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from tokenvit_jax.kernels.platforms import by_platform
from tokenvit_jax.ops.packed import Packing, norm_packed
from tokenvit_jax.training import buckets

FSDP = "fsdp"  # axis of the mesh over which parameters are sharded
WHOLE = -1  # in place of a dimension: an array is not sharded


class Exchange(NamedTuple):
    """The exchanges of a step, which sees one device's part of the batch and of the parameters.

    Attributes:
      axis_name: mapped axis or axes of all devices; None: there is one device.
      dimensions: tree like the parameters, with the dimension of each array that the axis `FSDP`
        divides, or `WHOLE`; None: no array is sharded.
      layers: tree like the parameters, with the layer of each array, counted from the images; None:
        one layer.
    """

    axis_name: str | tuple[str, ...] | None
    dimensions: Any = None
    layers: Any = None

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

    def reduce(
        self, grads: Any, means: Any, sums: Any, dtype: DTypeLike
    ) -> tuple[Any, jax.Array, Any, Any]:
        """Returns gradients, their norm, means and sums over all devices.

        Args:
          grads: gradients of whole arrays, of the loss of this device's images.
          means: tree of arrays whose means over the devices are needed.
          sums: tree of arrays to be added.
          dtype: type in which the gradients travel and are added.

        Returns:
          The mean gradients, of this device's shards, in their own types; their global norm; the
          means; the sums.
        """
        if self.axis_name is None:
            return grads, norm_packed(grads), means, sums
        # Divided before they are added: on a GPU, a quotient of a sum is a launch for each array.
        size = lax.axis_size(self.axis_name)
        parts, means = jax.tree.map(lambda x: x / size, (grads, means))
        if self.dimensions is not None:
            added, norm = self._scatter(parts, dtype)
            return added, norm, *lax.psum((means, sums), self.axis_name)
        one_by_one = functools.partial(self._add, dtype=dtype)
        return by_platform(
            "sums over devices",
            parts,
            means,
            sums,
            default=functools.partial(self._add_in_buckets, dtype=dtype),
            cpu=one_by_one,
            tpu=one_by_one,
            shared=(0, 1, 2),
        )

    def _add(self, grads, means, sums, *, dtype):
        packing = Packing(grads)  # so that all vectors are one part of the sum
        parts = packing.pack(_cast(grads, dtype))
        added, means, sums = lax.psum((parts, means, sums), self.axis_name)
        added = _cast_back(packing.unpack(added), grads)
        return added, norm_packed(added), means, sums

    def _add_in_buckets(self, grads, means, sums, *, dtype):
        leaves, structure = jax.tree.flatten(grads)
        others, structure_of_others = jax.tree.flatten((means, sums))
        layers = [0] * len(leaves) if self.layers is None else jax.tree.leaves(self.layers)
        added, norm, found = buckets.add(leaves, layers, others, self.axis_name, dtype)
        added = structure.unflatten(_cast_back(added, leaves))
        return added, norm, *structure_of_others.unflatten(_cast_back(found, others))

    def _scatter(self, grads, dtype):
        """Adds gradients over all devices; each device gets the sums of its shards only."""
        others = tuple(axis for axis in self.axis_name if axis != FSDP)
        leaves, dimensions = jax.tree.leaves(_cast(grads, dtype)), jax.tree.leaves(self.dimensions)
        pairs = list(zip(leaves, dimensions, strict=True))
        shards = [
            lax.psum_scatter(x, FSDP, scatter_dimension=dimension, tiled=True)
            for x, dimension in pairs
            if dimension != WHOLE
        ]
        whole = [x for x, dimension in pairs if dimension == WHOLE]
        shards, whole = lax.psum(shards, others), lax.psum(whole, self.axis_name)
        wide = (_cast(arrays, jnp.float32) for arrays in (shards, whole))
        of_shards, of_whole = map(norm_packed, wide)
        norm = jnp.sqrt(of_whole**2 + lax.psum(of_shards**2, FSDP))
        shards, whole = iter(shards), iter(whole)
        added = [next(whole if dimension == WHOLE else shards) for dimension in dimensions]
        return _cast_back(jax.tree.unflatten(jax.tree.structure(grads), added), grads), norm


def _cast(arrays, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), arrays)


def _cast_back(arrays, like):
    return jax.tree.map(lambda x, old: x.astype(old.dtype), arrays, like)
