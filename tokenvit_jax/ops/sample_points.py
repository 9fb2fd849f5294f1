"""Values of maps and of the masks of objects at points, and the points where masks are uncertain.

Points are (x, y), from 0 at the left and upper border of a map to 1 at the other ones, so that the
same points belong to maps of different sizes. Centres of cells lie at ((j + 1/2) / W,
(i + 1/2) / H); values between them are bilinear, and outside of the map everything is 0.

References:
  Kirillov et al. 2020, "PointRend: Image Segmentation as Rendering", section 3.1;
  Cheng et al. 2022, "Masked-attention Mask Transformer for Universal Image Segmentation", 3.3.
"""

import jax.numpy as jnp
import numpy as np
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
    index, weight = _corners(points, *maps.shape[1:])
    flat = jnp.asarray(maps).reshape(len(maps), -1)
    if points.ndim == 2:
        found = flat.at[:, index].get(mode="promise_in_bounds")
    else:
        which = jnp.arange(len(maps)) if which is None else which
        found = flat.at[which[:, None, None], index].get(mode="promise_in_bounds")
    return (weight * found.astype(softmax_dtype(maps.dtype))).sum(-2)


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
    index, weight = _corners(points, *id_maps.shape[1:])
    ids = jnp.asarray(ids, jnp.int32)[:, None, None]
    found = (
        cells.at[index].get(mode="promise_in_bounds")
        for cells in jnp.asarray(id_maps).reshape(len(id_maps), -1)
    )
    return sum(jnp.where(cells == ids, weight, 0.0) for cells in found).sum(-2)


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
) -> tuple[Int32[Array, "*n 4 P"], Float[Array, "*n 4 P"]]:
    """Returns the numbers and the weights of the four cells around points.

    Coordinates are apart, because operations on pairs would not be fused with the reads.
    """
    places = [points[..., None, :, axis] * side - 0.5 for axis, side in enumerate((width, height))]
    lows = [jnp.floor(place) for place in places]
    parts = [place - low for place, low in zip(places, lows, strict=True)]
    steps = np.array([0, 0, 1, 1])[:, None], np.array([0, 1, 0, 1])[:, None]  # along x and y
    x, y = (low.astype(jnp.int32) + step for low, step in zip(lows, steps, strict=True))
    along_x, along_y = (
        jnp.where(step == 1, part, 1 - part) for part, step in zip(parts, steps, strict=True)
    )
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return jnp.where(inside, y * width + x, 0), jnp.where(inside, along_x * along_y, 0.0)
