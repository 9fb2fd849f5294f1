"""Depthwise 3 x 3 convolution with what surrounds it, as Pallas kernels for NVIDIA GPUs.

The kernels take the activation and the affine function of their input along, and the residual, the
activation and the sums of their output, so that each map goes through memory once:

    u = scale gelu(x + input_bias) + shift,    z = u + conv(u) + bias,    y = gelu(z)

A program computes strips of a few rows of one image for 64 channels. Each thread holds a window of
three columns of its channels in registers and moves it along the strip, so that an activation is
computed once per strip.
"""

import functools
from typing import NamedTuple

from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from tokenvit_jax.kernels import channel_sums
from tokenvit_jax.kernels.arithmetic import fma
from tokenvit_jax.kernels.channel_maps import Strips, run
from tokenvit_jax.kernels.channel_sums import gelu, gelu_and_slope, with_sums_gradient


class Block(NamedTuple):
    """What is computed around a depthwise convolution.

    Attributes:
      deferred: whether GELU is applied to the input, after its bias.
      residual: whether the input of the convolution is added to the output.
      activate: whether GELU is applied to the output.
      with_sums: whether the sums of the output and of its square over the batch are returned.
    """

    deferred: bool = False
    residual: bool = False
    activate: bool = False
    with_sums: bool = False

    @property
    def keeps_output(self) -> bool:
        """Whether the backward pass reads the output in front of its activation."""
        return self.activate or self.with_sums


def misfit(shape: tuple[int, ...], kernel_shape: tuple[int, ...] = (3, 3, 0)) -> str | None:
    """Returns why the kernels cannot take a map (B, H, W, C), or None."""
    if tuple(kernel_shape[:2]) != (3, 3):
        return f"a kernel of {kernel_shape[0]} x {kernel_shape[1]} is not 3 x 3"
    return channel_sums.misfit(shape)


def block_forward(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "3 3 C"],
    bias: Float[Array, " C"] | None,
    input_bias: Float[Array, " C"] | None,
    scale: Float[Array, " C"] | None,
    shift: Float[Array, " C"] | None,
    *,
    block: Block,
    differentiable: bool,
    interpret: bool = False,
) -> tuple[Array, Array | None, Array | None]:
    """Returns y and z (B, H, W, C), and the sums of y and y^2 (1, 2, C) in float32.

    z is None unless it differs from y and the block is ``differentiable``; the sums are None unless
    the block has them.
    """
    grid = Strips.of(x.shape)
    found = run(
        functools.partial(_forward_kernel, block=block, grid=grid), grid,
        {"x": x, "kernel": kernel, "bias": bias, "input_bias": input_bias, "scale": scale,
         "shift": shift},
        {"y": x, "z": x} if block.activate and differentiable else {"y": x},
        sums=2 if block.with_sums else 0, interpret=interpret,
    )  # fmt: skip
    return found["y"], found.get("z"), found.get("sums")


def branches_forward(
    x: Float[Array, "B H W C"],
    kernels: Float[Array, "n 3 3 C"],
    *,
    with_sums: bool,
    interpret: bool = False,
) -> tuple[list[Array], Array | None]:
    """Returns the convolution of a map with each of several kernels, n maps (B, H, W, C).

    The second result is the sums of each map and of its square (1, n, 2, C) in float32, or None.
    """
    grid = Strips.of(x.shape)
    names = [f"y{i}" for i in range(len(kernels))]
    found = run(
        functools.partial(_branches_kernel, names=names, with_sums=with_sums, grid=grid), grid,
        {"x": x, "kernels": kernels}, dict.fromkeys(names, x),
        sums=2 * len(names) if with_sums else 0, interpret=interpret,
    )  # fmt: skip
    sums = found["sums"].reshape(1, len(names), 2, x.shape[-1]) if with_sums else None
    return [found[name] for name in names], sums


