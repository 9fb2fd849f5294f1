"""Attention to a few places of several maps, which the queries choose."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from tokenvit_jax.kernels.platforms import by_platform
from tokenvit_jax.ops.counted import counted
from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.ops.gather import add_rows, take

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
    def run(form, value, places, weights):
        dtype = softmax_dtype(value.dtype)
        corners = _corners_of_levels(places, weights, shapes)
        levels = zip(_levels(value, shapes), *corners, strict=True)
        total = sum(form(cells, index, share, dtype) for cells, index, share in levels)
        return total.swapaxes(1, 2).astype(value.dtype)

    return by_platform(
        "deformable attention", value, places, weights,
        cpu=functools.partial(run, _sum_by_corner), default=functools.partial(run, _sum_at_once),
    )  # fmt: skip


def _attend_fwd(value, places, weights, shapes):
    return _attend(value, places, weights, shapes), (value, places, weights)


def _attend_bwd(shapes, saved, gradient):
    def run(form, value, places, weights, gradient):
        def shares_of(places, weights):
            index, shares = _corners_of_levels(places, weights, shapes)
            return shares, index

        shares, pull, index = jax.vjp(shares_of, places, weights, has_aux=True)
        d_output = gradient.swapaxes(1, 2).astype(softmax_dtype(value.dtype))
        levels = zip(_levels(value, shapes), index, shares, strict=True)
        d_cells, d_shares = zip(*(form(*level, d_output) for level in levels), strict=True)
        d_value = jnp.concatenate(d_cells, 2).swapaxes(1, 2).astype(value.dtype)
        return d_value, *pull(list(d_shares))

    return by_platform(
        "deformable attention gradient", *saved, gradient,
        cpu=functools.partial(run, _gradients_of_einsum),
        default=functools.partial(run, _gradients_at_once),
    )  # fmt: skip


_attend.defvjp(_attend_fwd, _attend_bwd)

# ------------------------------------------------------------------------------------------------
# One map: cells (B, N, S, D), and for each query and head K = 4 P cells with shares (B, N, Q, K)
# ------------------------------------------------------------------------------------------------


def _sum_at_once(cells, index, share, dtype):
    """Gathers all cells at once; a product sums them up (B, N, Q, D)."""
    # XLA would fuse the gather with products and a sum in place of einsum, and a CPU repeat it.
    return jnp.einsum("bnqk,bnqkd->bnqd", share, _found(cells, index), preferred_element_type=dtype)


def _sum_by_corner(cells, index, share, dtype):
    """Reads one cell for every query and head in a step: nothing larger than the output."""

    def step(total, corner):
        index, share = corner
        return total + share[..., None] * take(cells, index), None

    total = jnp.zeros((*index.shape[:3], cells.shape[-1]), dtype)
    corners = (jnp.moveaxis(x, -1, 0) for x in (index, share))
    return lax.scan(step, total, tuple(corners))[0]


def _gradients_at_once(cells, index, share, d_output):
    """Returns the gradients of cells and shares; the gathered cells never lie in memory."""
    d_output = d_output[:, :, :, None]
    # A product and a sum, which XLA fuses with the gather, where einsum would need its result.
    d_share = (_found(cells, index) * d_output).sum(-1)
    updates = share[..., None] * d_output
    flat = (*index.shape[:2], math.prod(index.shape[2:]))
    zeros = jnp.zeros(cells.shape, d_output.dtype)
    d_cells = add_rows(zeros, index.reshape(flat), updates.reshape(*flat, cells.shape[-1]))
    return d_cells, d_share


def _gradients_of_einsum(cells, index, share, d_output):
    """Returns the gradients of cells and shares, through the gathered cells in memory."""

    def run(cells, share):
        return _sum_at_once(cells, index, share, d_output.dtype)

    return jax.vjp(run, cells, share)[1](d_output)


def _found(cells, index):
    """Returns the cells at indices (B, N, Q, K, D)."""
    flat = index.reshape(*index.shape[:2], math.prod(index.shape[2:]))
    return take(cells, flat).reshape(*index.shape, cells.shape[-1])


# ------------------------------------------------------------------------------------------------
# Maps and their cells
# ------------------------------------------------------------------------------------------------


def _levels(value: Array, shapes: Shapes) -> list[Float[Array, "B N S D"]]:
    """Splits values into the cells of each map."""
    ends = list(itertools.accumulate(height * width for height, width in shapes))
    return jnp.split(value.swapaxes(1, 2), ends[:-1], axis=2)


def _corners_of_levels(
    places: Array, weights: Array, shapes: Shapes
) -> tuple[list[Int32[Array, "B N Q K"]], list[Float[Array, "B N Q K"]]]:
    """Returns the indices of the K = 4 P cells of every query in each map, and their weights."""
    places, weights = (x.astype(softmax_dtype(x.dtype)).swapaxes(1, 2) for x in (places, weights))
    indices, shares = [], []
    for level, shape in enumerate(shapes):
        index, share = _corners(places[:, :, :, level], *shape)
        share *= weights[:, :, :, level, :, None]
        flat = (*share.shape[:3], math.prod(share.shape[3:]))
        indices.append(index.reshape(flat))
        shares.append(share.reshape(flat))
    return indices, shares


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
