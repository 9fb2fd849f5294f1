"""Values of maps and of the masks of objects at points, and the points where masks are uncertain.

Points are (x, y), from 0 at the left and upper border of a map to 1 at the other ones, so that the
same points belong to maps of different sizes. Centres of cells lie at ((j + 1/2) / W,
(i + 1/2) / H); values between them are bilinear, and outside of the map everything is 0.

References:
  Kirillov et al. 2020, "PointRend: Image Segmentation as Rendering", section 3.1;
  Cheng et al. 2022, "Masked-attention Mask Transformer for Universal Image Segmentation", 3.3.
"""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.ops.selection import top_indices


def sample_maps(maps: Float[Array, "N H W"], points: Float[Array, "*n P 2"]) -> Float[Array, "N P"]:
    """Returns the bilinear values of maps at points, (N, P), at least in float32.

    Args:
      maps: (N, H, W).
      points: (P, 2), the same for all maps, or (N, P, 2).
    """
    maps = maps.astype(softmax_dtype(maps.dtype))

    def sample(cells, points):
        corners = _corners(points, *maps.shape[1:])
        return sum(weight * _read(cells, index) for index, weight in corners)

    flat = maps.reshape(len(maps), -1)
    return jax.vmap(sample, (0, 0 if points.ndim == 3 else None))(flat, points)


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

    def sample(number, points):
        """Returns the values of one object (P,)."""
        return sum(
            jnp.where(_read(cells, index) == number, weight, 0.0)
            for cells in flat
            for index, weight in _corners(points, *id_maps.shape[1:])
        )

    flat = [cells.ravel() for cells in id_maps]
    ids = ids.astype(jnp.int32)
    return jax.vmap(sample, (0, 0 if points.ndim == 3 else None))(ids, points)


def uncertain_points(
    logits: Float[Array, "N H W"],
    candidates: Float[Array, "N P 2"],
    fresh: Float[Array, "N R 2"],
    num_points: int,
) -> Float[Array, "N S 2"]:
    """Returns the candidates where masks are most uncertain, and the fresh points: (N, S, 2).

    Uncertain is a logit near 0, sampled at the candidate. The choice has no gradient.

    Args:
      logits: maps of logits (N, H, W).
      candidates: points to choose from (N, P, 2).
      fresh: points that are taken as they are (N, R, 2).
      num_points: S, from R to R + P; S - R candidates are chosen.

    Raises:
      ValueError: S is not from R to R + P.
    """
    fewest, most = fresh.shape[1], fresh.shape[1] + candidates.shape[1]
    if not fewest <= num_points <= most:
        raise ValueError(
            f"num_points={num_points} is not valid for {fewest} fresh points and"
            f" {candidates.shape[1]} candidates; valid: {fewest} to {most}"
        )
    found = lax.stop_gradient(sample_maps(lax.stop_gradient(logits), candidates))
    chosen = top_indices(-abs(found), num_points - fewest)
    chosen = jnp.take_along_axis(candidates, chosen[..., None], 1, mode="promise_in_bounds")
    return lax.stop_gradient(jnp.concatenate([chosen, fresh], 1))


def _read(cells, index):
    """Returns the cells (P,) with some numbers, all of which exist."""
    return cells.at[index].get(mode="promise_in_bounds")


def _corners(
    points: Float[Array, "P 2"], height: int, width: int
) -> Iterator[tuple[Shaped[Array, " P"], Float[Array, " P"]]]:
    """Yields numbers and weights (P,) of the cells around points, for each of the four corners.

    Coordinates are apart, because operations on pairs would not be fused with the reads.
    """
    places = [points[:, axis] * side - 0.5 for axis, side in enumerate((width, height))]
    lows = [jnp.floor(place) for place in places]
    parts = [place - low for place, low in zip(places, lows, strict=True)]
    for step in itertools.product((0, 1), repeat=2):  # along x and y
        x, y = (low.astype(jnp.int32) + i for low, i in zip(lows, step, strict=True))
        along_x, along_y = (part if i else 1 - part for part, i in zip(parts, step, strict=True))
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        yield jnp.where(inside, y * width + x, 0), jnp.where(inside, along_x * along_y, 0.0)
