"""Divisions of maps among the programs of Pallas kernels for NVIDIA GPUs.

A program computes a part of the pixels for a block of channels: strips of rows where pixels have
neighbours, tiles where they have none. Sums over the batch leave as one partial sum per program,
which are added in a fixed order.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from tokenvit_jax.kernels.arithmetic import narrow, widen
from tokenvit_jax.kernels.pieces import range_of

STRIPS = 4  # strips of a program: one per warp
TILE_ROWS = 64  # pixels of a tile, where no pixel has neighbours
BUSY = 124  # programs that keep a GPU busy


class Strips(NamedTuple):
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
        number = range_of(program * STRIPS, STRIPS)[:, None]
        image, first_row = number // self.strips, number % self.strips * self.rows
        first = (image * self.height + first_row) * self.width
        lines = {
            row: (
                first + row * self.width,
                (image < self.batch) & (first_row + row >= 0) & (first_row + row < self.height),
            )
            for row in range(-1, self.rows + 1)
        }
        whole = (
            self.height % self.rows == 0
            and self.batch * self.strips % STRIPS == 0
            and self.channels % _block_size(self.channels) == 0
        )
        return Part(self.channels, program, channel_block, STRIPS, lines, self.width, whole=whole)


class Tiles(NamedTuple):
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
        first = range_of(start, TILE_ROWS)[:, None]
        end = jnp.minimum(start + self.steps * TILE_ROWS, self.pixels)
        columns = (end - first + TILE_ROWS - 1) // TILE_ROWS
        lines = {0: (first, first < self.pixels)}
        return Part(
            self.channels, program, channel_block, TILE_ROWS, lines, columns, TILE_ROWS
        )  # fmt: skip


class Part:
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
      whole: whether all lines and channels of all programs exist, but for lines around a strip.
    """

    def __init__(self, channels, program, channel_block, pixels, lines, width, step=1, whole=False):
        size = _block_size(channels)
        self._channels, self._program, self._width = channels, program, width
        self._step = step * channels
        self._whole = whole
        self._shape = pixels, size
        self._channel = range_of(channel_block * size, size)[None]
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
        return widen(plt.load(ref.at[index], mask=self._used, other=0))

    def vectors(self, refs, *names):
        return {name: self.channel(refs.get(name)) for name in names}

    def load(self, ref, line, column):
        index, exists = self._place(line, column)
        return widen(plt.load(ref.at[index], mask=exists, other=0))

    def store(self, ref, x, line, column):
        """Stores x and returns it as it was rounded."""
        index, exists = self._place(line, column)
        rounded = narrow(x, ref.dtype)
        plt.store(ref.at[index], rounded, mask=exists)
        return widen(rounded)

    def inside(self, x, line, column):
        """Returns x with zeros outside the map."""
        return lax.select(self._place(line, column)[1], x, self.zeros())

    def unchanged(self, x, line, column):
        del line, column
        return x

    def of_line(self, x, line):
        """Returns x of a line of the strip with zeros outside the map, for columns inside."""
        return x if self._whole else lax.select(self._lines[line][1], x, self.zeros())

    def along_columns(self, load, window, own, emit, sums):
        """Goes along the columns, with a window of three of them.

        Columns -2 and -1 only load and compute the first columns: loads in front of the loop would
        double the time to compile it.

        Args:
          load: function from a column to its arrays as loaded, a list per line and map.
          window: function from these and the column to a list of one array per line.
          own: function from a column to more arrays that are loaded for ``emit``.
          emit: function (column, (left, middle, right), what ``own`` loaded, sums) -> new sums.
          sums: sums before the first column.

        Returns:
          The sums.
        """

        def step(j, carry):
            left, middle, raw_right, sums = carry
            # In this order, loads have the longest time until they are read.
            later, loaded = load(j + 2), own(j)
            right = window(raw_right, j + 1)
            sums = lax.cond(
                j >= 0, lambda sums: emit(j, (left, middle, right), loaded, sums), list, sums
            )
            return middle, right, later, sums

        empty = [self.zeros() for _ in self._lines]
        raw = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: load(0)))
        return lax.fori_loop(-2, self._width, step, (empty, empty, raw, sums))[3]

    def store_sums(self, ref, sums):
        """Stores the sums over the pixels of the program (numbers, C)."""
        for i, x in enumerate(sums):
            index = (self._program * len(sums) + i) * self._channels + self._channel
            plt.store(ref.at[index], x.sum(0)[None], mask=self._used)

    def _place(self, line, column):
        """Returns the indices of a column of a line in a flat map, and which of them exist."""
        index, exists = self._lines[line]
        return index + column * self._step, exists & ((column >= 0) & (column < self._width))


def run(
    body: functools.partial,
    grid: Strips | Tiles,
    inputs: Mapping[str, Array | None],
    maps: Mapping[str, Array],
    *,
    sums: int,
    interpret: bool,
    warps: int = 4,
) -> dict[str, Array]:
    """Runs a kernel on every part of maps.

    Args:
      body: the kernel with its settings; its argument has the references of the inputs that are not
        None, of the maps and, if there are any, of "sums". All are flat.
      grid: division of the maps.
      inputs: arrays by name.
      maps: arrays of the shape and type of a result, by its name.
      sums: number of sums over the pixels of each channel.
      interpret: whether to interpret the kernel, on any device.
      warps: warps of a program.

    Returns:
      The maps, and "sums" (1, sums, C) in float32.
    """
    inputs = {name: x.reshape(-1) for name, x in inputs.items() if x is not None}
    outputs = {name: jax.ShapeDtypeStruct((x.size,), x.dtype) for name, x in maps.items()}
    if sums:
        size = grid.programs * sums * grid.channels
        outputs["sums"] = jax.ShapeDtypeStruct((size,), jnp.float32)
    names = (*inputs, *outputs)

    def kernel(*refs):
        body(dict(zip(names, refs, strict=True)))

    results = pl.pallas_call(
        kernel, grid=(grid.programs, grid.channel_blocks), out_shape=list(outputs.values()),
        interpret=interpret, compiler_params=plt.CompilerParams(num_warps=warps),
        name=body.func.__name__.strip("_"),
    )(*inputs.values())  # fmt: skip
    results = dict(zip(outputs, results, strict=True))
    found = {name: results[name].reshape(x.shape) for name, x in maps.items()}
    if sums:
        parts = results["sums"].reshape(grid.programs, sums, grid.channels)
        found["sums"] = parts.sum(0, keepdims=True)
    return found


def _block_size(channels):
    """Returns the channels of a program, a power of two: few beyond the last channel."""
    return 32 if channels % 64 and -(-channels // 32) % 2 else 64
