"""Elementwise functions of many small arrays, as few operations on one long vector.

A training step updates hundreds of biases and scales, and on a GPU each update is a launch that
takes longer than its work. The compiler does not merge these launches, but it merges slices of a
long vector: one launch for all slices of the same shape.
"""

import collections
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tokenvit_jax.kernels.platforms import by_platform

# Joining arrays of one shape takes up to three launches instead of one for each array.
_MANY = 4
# Slices of one product.
_BUNCH = 64
# Values of a weight whose cast takes longer than a launch even if it is joined with others.
_LARGE = 2**20


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

    @property
    def empty(self) -> bool:
        """Whether no array is joined."""
        return all(shape is None for shape in self._shapes)

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
        shapes = [shape for shape in self._shapes if shape is not None]
        joined = iter(_split(packed["vectors"], shapes))
        leaves = [
            other if shape is None else next(joined)
            for other, shape in zip(others, self._shapes, strict=True)
        ]
        return self._structure.unflatten(leaves)

    def pack_parts(self, tree: Any) -> Any:
        """Packs every part of a tree that has this structure, such as the moments of Adam."""
        return _map_parts(self.pack, tree, self._structure)

    def unpack_parts(self, tree: Any) -> Any:
        """Undoes :meth:`pack_parts`."""
        blank = self._structure.unflatten([0 if shape is None else None for shape in self._shapes])
        structure = jax.tree.structure({"vectors": 0, "others": blank})
        return _map_parts(self.unpack, tree, structure)


def map_packed(function: Callable[..., Any], *trees: Any, limit: int = 0) -> Any:
    """Maps an elementwise function over the leaves of equal trees, over many leaves at once.

    On CPUs and TPUs, where packing saves nothing, leaves are separate.

    Args:
      function: elementwise function of one leaf of each tree.
      trees: trees of arrays.
      limit: vectors are joined, and arrays of the same shape with at most this many values.
    """

    def one_by_one(*trees):
        return jax.tree.map(function, *trees)

    def together(*trees):
        lists = [jax.tree.leaves(tree) for tree in trees]
        results = _map_groups(function, lists, limit)
        return jax.tree.unflatten(jax.tree.structure(trees[0]), results)

    return by_platform(
        "updates of vectors",
        *trees,
        default=together,
        cpu=one_by_one,
        tpu=one_by_one,
        shared=tuple(range(len(trees))),
    )


def update_packed(
    update: Callable[..., tuple[Any, Any]], updates: Any, state: Any, params: Any
) -> tuple[Any, Any]:
    """Computes an update of an optimizer, over all vectors at once.

    On CPUs and TPUs, where packing saves nothing, vectors are separate.

    Args:
      update: ``update(updates, state, params) -> updates, state`` of an optax transformation that
        treats all vectors alike.
      updates: gradients.
      state: state of the optimizer; its parts with the structure of the parameters are packed.
      params: parameters.

    Returns:
      The updates and the new state, which are not packed.
    """

    packing = Packing(params)

    def packed(updates, state, params):
        updates, state = update(
            packing.pack(updates), packing.pack_parts(state), packing.pack(params)
        )
        return packing.unpack(updates), packing.unpack_parts(state)

    if packing.empty:
        return update(updates, state, params)
    return by_platform(
        "updates of vectors",
        updates,
        state,
        params,
        default=packed,
        cpu=update,
        tpu=update,
        shared=(0, 1, 2),
    )


def norm_packed(tree: Any) -> Float[Array, ""]:
    """Returns the global norm of a tree, the square root of the sum of the squares of all values.

    On a CPU, where joining saves nothing, each array is summed by itself; on a TPU each matrix.

    Args:
      tree: tree of float32 arrays.
    """

    def one_by_one(arrays):
        return jnp.sqrt(sum(jnp.square(x).sum() for x in arrays))

    def together(arrays, limit=_LARGE):
        sums = []
        for group in _groups(arrays, limit):
            parts = [arrays[i] for i in group]
            # Arrays of one shape are stacked, not joined in a row, because each may be sharded.
            joined = jnp.concatenate if parts[0].ndim < 2 else jnp.stack
            sums.append(jnp.square(joined([jnp.atleast_1d(x) for x in parts])).sum())
        return jnp.sqrt(sum(sums))

    return by_platform(
        "norm of gradients",
        jax.tree.leaves(tree),
        default=together,
        cpu=one_by_one,
        tpu=functools.partial(together, limit=0),
        shared=(0,),
    )


