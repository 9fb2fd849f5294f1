"""Depthwise 3 x 3 convolution with what surrounds it, as Pallas kernels for NVIDIA GPUs.

The kernels take the activation and the affine function of their input along, and the residual, the
activation and the sums of their output, so that each map goes through memory once:

    u = scale gelu(x + input_bias) + shift,    z = u + conv(u) + bias,    y = gelu(z)

A program computes strips of a few rows of one image for 64 channels. Each thread holds a window of
three columns of its channels in registers and moves it along the strip, so that an activation is
computed once per strip. Sums over the batch leave as one partial sum per program, which are added
in a fixed order.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

STRIPS = 4  # strips of a program: one per warp
TILE_ROWS = 64  # pixels of a tile, where no pixel has neighbours
BUSY = 124  # programs that keep a GPU busy


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
    if isinstance(shape[0], int) and math.prod(shape) >= 2**31:
        return "the map has 2^31 values or more"
    return None


def block_forward(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "3 3 C"],
    bias: Float[Array, " C"] | None,
    input_bias: Float[Array, " C"] | None,
    scale: Float[Array, " C"] | None,
    shift: Float[Array, " C"] | None,
    *,
    block: Block,
    interpret: bool = False,
) -> tuple[Array, Array | None, Array | None]:
    """Returns y and z (B, H, W, C), and the sums of y and y^2 (1, 2, C) in float32.

    z is None unless it differs from y, and the sums are None unless the block has them.
    """
    grid = _Strips.of(x.shape)
    inputs, names = _present(
        x=x, kernel=kernel, bias=bias, input_bias=input_bias, scale=scale, shift=shift
    )
    outputs = {"y": jax.ShapeDtypeStruct((x.size,), x.dtype)}
    if block.activate:
        outputs["z"] = outputs["y"]
    if block.with_sums:
        outputs["sums"] = jax.ShapeDtypeStruct((grid.programs * 2 * grid.channels,), jnp.float32)
    results = _call(
        functools.partial(_forward_kernel, block=block, grid=grid), inputs, names, outputs,
        (grid.programs, grid.channel_blocks), interpret,
    )  # fmt: skip
    z, sums = results.get("z"), results.get("sums")
    return (
        results["y"].reshape(x.shape),
        None if z is None else z.reshape(x.shape),
        None if sums is None else _add_programs(sums, (grid.programs, 2, grid.channels)),
    )


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
    grid = _Strips.of(x.shape)
    inputs, names = _present(
        dy=dy, dsums=dsums, x=x, z=z, kernel=kernel, input_bias=input_bias, scale=scale, shift=shift
    )
    outputs = {
        "dg": jax.ShapeDtypeStruct((x.size,), x.dtype),
        "sums": jax.ShapeDtypeStruct((grid.programs * 12 * grid.channels,), jnp.float32),
    }
    results = _call(
        functools.partial(_backward_kernel, block=block, grid=grid), inputs, names, outputs,
        (grid.programs, grid.channel_blocks), interpret,
    )  # fmt: skip
    sums = _add_programs(results["sums"], (grid.programs, 12, grid.channels))
    return results["dg"].reshape(x.shape), sums


def gelu_sums(
    x: Float[Array, "B H W C"], bias: Float[Array, " C"], *, interpret: bool = False
) -> Float[Array, "1 2 C"]:
    """Returns the sums of gelu(x + bias) and of its square, in float32."""
    grid = _Tiles.of(x.shape)
    outputs = {"sums": jax.ShapeDtypeStruct((grid.programs * 2 * grid.channels,), jnp.float32)}
    inputs, names = _present(x=x, bias=bias)
    results = _call(
        functools.partial(_gelu_sums_kernel, grid=grid), inputs, names, outputs,
        (grid.programs, grid.channel_blocks), interpret, warps=8,
    )  # fmt: skip
    return _add_programs(results["sums"], (grid.programs, 2, grid.channels))


def gelu_backward(
    dg: Float[Array, "B H W C"],
    dsums: Float[Array, "2 C"] | None,
    x: Float[Array, "B H W C"],
    bias: Float[Array, " C"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B H W C"], Float[Array, "1 1 C"]]:
    """Returns the gradients of x (B, H, W, C) and of the bias (1, 1, C), in float32."""
    grid = _Tiles.of(x.shape)
    inputs, names = _present(dg=dg, dsums=dsums, x=x, bias=bias)
    outputs = {
        "dx": jax.ShapeDtypeStruct((x.size,), x.dtype),
        "sums": jax.ShapeDtypeStruct((grid.programs * grid.channels,), jnp.float32),
    }
    results = _call(
        functools.partial(_gelu_backward_kernel, grid=grid), inputs, names, outputs,
        (grid.programs, grid.channel_blocks), interpret, warps=8,
    )  # fmt: skip
    sums = _add_programs(results["sums"], (grid.programs, 1, grid.channels))
    return results["dx"].reshape(x.shape), sums


def product_sums(
    x: Float[Array, "*B C"], y: Float[Array, "*B C"] | None, *, interpret: bool = False
) -> Float[Array, "1 2 C"]:
    """Returns the sums of x and of x y over all but the last axis, in float32; y None: y is x."""
    grid = _Tiles.of(x.shape)
    outputs = {"sums": jax.ShapeDtypeStruct((grid.programs * 2 * grid.channels,), jnp.float32)}
    inputs, names = _present(x=x, y=y)
    results = _call(
        functools.partial(_product_sums_kernel, grid=grid), inputs, names, outputs,
        (grid.programs, grid.channel_blocks), interpret, warps=8,
    )  # fmt: skip
    return _add_programs(results["sums"], (grid.programs, 2, grid.channels))


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


def _forward_kernel(refs, *, block, grid):
    strip = grid.strip(pl.program_id(0), pl.program_id(1))
    entries = [[strip.channel(refs["kernel"], i * 3 + j) for j in range(3)] for i in range(3)]
    bias = strip.channel(refs.get("bias"))
    vectors = strip.vectors(refs, "input_bias", "scale", "shift")
    convert = functools.partial(_input_of, vectors)
    # Pixels that were not loaded are zeros already.
    shifted = vectors["input_bias"] is not None or vectors["shift"] is not None
    edge = strip.inside if shifted else strip.unchanged
    rows = range(-1, grid.rows + 1)

    def raw(column):
        return [[strip.load(refs["x"], row, column)] for row in rows]

    def window(raws, column):
        return [
            edge(convert(x, block.deferred)[0], row, column)
            for (x,), row in zip(raws, rows, strict=True)
        ]

    def step(j, carry):
        left, middle, raw_right, sums = carry
        later = raw(j + 2)
        right = window(raw_right, j + 1)
        for i in range(grid.rows):
            z = _sum(
                entries[a][b] * column[i + a]
                for b, column in enumerate((left, middle, right))
                for a in range(3)
            )
            z = z if bias is None else z + bias
            z = z + middle[i + 1] if block.residual else z
            z = _rounded(z, refs["y"].dtype)
            y = z
            if block.activate:
                strip.store(refs["z"], z, i, j)
                y = _rounded(_gelu_and_slope(z)[0], refs["y"].dtype)
            strip.store(refs["y"], y, i, j)
            if block.with_sums:
                y = strip.inside(y, i, j)
                sums = [sums[0] + y, sums[1] + y * y]
        return middle, right, later, sums

    sums = [strip.zeros() for _ in range(2 * block.with_sums)]
    sums = strip.along_columns(step, 1, sums)
    strip.store_sums(refs.get("sums"), sums)


def _backward_kernel(refs, *, block, grid):
    strip = grid.strip(pl.program_id(0), pl.program_id(1))
    entries = [[strip.channel(refs["kernel"], i * 3 + j) for j in range(3)] for i in range(3)]
    dsums = [strip.channel(refs.get("dsums"), i) for i in range(2)]
    vectors = strip.vectors(refs, "input_bias", "scale", "shift")
    rows = range(-1, grid.rows + 1)
    maps = ("dy", "z") if block.keeps_output else ("dy",)
    edge = strip.inside if block.with_sums else strip.unchanged

    def raw(column):
        return [[strip.load(refs[name], row, column) for name in maps] for row in rows]

    def window(raws, column):
        return [
            edge(_output_gradient(values, dsums, block), row, column)
            for values, row in zip(raws, rows, strict=True)
        ]

    def step(j, carry):
        left, middle, raw_right, sums = carry
        later = raw(j + 2)
        xs = [strip.load(refs["x"], i, j) for i in range(grid.rows)]
        right = window(raw_right, j + 1)
        sums = list(sums)
        for i, x in enumerate(xs):
            u, g = _input_of(vectors, x, block.deferred)
            u = strip.inside(u, i, j)
            du = middle[i + 1] if block.residual else strip.zeros()
            sums[9] = sums[9] + middle[i + 1]
            for a in range(3):
                for b, column in enumerate((right, middle, left)):
                    dz = column[i + 2 - a]
                    du = du + entries[a][b] * dz
                    sums[3 * a + b] = sums[3 * a + b] + u * dz
            valid = strip.inside(du, i, j)
            sums[10] = sums[10] + valid
            sums[11] = sums[11] + valid * g
            scale = vectors["scale"]
            strip.store(refs["dg"], du if scale is None else du * scale, i, j)
        return middle, right, later, sums

    sums = [strip.zeros() for _ in range(12)]
    sums = strip.along_columns(step, len(maps), sums)
    strip.store_sums(refs["sums"], sums)


def _gelu_sums_kernel(refs, *, grid):
    tiles = grid.tiles_of(pl.program_id(0), pl.program_id(1))
    bias = tiles.channel(refs["bias"])

    def step(j, sums):
        y = tiles.inside(_gelu_and_slope(tiles.load(refs["x"], 0, j) + bias)[0], 0, j)
        return [sums[0] + y, sums[1] + y * y]

    sums = lax.fori_loop(0, grid.steps, step, [tiles.zeros() for _ in range(2)])
    tiles.store_sums(refs["sums"], sums)


def _gelu_backward_kernel(refs, *, grid):
    tiles = grid.tiles_of(pl.program_id(0), pl.program_id(1))
    bias = tiles.channel(refs["bias"])
    dsums = [tiles.channel(refs.get("dsums"), i) for i in range(2)]

    def step(j, total):
        y, slope = _gelu_and_slope(tiles.load(refs["x"], 0, j) + bias)
        dg = _with_sums_gradient(tiles.load(refs["dg"], 0, j), y, dsums)
        dx = tiles.inside(dg * slope, 0, j)
        tiles.store(refs["dx"], dx, 0, j)
        return total + dx

    tiles.store_sums(refs["sums"], [lax.fori_loop(0, grid.steps, step, tiles.zeros())])


def _product_sums_kernel(refs, *, grid):
    tiles = grid.tiles_of(pl.program_id(0), pl.program_id(1))

    def step(j, sums):
        x = tiles.load(refs["x"], 0, j)
        y = tiles.load(refs["y"], 0, j) if "y" in refs else x
        return [sums[0] + x, sums[1] + x * y]

    sums = lax.fori_loop(0, grid.steps, step, [tiles.zeros() for _ in range(2)])
    tiles.store_sums(refs["sums"], sums)


# ------------------------------------------------------------------------------------------------
# Arithmetic
# ------------------------------------------------------------------------------------------------


def _input_of(vectors, x, deferred):
    """Returns the input of the convolution, and what its scale multiplies."""
    bias, scale, shift = (vectors[name] for name in ("input_bias", "scale", "shift"))
    g = x if bias is None else x + bias
    g = _gelu_and_slope(g)[0] if deferred else g
    u = g if scale is None else g * scale
    return u if shift is None else u + shift, g


def _output_gradient(values, dsums, block):
    """Returns the gradient in front of the output's activation."""
    dy = values[0]
    if not block.keeps_output:
        return dy
    y, slope = _gelu_and_slope(values[1]) if block.activate else (values[1], 1.0)
    return _with_sums_gradient(dy, y, dsums) * slope


