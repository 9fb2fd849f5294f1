"""Attention to a few places of several maps, which the queries choose."""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from tokenvit_jax.kernels.platforms import by_platform
from tokenvit_jax.ops.counted import counted
from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.ops.gather import take

Shapes = tuple[tuple[int, int], ...]


def _macs(inputs, outputs):
    # Each output is a weighted sum of four values for every place.
    return 4 * math.prod(inputs[2]) * outputs[0][-1]


@counted(_macs, static_argnames=("shapes",))
def deformable_attention(
    value: Float[Array, "B S N D"],
    places: Float[Array, "B Q N L P 2"],
    weights: Float[Array, "B Q N L P"],
    *,
    shapes: Shapes,
) -> Float[Array, "B Q N D"]:
    """Sums up values at places of several maps, with weights.

    Values between the cells of a map are interpolated bilinearly; outside of a map, values are 0.
    The gradient keeps nothing but the arguments.

    Args:
      value: cells of all maps (B, S, N, D), map after map and row by row, with N heads.
      places: (B, Q, N, L, P, 2), x and y in each of L maps; 0 and 1 are the borders of a map, so
        that the centre of cell i of n is (i + 1/2) / n.
      weights: weights of the places (B, Q, N, L, P).
      shapes: rows and columns of each map; S is the number of their cells.

    Returns:
      (B, Q, N, D) in the type of ``value``; sums and places are float32 for narrower types.

    Raises:
      ValueError: the shapes do not fit together.

    References:
      Zhu et al. 2021, "Deformable DETR", Eq. 3.
    """
    _check(value, places, weights, shapes)
    return _attend(value, places, weights, shapes)


def _check(value, places, weights, shapes):
    cells = sum(height * width for height, width in shapes)
    if value.ndim != 4 or value.shape[1] != cells:
        raise ValueError(
            f"value has shape {value.shape}; expected (batch, {cells}, heads, dim) for maps of "
            f"{shapes}"
        )
    batch, _, heads, _ = value.shape
    if weights.ndim != 5 or weights.shape[0] != batch or weights.shape[2:4] != (heads, len(shapes)):
        raise ValueError(
            f"weights has shape {weights.shape}; expected ({batch}, queries, {heads}, "
            f"{len(shapes)}, points)"
        )
    if places.shape != (*weights.shape, 2):
        raise ValueError(f"places has shape {places.shape}; expected {(*weights.shape, 2)}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(value, places, weights, shapes):
    map_by_map, corner_by_corner = (
        functools.partial(form, shapes=shapes) for form in (_map_by_map, _corner_by_corner)
    )
    return by_platform(
        "deformable attention", value, places, weights, cpu=corner_by_corner, default=map_by_map
    )


def _attend_fwd(value, places, weights, shapes):
    return _map_by_map(value, places, weights, shapes), (value, places, weights)


def _attend_bwd(shapes, saved, gradient):
    # The gathered cells are 4 P times as large as the queries: they are gathered again.
    return jax.vjp(functools.partial(_map_by_map, shapes=shapes), *saved)[1](gradient)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _map_by_map(value, places, weights, shapes):
    """Gathers the four cells around all places of a map at once; a product sums them up."""
    dtype = softmax_dtype(value.dtype)
    total = jnp.zeros((*places.shape[:3], value.shape[-1]), dtype)
    for cells, index, share in _levels(value, places, weights, shapes):
        count = index.shape[-1]
        batch, heads, queries, _ = index.shape
        found = take(cells, index.reshape(batch, heads, -1))
        found = found.reshape(batch, heads, queries, count, -1)
        # XLA would fuse the gather with products and a sum in place of einsum, and repeat it.
        total += jnp.einsum("bnqk,bnqkd->bqnd", share, found, preferred_element_type=dtype)
    return total.astype(value.dtype)


def _corner_by_corner(value, places, weights, shapes):
    """Reads one cell for every query and head in a step: nothing larger than the output."""
    dtype = softmax_dtype(value.dtype)
    total = jnp.zeros((value.shape[0], value.shape[2], places.shape[1], value.shape[-1]), dtype)
    for cells, index, share in _levels(value, places, weights, shapes):

        def step(total, corner, cells=cells):
            index, share = corner
            return total + share[..., None] * take(cells, index), None

        corners = jnp.moveaxis(index, -1, 0), jnp.moveaxis(share, -1, 0)
        total, _ = lax.scan(step, total, corners)
    return total.swapaxes(1, 2).astype(value.dtype)


def _levels(
    value: Array, places: Array, weights: Array, shapes: Shapes
) -> Iterator[tuple[Array, Int32[Array, "B N Q K"], Float[Array, "B N Q K"]]]:
    """Yields the cells (B, N, h w, D) of each map, and the indices and weights of K = 4 P cells."""
    value = value.swapaxes(1, 2)
    places, weights = (x.astype(softmax_dtype(x.dtype)).swapaxes(1, 2) for x in (places, weights))
    start = 0
    for level, (height, width) in enumerate(shapes):
        index, share = _corners(places[:, :, :, level], height, width)
        share *= weights[:, :, :, level, :, None]
        flat = (*share.shape[:3], -1)
        cells = lax.slice_in_dim(value, start, start + height * width, axis=2)
        yield cells, index.reshape(flat), share.reshape(flat)
        start += height * width


def _corners(
    places: Float[Array, "*n 2"], height: int, width: int
) -> tuple[Int32[Array, "*n 4"], Float[Array, "*n 4"]]:
    """Returns the indices of the four cells around each place, and their shares; 0: outside."""
    sizes = jnp.array([width, height], places.dtype)
    # From half a cell outside on, no cell has a share; this also keeps the integers in range.
    at = jnp.clip(places * sizes - 0.5, -1, sizes)
    low = jnp.floor(at)
    part, low = at - low, low.astype(jnp.int32)
    columns, rows = (
        _neighbors(low[..., axis], part[..., axis], size)
        for axis, size in enumerate((width, height))
    )
    index = rows[0][..., :, None] * width + columns[0][..., None, :]
    share = rows[1][..., :, None] * columns[1][..., None, :]
    return tuple(x.reshape(*x.shape[:-2], 4) for x in (index, share))


def _neighbors(low, part, size):
    """Returns two indices along an axis, inside, and their shares (..., 2)."""
    index, share = jnp.stack([low, low + 1], -1), jnp.stack([1 - part, part], -1)
    inside = (index >= 0) & (index < size)
    return jnp.clip(index, 0, size - 1), jnp.where(inside, share, 0)