def map_rows(
    function: Callable[..., tuple[Array, ...]], *lists: list[Array]
) -> list[tuple[Array, ...]]:
    """Maps a function that treats rows alike over lists of arrays, over many arrays at once.

    On CPUs and TPUs, where joining saves nothing, arrays are separate.

    Args:
      function: function of one array of each list; row i of each of its results depends on the
        rows i of its arguments only.
      lists: arrays with rows along the first axis; arrays at the same place have as many rows.

    Returns:
      The results for each place.
    """

    def one_by_one(*lists):
        return [function(*arrays) for arrays in zip(*lists, strict=True)]

    return by_platform(
        "updates of centroids",
        *lists,
        default=functools.partial(join_rows, function),
        cpu=one_by_one,
        tpu=one_by_one,
        shared=tuple(range(len(lists))),
    )


def join_rows(
    function: Callable[..., tuple[Array, ...]], *lists: list[Array]
) -> list[tuple[Array, ...]]:
    """Computes :func:`map_rows` with the rows of equal shape in one array, on every platform."""
    results = [None] * len(lists[0])
    groups = collections.defaultdict(list)
    for i, arrays in enumerate(zip(*lists, strict=True)):
        groups[tuple((x.shape[1:], x.dtype) for x in arrays)].append(i)
    for group in groups.values():
        # The compiler would fuse the joining of hundreds of arrays into every reader of them, and
        # takes minutes to weigh that.
        rows = [jnp.concatenate([arrays[i] for i in group]) for arrays in lists]
        joined = function(*lax.optimization_barrier(rows))
        shapes = [[(len(lists[0][i]), *x.shape[1:]) for i in group] for x in joined]
        parts = [_split(x.reshape(-1), shape) for x, shape in zip(joined, shapes, strict=True)]
        for i, part in zip(group, zip(*parts, strict=True), strict=True):
            results[i] = part
    return results


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def cast_packed(arrays: list[Float[Array, "..."]], dtype: DTypeLike) -> list[Float[Array, "..."]]:
    """Casts float32 arrays to a narrower type, on GPUs with one launch for each shape.

    Args:
      arrays: arrays of any shapes.
      dtype: type of the results; the gradients of the arrays are float32.
    """

    def one_by_one(arrays):
        return [x.astype(dtype) for x in arrays]

    def together(arrays):
        return _map_groups(lambda x: x.astype(dtype), [arrays], limit=_LARGE)

    return by_platform(
        "casts of weights",
        arrays,
        default=together,
        cpu=one_by_one,
        tpu=one_by_one,
        shared=(0,),
    )


def _cast_backward(dtype, _, gradients):
    del dtype
    return ([x.astype(jnp.float32) for x in gradients],)


cast_packed.defvjp(lambda arrays, dtype: (cast_packed(arrays, dtype), None), _cast_backward)


def _map_groups(function, lists, limit):
    """Maps an elementwise function over lists of arrays, with few operations."""
    results = [None] * len(lists[0])
    for group in _groups(lists[0], limit):
        if len(group) == 1:
            results[group[0]] = function(*(arrays[group[0]] for arrays in lists))
            continue
        joined = [jnp.concatenate([arrays[i].reshape(-1) for i in group]) for arrays in lists]
        parts = _split(function(*joined), [lists[0][i].shape for i in group])
        for i, part in zip(group, parts, strict=True):
            results[i] = part
    return results


def _groups(arrays, limit):
    """Returns the places of arrays to be joined: all vectors, or many of one small shape."""
    groups = collections.defaultdict(list)
    for i, x in enumerate(arrays):
        key = "vectors" if _is_vector(x) else (x.shape, x.dtype)
        groups[key if x.ndim < 2 or x.size <= limit else i].append(i)
    enough = {key for key, group in groups.items() if len(group) >= _MANY or key == "vectors"}
    return [
        part
        for key, group in groups.items()
        for part in ([group] if key in enough else [[i] for i in group])
    ]


def _split(flat, shapes):
    """Splits a vector into arrays.

    The compiler merges slices of a computed vector, and not slices of a vector in memory. So the
    vector goes to memory and is multiplied by a number that the compiler does not know; by several
    such numbers, because a product with hundreds of slices goes to memory, too.
    """
    ends = itertools.accumulate(math.prod(shape) for shape in shapes)
    places = sorted(enumerate(zip(shapes, ends, strict=True)), key=lambda place: place[1][0])
    parts = [None] * len(shapes)
    bunches = [places[i : i + _BUNCH] for i in range(0, len(places), _BUNCH)]
    flat, *ones = lax.optimization_barrier((flat, *[jnp.ones((), flat.dtype) for _ in bunches]))
    for bunch, one in zip(bunches, ones, strict=True):
        product = flat * one
        for i, (shape, end) in bunch:
            parts[i] = product[end - math.prod(shape) : end].reshape(shape)
    return parts


def _is_vector(x):
    return x.dtype == jnp.float32 and x.ndim < 2


def _map_parts(function, tree, structure):
    def is_part(node):
        return jax.tree.structure(node) == structure

    return jax.tree.map(lambda x: function(x) if is_part(x) else x, tree, is_leaf=is_part)
