"""Exchanges rectangles between neighbouring images of a batch: CutMix and MixToken."""

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def mix_boxes(x: Shaped[Array, "B H W C"], box: Int[Array, "4"]) -> Shaped[Array, "B H W C"]:
    """Replaces the content of a box with the same box of image i ^ 1.

    Args:
      x: (B, H, W, C), B even.
      box: top, bottom, left, right (4,) in cells of the map; bottom and right are exclusive.

    Returns:
      (B, H, W, C).

    Raises:
      ValueError: B is odd.

    References:
      Yun et al. 2019, "CutMix"; Jiang et al. 2021, "All Tokens Matter" (MixToken).
    """
    rows, columns = jnp.arange(x.shape[1])[:, None], jnp.arange(x.shape[2])
    top, bottom, left, right = box
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return jnp.where(inside[:, :, None], neighbors(x), x)


def neighbors(x: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """Returns x[i ^ 1] for every i; moves nothing between the devices that share a batch.

    Args:
      x: (B, ...), B even.

    Raises:
      ValueError: B is odd.
    """
    if len(x) % 2:
        raise ValueError(f"x has shape {x.shape}; a batch of {len(x)} cannot be paired")
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)