def _with_sums_gradient(dy, y, dsums):
    """Adds the gradient of the sums of y and y^2."""
    return dy if dsums[0] is None else dy + (dsums[0] + 2 * dsums[1] * y)


@jax.jit  # traced once for all rows of a kernel
def _gelu_and_slope(x):
    """Returns GELU and its derivative from one exponential; the absolute error of erf is 1.5e-7.

    References:
      Abramowitz and Stegun 1964, "Handbook of Mathematical Functions", 7.1.26.
    """
    exponential = jnp.exp2(x * x * (-0.5 * math.log2(math.e)))
    t = 1 / (1 + (0.3275911 * 2**-0.5) * jnp.abs(x))
    tail = 0.0
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail = (tail + 0.5 * coefficient) * t
    tail = tail * exponential
    distribution = jnp.where(x < 0, tail, 1 - tail)
    return x * distribution, distribution + x * exponential * (2 * math.pi) ** -0.5


def _rounded(x, dtype):
    return x.astype(dtype).astype(jnp.float32)


def _sum(values):
    return functools.reduce(jnp.add, values)


# ------------------------------------------------------------------------------------------------
# Grids
# ------------------------------------------------------------------------------------------------


class _Strips(NamedTuple):
    """Division of maps into strips of rows: a program computes STRIPS strips of one block."""

    batch: int
    height: int
    width: int
    channels: int
    rows: int

    @classmethod
    def of(cls, shape):
        height = shape[1]

        def rows_read(rows):
            return -(-height // rows) * (rows + 2)

        return cls(*shape, min(range(1, 8), key=lambda rows: (rows_read(rows), rows)))

    @property
    def strips(self):
        return -(-self.height // self.rows)

    @property
    def programs(self):
        return -(-self.batch * self.strips // STRIPS)

    @property
    def channel_blocks(self):
        return -(-self.channels // _block_size(self.channels))

    def strip(self, program, channel_block):
        """Returns the strips of a program; lines are the rows, and columns are steps."""
        number = program * STRIPS + jnp.arange(STRIPS)[:, None]
        image, first_row = number // self.strips, number % self.strips * self.rows
        first = (image * self.height + first_row) * self.width
        lines = {
            row: (
                first + row * self.width,
                (image < self.batch) & (first_row + row >= 0) & (first_row + row < self.height),
            )
            for row in range(-1, self.rows + 1)
        }
        return _Part(self.channels, program, channel_block, STRIPS, lines, self.width)


class _Tiles(NamedTuple):
    """Division of the pixels of maps into parts of one program each, which goes through tiles."""

    pixels: int
    channels: int
    programs: int

    @classmethod
    def of(cls, shape):
        pixels, channels = math.prod(shape[:-1]), shape[-1]
        programs = -(-pixels // (8 * TILE_ROWS))
        # XLA adds up fewer than 32 partial sums inside the operation that reads them, without a
        # launch of its own.
        few = min(programs, 31)
        blocks = -(-channels // _block_size(channels))
        if few * blocks >= BUSY and pixels <= few * 32 * TILE_ROWS:
            programs = few
        return cls(pixels, channels, programs)

    @property
    def steps(self):
        return -(-self.pixels // (self.programs * TILE_ROWS))

    @property
    def channel_blocks(self):
        return -(-self.channels // _block_size(self.channels))

    def tiles_of(self, program, channel_block):
        """Returns the tiles of a program: one line, whose columns are tiles."""
        start = program * self.steps * TILE_ROWS
        first = start + jnp.arange(TILE_ROWS)[:, None]
        end = jnp.minimum(start + self.steps * TILE_ROWS, self.pixels)
        columns = (end - first + TILE_ROWS - 1) // TILE_ROWS
        lines = {0: (first, first < self.pixels)}
        return _Part(
            self.channels, program, channel_block, TILE_ROWS, lines, columns, TILE_ROWS
        )  # fmt: skip


class _Part:
    """The part of the maps that a program computes: arrays of pixels and channels, in float32.

    What does not depend on the column is computed once, in front of the loop over columns.

    Args:
      channels: C.
      program: number of the program, which is that of its sums.
      channel_block: number of the block of channels.
      pixels: pixels of an array.
      lines: name of a line -> its first pixels (pixels, 1), and whether they exist.
      width: columns of a line.
      step: pixels from one column to the next.
    """

    def __init__(self, channels, program, channel_block, pixels, lines, width, step=1):
        size = _block_size(channels)
        self._channels, self._program, self._width = channels, program, width
        self._step = step * channels
        self._shape = pixels, size
        self._channel = channel_block * size + jnp.arange(size)[None]
        self._used = self._channel < channels
        self._lines = {
            name: (first * channels + self._channel, exists & self._used)
            for name, (first, exists) in lines.items()
        }

    def zeros(self):
        return jnp.zeros(self._shape, jnp.float32)

    def channel(self, ref, row=0):
        """Returns a vector (1, channels) of an array (rows, C), or None."""
        if ref is None:
            return None
        index = row * self._channels + self._channel
        return plt.load(ref.at[index], mask=self._used, other=0).astype(jnp.float32)

    def vectors(self, refs, *names):
        return {name: self.channel(refs.get(name)) for name in names}

    def load(self, ref, line, column):
        index, exists = self._place(line, column)
        return plt.load(ref.at[index], mask=exists, other=0).astype(jnp.float32)

    def store(self, ref, x, line, column):
        index, exists = self._place(line, column)
        plt.store(ref.at[index], x.astype(ref.dtype), mask=exists)

    def inside(self, x, line, column):
        """Returns x with zeros outside the map."""
        return lax.select(self._place(line, column)[1], x, self.zeros())

    def unchanged(self, x, line, column):
        del line, column
        return x

    def along_columns(self, step, maps, sums):
        """Calls step(column, (left, middle, raw right column, sums)) from column -2 on.

        A column is a list of one array per line, a raw column one of an array per line and map.
        Nothing is stored for columns -2 and -1: their steps load and compute the first middle
        column. Loads in front of the loop would double the time to compile it.
        """
        empty = [self.zeros() for _ in self._lines]
        raw = [[self.zeros() for _ in range(maps)] for _ in self._lines]
        carry = lax.fori_loop(-2, self._width, step, (empty, empty, raw, sums))
        return carry[3]

    def store_sums(self, ref, sums):
        """Stores the sums over the pixels of the program (numbers, C)."""
        for i, x in enumerate(sums):
            index = (self._program * len(sums) + i) * self._channels + self._channel
            plt.store(ref.at[index], x.sum(0)[None], mask=self._used)

    def _place(self, line, column):
        """Returns the indices of a column of a line in a flat map, and which of them exist."""
        index, exists = self._lines[line]
        return index + column * self._step, exists & ((column >= 0) & (column < self._width))


def _block_size(channels):
    """Returns the channels of a program, a power of two: few beyond the last channel."""
    return 32 if channels % 64 and -(-channels // 32) % 2 else 64


def _present(**arrays):
    """Returns the arrays that are not None, flattened, and their names."""
    present = {name: x for name, x in arrays.items() if x is not None}
    return [x.reshape(-1) for x in present.values()], list(present)


def _call(body, inputs, names, outputs, grid, interpret, warps=4):
    """Runs a kernel, which gets a dict of references, and returns a dict of its results."""
    all_names = [*names, *outputs]

    def kernel(*refs):
        body(dict(zip(all_names, refs, strict=True)))

    results = pl.pallas_call(
        kernel, grid=grid, out_shape=list(outputs.values()), interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=warps), name=body.func.__name__.strip("_"),
    )(*inputs)  # fmt: skip
    return dict(zip(outputs, results, strict=True))


def _add_programs(sums, shape):
    return sums.reshape(shape).sum(0, keepdims=True)