def block_backward(
    dy: Float[Array, "B H W C"],
    dsums: Float[Array, "2 C"] | None,
    x: Float[Array, "B H W C"],
    z: Float[Array, "B H W C"] | None,
    kernel: Float[Array, "3 3 C"],
    input_bias: Float[Array, " C"] | None,
    scale: Float[Array, " C"] | None,
    shift: Float[Array, " C"] | None,
    *,
    block: Block,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Returns the gradient of the activated input (B, H, W, C), and sums (1, 12, C) in float32.

    The sums are the gradients of the nine entries of the kernel, of the bias, of the shift and of
    the scale.
    """
    grid = Strips.of(x.shape)
    found = run(
        functools.partial(_backward_kernel, block=block, grid=grid), grid,
        {"dy": dy, "dsums": dsums, "x": x, "z": z, "kernel": kernel, "input_bias": input_bias,
         "scale": scale, "shift": shift},
        {"dg": x}, sums=12, interpret=interpret,
    )  # fmt: skip
    return found["dg"], found["sums"]


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


def _forward_kernel(refs, *, block, grid):
    strip = grid.strip(pl.program_id(0), pl.program_id(1))
    entries = _entries(strip, refs["kernel"], residual=block.residual)
    bias = strip.channel(refs.get("bias"))
    vectors = strip.vectors(refs, "input_bias", "scale", "shift")
    convert = functools.partial(_input_of, vectors)
    # Pixels that were not loaded are zeros already.
    shifted = vectors["input_bias"] is not None or vectors["shift"] is not None
    edge = strip.inside if shifted else strip.unchanged
    rows = range(-1, grid.rows + 1)

    def load(column):
        return [[strip.load(refs["x"], row, column)] for row in rows]

    def window(raws, column):
        return [
            edge(convert(x, block.deferred)[0], row, column)
            for (x,), row in zip(raws, rows, strict=True)
        ]

    def emit(j, columns, _, sums):
        for i in range(grid.rows):
            z = _convolved(entries, columns, i, strip.zeros() if bias is None else bias)
            if "z" in refs:
                z = strip.store(refs["z"], z, i, j)
            y = strip.store(refs["y"], gelu(z) if block.activate else z, i, j)
            if block.with_sums:
                y = strip.of_line(y, i)
                sums = [sums[0] + y, fma(y, y, sums[1])]
        return sums

    sums = [strip.zeros() for _ in range(2 * block.with_sums)]
    sums = strip.along_columns(load, window, lambda _: [], emit, sums)
    strip.store_sums(refs.get("sums"), sums)


def _backward_kernel(refs, *, block, grid):
    strip = grid.strip(pl.program_id(0), pl.program_id(1))
    entries = _entries(strip, refs["kernel"], residual=block.residual)
    dsums = [strip.channel(refs.get("dsums"), i) for i in range(2)]
    vectors = strip.vectors(refs, "input_bias", "scale", "shift")
    rows = range(-1, grid.rows + 1)
    maps = ("dy", "z") if block.keeps_output else ("dy",)
    edge = strip.inside if block.with_sums else strip.unchanged

    def load(column):
        return [[strip.load(refs[name], row, column) for name in maps] for row in rows]

    def window(raws, column):
        return [
            edge(_output_gradient(values, dsums, block), row, column)
            for values, row in zip(raws, rows, strict=True)
        ]

    def own(column):
        return [strip.load(refs["x"], i, column) for i in range(grid.rows)]

    def emit(j, columns, xs, sums):
        left, middle, right = columns
        sums = list(sums)
        for i, x in enumerate(xs):
            u, g = _input_of(vectors, x, block.deferred)
            u = strip.of_line(u, i)
            du = strip.zeros()
            sums[9] = sums[9] + middle[i + 1]
            for a in range(3):
                for b, column in enumerate((right, middle, left)):
                    dz = column[i + 2 - a]
                    du = fma(entries[a][b], dz, du)
                    sums[3 * a + b] = fma(u, dz, sums[3 * a + b])
            valid = strip.of_line(du, i)
            sums[10] = sums[10] + valid
            sums[11] = fma(valid, g, sums[11])
            scale = vectors["scale"]
            strip.store(refs["dg"], du if scale is None else du * scale, i, j)
        return sums

    sums = [strip.zeros() for _ in range(12)]
    sums = strip.along_columns(load, window, own, emit, sums)
    strip.store_sums(refs["sums"], sums)


def _branches_kernel(refs, *, names, with_sums, grid):
    strip = grid.strip(pl.program_id(0), pl.program_id(1))
    entries = [_entries(strip, refs["kernels"], number=i) for i in range(len(names))]
    rows = range(-1, grid.rows + 1)

    def load(column):
        return [[strip.load(refs["x"], row, column)] for row in rows]

    def window(raws, _):
        return [x for (x,) in raws]  # pixels that were not loaded are zeros

    def emit(j, columns, _, sums):
        sums = list(sums)
        for n, name in enumerate(names):
            for i in range(grid.rows):
                y = strip.store(refs[name], _convolved(entries[n], columns, i, strip.zeros()), i, j)
                if with_sums:
                    y = strip.of_line(y, i)
                    sums[2 * n : 2 * n + 2] = sums[2 * n] + y, fma(y, y, sums[2 * n + 1])
        return sums

    sums = [strip.zeros() for _ in range(2 * len(names) * with_sums)]
    sums = strip.along_columns(load, window, lambda _: [], emit, sums)
    strip.store_sums(refs.get("sums"), sums)


def _entries(strip, kernels, number=0, residual=False):
    """Returns the entries of one of several kernels, with the residual connection."""
    first = 9 * number
    entries = [[strip.channel(kernels, first + i * 3 + j) for j in range(3)] for i in range(3)]
    if residual:
        entries[1][1] += 1
    return entries


def _convolved(entries, columns, row, z):
    """Adds the convolution at a row of the middle one of three columns to z."""
    for b, column in enumerate(columns):
        for a in range(3):
            z = fma(entries[a][b], column[row + a], z)
    return z


# ------------------------------------------------------------------------------------------------
# Arithmetic
# ------------------------------------------------------------------------------------------------


def _input_of(vectors, x, deferred):
    """Returns the input of the convolution, and what its scale multiplies."""
    bias, scale, shift = (vectors[name] for name in ("input_bias", "scale", "shift"))
    g = x if bias is None else x + bias
    g = gelu(g) if deferred else g
    if scale is None:
        return (g if shift is None else g + shift), g
    return fma(g, scale, 0 if shift is None else shift), g


def _output_gradient(values, dsums, block):
    """Returns the gradient in front of the output's activation."""
    dy = values[0]
    if not block.keeps_output:
        return dy
    y, slope = gelu_and_slope(values[1]) if block.activate else (values[1], 1.0)
    return with_sums_gradient(dy, y, dsums) * slope
