"""Elementwise functions of many small arrays, as few operations on one long vector.

A training step updates hundreds of biases and scales, and on a GPU each update is a launch that
takes longer than its work. The compiler does not merge these launches, but it merges slices of a
long vector: one launch for all slices of the same size.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tokenvit_jax.kernels.platforms import by_platform


class Packing:
    """Joins the float32 vectors and scalars of trees with a given structure into one vector.

    A packed tree is a dict of "vectors" (N,) and "others", the tree without its vectors.
    """

    def __init__(self, like: Any):
        """Plans the places of the vectors.

        Args:
          like: tree of arrays.
        """
        leaves, self._structure = jax.tree.flatten(like)
        self._shapes = [x.shape if _is_vector(x) else None for x in leaves]

    def pack(self, tree: Any) -> Any:
        """Packs a tree of this structure."""
        leaves = self._structure.flatten_up_to(tree)
        pairs = list(zip(leaves, self._shapes, strict=True))
        vectors = [x.reshape(-1) for x, shape in pairs if shape is not None]
        others = self._structure.unflatten([x if shape is None else None for x, shape in pairs])
        return {"vectors": jnp.concatenate(vectors), "others": others}

    def unpack(self, packed: Any) -> Any:
        """Undoes :meth:`pack`."""
        others = self._structure.flatten_up_to(packed["others"])
        # The compiler merges slices of a computed vector, and not slices of a vector in memory. So
        # the vector goes to memory and is multiplied by a number that the compiler does not know.
        vectors, one = lax.optimization_barrier((packed["vectors"], jnp.float32(1)))
        vectors = vectors * one
        leaves, first = [], 0
        for other, shape in zip(others, self._shapes, strict=True):
            if shape is None:
                leaves.append(other)
                continue
            size = shape[0] if shape else 1
            leaves.append(vectors[first : first + size].reshape(shape))
            first += size
        return self._structure.unflatten(leaves)

    def pack_parts(self, tree: Any) -> Any:
        """Packs every part of a tree that has this structure, such as the moments of Adam."""
        return _map_parts(self.pack, tree, self._structure)

    def unpack_parts(self, tree: Any) -> Any:
        """Undoes :meth:`pack_parts`."""
        blank = self._structure.unflatten([0 if shape is None else None for shape in self._shapes])
        structure = jax.tree.structure({"vectors": 0, "others": blank})
        return _map_parts(self.unpack, tree, structure)


def map_packed(function: Callable[..., Any], *trees: Any) -> Any:
    """Maps an elementwise function over the leaves of equal trees, over all vectors at once.

    On a CPU, where packing saves nothing, vectors are separate.

    Args:
      function: elementwise function of one leaf of each tree; its result has the leaves' type.
      trees: trees of arrays.
    """

    def packed(*trees):
        packing = Packing(trees[0])
        return packing.unpack(jax.tree.map(function, *map(packing.pack, trees)))

    if not any(map(_is_vector, jax.tree.leaves(trees[0]))):
        return jax.tree.map(function, *trees)
    return by_platform(
        "updates of vectors",
        *trees,
        default=packed,
        cpu=lambda *trees: jax.tree.map(function, *trees),
        shared=tuple(range(len(trees))),
    )


def update_packed(
    update: Callable[..., tuple[Any, Any]], updates: Any, state: Any, params: Any
) -> tuple[Any, Any]:
    """Computes an update of an optimizer, over all vectors at once.

    On a CPU, where packing saves nothing, vectors are separate.

    Args:
      update: ``update(updates, state, params) -> updates, state`` of an optax transformation that
        treats all vectors alike.
      updates: gradients.
      state: state of the optimizer; its parts with the structure of the parameters are packed.
      params: parameters.

    Returns:
      The updates and the new state, which are not packed.
    """

    def packed(updates, state, params):
        packing = Packing(params)
        updates, state = update(
            packing.pack(updates), packing.pack_parts(state), packing.pack(params)
        )
        return packing.unpack(updates), packing.unpack_parts(state)

    if not any(map(_is_vector, jax.tree.leaves(params))):
        return update(updates, state, params)
    return by_platform(
        "updates of vectors",
        updates,
        state,
        params,
        default=packed,
        cpu=update,
        shared=(0, 1, 2),
    )


def _is_vector(x):
    return x.ndim < 2 and x.dtype == jnp.float32


def _map_parts(function, tree, structure):
    def is_part(node):
        return jax.tree.structure(node) == structure

    return jax.tree.map(lambda x: function(x) if is_part(x) else x, tree, is_leaf=is_part)
