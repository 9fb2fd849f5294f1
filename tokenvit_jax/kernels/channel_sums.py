"""Sums over the pixels of maps, and GELU, as Pallas kernels for NVIDIA GPUs.

Each map goes through memory once; nothing but the sums and gradients is stored.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from tokenvit_jax.kernels.arithmetic import exp2, fma, maximum, minimum, negative
from tokenvit_jax.kernels.channel_maps import Tiles, run
from tokenvit_jax.kernels.pieces import LOG2_E

_WARPS = 8


def misfit(shape: tuple[int, ...]) -> str | None:
    """Returns why the kernels cannot take a map (..., C), or None."""
    if isinstance(shape[0], int) and math.prod(shape) >= 2**31:
        return "the map has 2^31 values or more"
    return None


def gelu_sums(
    x: Float[Array, "B H W C"], bias: Float[Array, " C"], *, interpret: bool = False
) -> Float[Array, "1 2 C"]:
    """Returns the sums of gelu(x + bias) and of its square, in float32."""
    grid = Tiles.of(x.shape)
    kernel = functools.partial(_gelu_sums_kernel, grid=grid)
    inputs = {"x": x, "bias": bias}
    return run(kernel, grid, inputs, {}, sums=2, interpret=interpret, warps=_WARPS)["sums"]


def gelu_forward(
    x: Float[Array, "B *H C"], bias: Float[Array, " C"], *, interpret: bool = False
) -> Float[Array, "B *H C"]:
    """Returns gelu(x + bias)."""
    grid = Tiles.of(x.shape)
    kernel = functools.partial(_gelu_kernel, grid=grid)
    inputs = {"x": x, "bias": bias}
    return run(kernel, grid, inputs, {"y": x}, sums=0, interpret=interpret, warps=_WARPS)["y"]


def gelu_backward(
    dg: Float[Array, "B H W C"],
    dsums: Float[Array, "2 C"] | None,
    x: Float[Array, "B H W C"],
    bias: Float[Array, " C"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B H W C"], Float[Array, "1 1 C"]]:
    """Returns the gradients of x (B, H, W, C) and of the bias (1, 1, C), in float32."""
    grid = Tiles.of(x.shape)
    kernel = functools.partial(_gelu_backward_kernel, grid=grid)
    inputs = {"dg": dg, "dsums": dsums, "x": x, "bias": bias}
    found = run(kernel, grid, inputs, {"dx": x}, sums=1, interpret=interpret, warps=_WARPS)
    return found["dx"], found["sums"]


def product_sums(
    x: Float[Array, "*B C"], y: Float[Array, "*B C"] | None, *, interpret: bool = False
) -> Float[Array, "1 2 C"]:
    """Returns the sums of x and of x y over all but the last axis, in float32; y None: y is x."""
    grid = Tiles.of(x.shape)
    kernel = functools.partial(_product_sums_kernel, grid=grid)
    inputs = {"x": x, "y": y}
    return run(kernel, grid, inputs, {}, sums=2, interpret=interpret, warps=_WARPS)["sums"]


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


def _gelu_kernel(refs, *, grid):
    tiles = grid.tiles_of(pl.program_id(0), pl.program_id(1))
    bias = tiles.channel(refs["bias"])

    def step(j, carry):
        tiles.store(refs["y"], gelu(tiles.load(refs["x"], 0, j) + bias), 0, j)
        return carry

    lax.fori_loop(0, grid.steps, step, 0)


def _gelu_sums_kernel(refs, *, grid):
    tiles = grid.tiles_of(pl.program_id(0), pl.program_id(1))
    bias = tiles.channel(refs["bias"])

    def step(j, sums):
        y = tiles.inside(gelu(tiles.load(refs["x"], 0, j) + bias), 0, j)
        return [sums[0] + y, fma(y, y, sums[1])]

    sums = lax.fori_loop(0, grid.steps, step, [tiles.zeros() for _ in range(2)])
    tiles.store_sums(refs["sums"], sums)


def _gelu_backward_kernel(refs, *, grid):
    tiles = grid.tiles_of(pl.program_id(0), pl.program_id(1))
    bias = tiles.channel(refs["bias"])
    dsums = [tiles.channel(refs.get("dsums"), i) for i in range(2)]

    def step(j, total):
        y, slope = gelu_and_slope(tiles.load(refs["x"], 0, j) + bias)
        dg = with_sums_gradient(tiles.load(refs["dg"], 0, j), y, dsums)
        dx = tiles.inside(dg * slope, 0, j)
        tiles.store(refs["dx"], dx, 0, j)
        return total + dx

    tiles.store_sums(refs["sums"], [lax.fori_loop(0, grid.steps, step, tiles.zeros())])


def _product_sums_kernel(refs, *, grid):
    tiles = grid.tiles_of(pl.program_id(0), pl.program_id(1))

    def step(j, sums):
        x = tiles.load(refs["x"], 0, j)
        y = tiles.load(refs["y"], 0, j) if "y" in refs else x
        return [sums[0] + x, fma(x, y, sums[1])]

    sums = lax.fori_loop(0, grid.steps, step, [tiles.zeros() for _ in range(2)])
    tiles.store_sums(refs["sums"], sums)


# ------------------------------------------------------------------------------------------------
# Arithmetic
# ------------------------------------------------------------------------------------------------


def with_sums_gradient(
    dy: Float[Array, "P C"], y: Float[Array, "P C"], dsums: Sequence[Float[Array, "1 C"] | None]
) -> Float[Array, "P C"]:
    """Adds the gradient of the sums of y and of y^2 to that of y.

    Args:
      dy: gradient of y (pixels, channels).
      y: (pixels, channels).
      dsums: gradients of both sums (1, channels); None: there are none.
    """
    return dy if dsums[0] is None else fma(2 * dsums[1], y, dy + dsums[0])


@jax.jit  # traced once for all rows of a kernel
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns GELU, with an absolute error of 2e-7 in front of rounding."""
    size = _size(x)
    return fma(negative(size), _tail(size), maximum(x, 0))


@jax.jit
def gelu_and_slope(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns :func:`gelu` and its derivative, with an error of 5e-7 likewise."""
    tail = _tail(_size(x))
    exponential = exp2(x * x * (-0.5 * LOG2_E))
    distribution = jnp.where(x < 0, tail, 1 - tail)
    return x * distribution, fma(x * exponential, (2 * math.pi) ** -0.5, distribution)


# log2 of 1 minus the normal distribution function, on [0, 10], from the constant on. Fitted by a
# linear program for small errors of three kinds: 2e-7 in GELU, 5e-7 in the tail, and 2e-5 of the
# tail up to 4.
LOG2_TAIL = (
    -0.9999988079, -1.151156425, -0.458871603, -0.05332556367, 0.008052946068, -7.683341391e-4,
    3.372930751e-5,
)  # fmt: skip


def _size(x):
    """Returns |x|, at most 10, beyond which nothing is left of the tail."""
    return minimum(jnp.abs(x), 10)


def _tail(size):
    """Returns 1 minus the normal distribution function."""
    exponent = LOG2_TAIL[-1]
    for coefficient in reversed(LOG2_TAIL[:-1]):
        exponent = fma(exponent, size, coefficient)
    return exp2(exponent)
