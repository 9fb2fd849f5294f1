"""Values of maps and of the masks of objects at points, and the points where masks are uncertain.

Points are (x, y), from 0 at the left and upper border of a map to 1 at the other ones, so that the
same points belong to maps of different sizes. Centres of cells lie at ((j + 1/2) / W,
(i + 1/2) / H); values between them are bilinear, and outside of the map everything is 0.

References:
  Kirillov et al. 2020, "PointRend: Image Segmentation as Rendering", section 3.1;
  Cheng et al. 2022, "Masked-attention Mask Transformer for Universal Image Segmentation", 3.3.
"""

import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.ops.selection import top_indices


def sample_maps(
    maps: Float[Array, "N H W"],
    points: Float[Array, "*m P 2"],
    which: Int[Array, " M"] | None = None,
) -> Float[Array, "M P"]:
    """Returns the bilinear values of maps at points, (M, P), at least in float32.

    Args:
      maps: (N, H, W).
      points: (P, 2), the same for all M = N maps, or (M, P, 2).
      which: map of each row of points (M,), in [0, N); None: M = N, and row i belongs to map i.
        The rows are read where they are; no map is copied.
    """
    if points.ndim == 3 and which is None:
        which = jnp.arange(len(maps))
    return _sample(*jax.tree.map(jnp.asarray, (maps, points, which)))


def _sum_of_corners(maps, points, which):
    flat = maps.reshape(len(maps), math.prod(maps.shape[1:]))
    dtype = softmax_dtype(maps.dtype)
    return sum(
        weight * flat.at[_cells(which, index)].get(mode="promise_in_bounds").astype(dtype)
        for index, weight in _corners(points, *maps.shape[1:])
    )


_sample = jax.custom_vjp(_sum_of_corners)


def _sample_fwd(maps, points, which):
    return _sum_of_corners(maps, points, which), (maps, points, which)


def _sample_bwd(saved, gradient):
    maps, points, which = saved
    # All corners are added into one array; by itself, JAX makes one of each and adds them up.
    d_maps = jnp.zeros((len(maps), maps[0].size), gradient.dtype)
    for index, weight in _corners(points, *maps.shape[1:]):
        added = d_maps.at[_cells(which, index)]
        d_maps = added.add(weight * gradient, mode="promise_in_bounds")
    d_points = jax.vjp(lambda points: _sum_of_corners(maps, points, which), points)[1]
    return d_maps.reshape(maps.shape).astype(maps.dtype), *d_points(gradient), None


_sample.defvjp(_sample_fwd, _sample_bwd)


def _cells(which, index):
    """Returns the place of cells in maps (N, H W): of the maps of the rows, or of all maps."""
    return (slice(None), index) if which is None else (which[:, None], index)


def sample_objects(
    id_maps: Int[Array, "L H W"], ids: Int[Array, " M"], points: Float[Array, "*m P 2"]
) -> Float[Array, "M P"]:
    """Returns the bilinear values of the masks of objects at points, (M, P) float32.

    A mask is 1 where a map has the identifier of the object. It is never an array of its own: only
    the identifiers at the four cells around a point are compared.

    Args:
      id_maps: identifiers (L, H, W) of any integer type. One map holds objects that do not overlap;
        others take what lies over them. An identifier is in one map only.
      ids: identifiers of the objects (M,).
      points: (P, 2), the same for all objects, or (M, P, 2).
    """
    ids = jnp.asarray(ids, jnp.int32)[:, None]
    flat = jnp.asarray(id_maps).reshape(len(id_maps), -1)
    return sum(
        jnp.where(cells.at[index].get(mode="promise_in_bounds") == ids, weight, 0.0)
        for cells in flat
        for index, weight in _corners(points, *id_maps.shape[1:])
    )


def uncertain_points(
    logits: Float[Array, "N H W"],
    candidates: Float[Array, "M P 2"],
    fresh: Float[Array, "M R 2"],
    num_points: int,
    which: Int[Array, " M"] | None = None,
) -> Float[Array, "M S 2"]:
    """Returns the candidates where masks are most uncertain, and the fresh points: (M, S, 2).

    Uncertain is a logit near 0, sampled at the candidate. The choice has no gradient.

    Args:
      logits: maps of logits (N, H, W).
      candidates: points to choose from (M, P, 2).
      fresh: points that are taken as they are (M, R, 2).
      num_points: S, from R to R + P; S - R candidates are chosen.
      which: map of each row of points, as in :func:`sample_maps`.

    Raises:
      ValueError: S is not from R to R + P.
    """
    fewest, most = fresh.shape[1], fresh.shape[1] + candidates.shape[1]
    if not fewest <= num_points <= most:
        raise ValueError(
            f"num_points={num_points} is not valid for {fewest} fresh points and"
            f" {candidates.shape[1]} candidates; valid: {fewest} to {most}"
        )
    found = lax.stop_gradient(sample_maps(lax.stop_gradient(logits), candidates, which))
    chosen = top_indices(-abs(found), num_points - fewest)
    chosen = jnp.take_along_axis(candidates, chosen[..., None], 1, mode="promise_in_bounds")
    return lax.stop_gradient(jnp.concatenate([chosen, fresh], 1))


def _corners(
    points: Float[Array, "*n P 2"], height: int, width: int
) -> Iterator[tuple[Int32[Array, "*n P"], Float[Array, "*n P"]]]:
    """Yields numbers and weights of the cells around points, for each of the four corners.

    Coordinates and corners are apart, because operations on stacks of them would not be fused with
    the reads.
    """
    places = [points[..., axis] * side - 0.5 for axis, side in enumerate((width, height))]
    lows = [jnp.floor(place) for place in places]
    parts = [place - low for place, low in zip(places, lows, strict=True)]
    for step in itertools.product((0, 1), repeat=2):  # along x and y
        x, y = (low.astype(jnp.int32) + i for low, i in zip(lows, step, strict=True))
        along_x, along_y = (part if i else 1 - part for part, i in zip(parts, step, strict=True))
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        yield jnp.where(inside, y * width + x, 0), jnp.where(inside, along_x * along_y, 0.0)
