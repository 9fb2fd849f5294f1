"""Attention within windows of a map, in kernels that read and write the map in place."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from tokenvit_jax.kernels.arithmetic import exp2, fma, reciprocal
from tokenvit_jax.kernels.joined import gradient_refs, gradients_of, inputs_of, parts_of
from tokenvit_jax.kernels.pieces import LOG2_E, MASKED

MAX_TOKENS, MAX_DIM = 64, 64  # of a tile; larger ones would not stay in registers
MAX_STRIPE = 128  # tokens of a tile of keys without bias, for two blocks of queries in turn
FEWEST_PROGRAMS = 512  # each attends within up to 32 windows, for which it sums up gradients


class _Windows(NamedTuple):
    """Shapes of a call.

    Attributes:
      height: rows of the map.
      width: columns of the map.
      heads: number of heads.
      dim: head dim.
      window: rows and columns of a window.
      second: rows and columns of a window for the second half of the heads, as many tokens.
      interlaced: whether the rows and columns of a window are at equal distances in the map.
      shift: rows and columns by which the map was rolled up and left.
      scale: factor of the logits.
      steps: number of windows of a program.
    """

    height: int
    width: int
    heads: int
    dim: int
    window: tuple[int, int]
    second: tuple[int, int]
    interlaced: bool
    shift: tuple[int, int]
    scale: float
    steps: int

    @property
    def tokens(self):
        return self.window[0] * self.window[1]

    @property
    def tile(self):
        """Tokens and channels of a tile; a smaller product has no instruction."""
        return tuple(max(16, pl.next_power_of_2(n)) for n in (self.tokens, self.dim))

    @property
    def blocks(self):
        """First queries of each block, which has up to 64, and their number."""
        size = min(self.tile[0], MAX_TOKENS)
        return range(0, self.tile[0], size), size

    @property
    def num_warps(self):
        return 4 if self.tile[0] <= MAX_TOKENS else 8


class _Tile(NamedTuple):
    """Some tokens of a window.

    Attributes:
      place: indices of a (tokens, D) tile in a map.
      is_token: (tokens, D) bool, entries that exist.
      token: numbers in the window (tokens,).
      part: parts of the window, which the shift of the map brought together (tokens,).
    """

    place: tuple[jax.Array, ...]
    is_token: jax.Array
    token: jax.Array
    part: jax.Array


def misfit_of_tiles(
    q: Array, k: Array, v: Array, tokens: int, most: int = MAX_TOKENS
) -> str | None:
    """Returns why the kernels cannot take the arguments, or None.

    Args:
      q: queries (..., D).
      k: keys (..., D).
      v: values (..., D).
      tokens: number of tokens of a window.
      most: largest number of tokens.
    """
    if {x.dtype for x in (q, k, v)} not in ({jnp.dtype(t)} for t in (jnp.bfloat16, jnp.float16)):
        return f"windows in {q.dtype}, not bfloat16 or float16"
    if tokens > most:
        return f"windows of {tokens} tokens, more than {most}"
    if q.shape[-1] > MAX_DIM:
        return f"head dim {q.shape[-1]} is above {MAX_DIM}"
    return None


def attend_short(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B L N D"],
    v: Float[Array, "B L N D"],
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B L N D"]:
    """Attends from all to all tokens of a short sequence, as within one window.

    Args:
      q: queries (B, L, N, D) in bfloat16 or float16.
      k: keys (B, L, N, D).
      v: values (B, L, N, D).
      scale: factor of the products.
      interpret: whether to run the kernels by jax, for tests.

    Returns:
      (B, L, N, D) in the type of ``v``.
    """
    q, k, v = (x[:, :, None] for x in (q, k, v))
    return attend_windows(q, k, v, None, (q.shape[1], 1), (0, 0), scale, False, interpret)[:, :, 0]


def attend_stripes(
    q: Float[Array, "B H W N D"],
    k: Float[Array, "B H W N D"],
    v: Float[Array, "B H W N D"],
    rows: tuple[int, int],
    columns: tuple[int, int],
    *,
    interlaced: bool,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B H W N D"]:
    """Attends with half of the heads within stripes of rows, with half within stripes of columns.

    Args:
      q: queries (B, H, W, N, D) in bfloat16 or float16.
      k: keys (B, H, W, N, D).
      v: values (B, H, W, N, D).
      rows: rows and columns of a stripe of the first half of the heads, up to MAX_STRIPE tokens.
      columns: rows and columns of a stripe of the second half, as many tokens.
      interlaced: whether the rows, or columns, of a stripe are at equal distances in the map.
      scale: factor of the products.
      interpret: whether to run the kernels by jax, for tests.

    Returns:
      (B, H, W, N, D) in the type of ``v``.
    """
    call = _call_of(q, rows, columns, interlaced, (0, 0), scale)
    return _attend_tiles((q, k, v), None, call, interpret)


def attend_windows(
    q: Float[Array, "B H W N D"],
    k: Float[Array, "B H W N D"],
    v: Float[Array, "B H W N D"],
    bias: Float[Array, "N tokens tokens"] | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    joined: bool = False,
    interpret: bool = False,
) -> Float[Array, "B H W N D"]:
    """Attends within windows; see `ops.window_attention`.

    Nothing but the arguments is kept for the backward pass, which computes the weights again.

    Args:
      q: queries (B, H, W, N, D) in bfloat16 or float16.
      k: keys (B, H, W, N, D).
      v: values (B, H, W, N, D).
      bias: summand of the logits (N, h w, h w); None: 0.
      window: (h, w), rows and columns of a window; they divide H and W.
      shift: rows and columns, less than a window, by which the map was rolled up and left.
      scale: factor of the products of queries and keys.
      joined: whether q, k and v are the thirds of one array.
      interpret: whether to run the kernels by jax, for tests.

    Returns:
      (B, H, W, N, D) in the type of ``v``.
    """
    call = _call_of(q, window, window, False, shift, scale)
    return _attend_tiles(parts_of(q, k, v, joined), bias, call, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend_tiles(parts, bias, call, interpret):
    batch, dtype = parts[-1].shape[0], parts[-1].dtype
    spec = _map_spec(batch, call)
    inputs, specs = inputs_of(parts, spec)
    biases, bias_specs = _biases_of(bias, call)
    return pl.pallas_call(
        functools.partial(_attend, call=call),
        grid=_grid(batch, call),
        in_specs=[*specs, *bias_specs],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(
            (batch, call.height, call.width, call.heads, call.dim), dtype
        ),
        compiler_params=plt.CompilerParams(num_warps=call.num_warps, num_stages=2),
        interpret=interpret,
        name="window_attention",
    )(*inputs, *biases)


def _forward(parts, bias, call, interpret):
    return _attend_tiles(parts, bias, call, interpret), (parts, bias)


def _backward(call, interpret, residuals, d_output):
    parts, bias = residuals
    batch = d_output.shape[0]
    spec = _map_spec(batch, call)
    inputs, specs = inputs_of(parts, spec)
    d_parts, d_specs = gradients_of(parts, spec)
    biases, bias_specs = _biases_of(bias, call)
    chunks, heads = _grid(batch, call)
    tiles = (chunks, heads, call.tile[0], call.tile[0])  # each program sums up its windows
    d_biases = [jax.ShapeDtypeStruct(tiles, jnp.float32) for _ in biases]
    d_bias_specs = [
        pl.BlockSpec((None, None, *tiles[2:]), lambda c, n: (c, n, 0, 0)) for _ in biases
    ]
    gradients = pl.pallas_call(
        functools.partial(_differentiate, call=call, has_bias=bias is not None),
        grid=(chunks, heads),
        in_specs=[*specs, spec, *bias_specs],
        out_specs=d_specs + d_bias_specs,
        out_shape=d_parts + d_biases,
        compiler_params=plt.CompilerParams(num_warps=call.num_warps, num_stages=1),
        interpret=interpret,
        name="window_attention_gradient",
    )(*inputs, d_output.astype(parts[-1].dtype), *biases)
    d_parts, d_biases = tuple(gradients[: len(parts)]), gradients[len(parts) :]
    if bias is None:
        return d_parts, None
    d_bias = d_biases[0].sum(0)[:, : call.tokens, : call.tokens]
    return d_parts, d_bias.astype(bias.dtype)


_attend_tiles.defvjp(_forward, _backward)


def _attend(q_ref, k_ref, v_ref, *refs, call):
    *bias_refs, out_ref = refs
    first, second = pl.program_id(0) * call.steps, _is_second(call)
    biases = [ref[...] for ref in bias_refs]
    starts, size = call.blocks

    def attend(step, carry):
        keys = _tile_of(first + step, second, 0, call.tile[0], call)
        k, v = _load(k_ref, keys), _load(v_ref, keys)
        for start in starts:
            queries = _tile_of(first + step, second, start, size, call)
            q = _load(q_ref, queries)
            weights = _exp_of_logits(
                (q * call.scale).astype(q.dtype), k, biases, queries, keys, call
            )
            inverse = reciprocal(weights.sum(1, keepdims=True))
            _store((out_ref, ()), plt.dot(weights.astype(v.dtype), v) * inverse, queries)
        return carry

    lax.fori_loop(0, call.steps, attend, 0)


def _differentiate(q_ref, k_ref, v_ref, d_out_ref, *refs, call, has_bias):
    bias_refs, d_refs, d_bias_refs = refs[:has_bias], refs[has_bias:], []
    if has_bias:
        *d_refs, d_bias_ref = d_refs
        d_bias_refs = [d_bias_ref]
    to_queries, to_keys, to_values = gradient_refs(d_refs)
    first, second = pl.program_id(0) * call.steps, _is_second(call)
    starts, size = call.blocks

    def differentiate(step, d_biases):
        keys = _tile_of(first + step, second, 0, call.tile[0], call)
        k, v = _load(k_ref, keys), _load(v_ref, keys)
        d_k = d_v = 0.0
        for start in starts:
            queries = _tile_of(first + step, second, start, size, call)
            q, d_out = _load(q_ref, queries), _load(d_out_ref, queries)
            q = (q * call.scale).astype(q.dtype)
            biases = [ref[...] for ref in bias_refs]
            weights = _exp_of_logits(q, k, biases, queries, keys, call)
            weights = weights * reciprocal(weights.sum(1, keepdims=True))
            d_v += plt.dot(weights.astype(v.dtype).T, d_out)
            d_weights = plt.dot(d_out, v.T)
            d_logits = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True))
            short = d_logits.astype(q.dtype)
            _store(to_queries, plt.dot(short, k) * call.scale, queries)
            d_k += plt.dot(short.T, q)
            d_biases = [d_bias + d_logits for d_bias in d_biases]
        _store(to_values, d_v, keys)
        _store(to_keys, d_k, keys)
        return d_biases

    start = [jnp.zeros(ref.shape, jnp.float32) for ref in bias_refs]
    d_biases = lax.fori_loop(0, call.steps, differentiate, start)
    for ref, d_bias in zip(d_bias_refs, d_biases, strict=True):
        ref[...] = d_bias


def _exp_of_logits(q, k, biases, queries, keys, call):
    """Returns the weights (queries, keys), not normalised."""
    meet = (keys.token < call.tokens)[None]
    if any(call.shift):
        meet &= queries.part[:, None] == keys.part[None]
    logits = jnp.where(meet, sum(biases, plt.dot(q, k.T)), MASKED)
    return exp2(fma(logits, LOG2_E, logits.max(1, keepdims=True) * -LOG2_E))


def _load(ref, tile):
    return plt.load(ref.at[tile.place], mask=tile.is_token, other=0.0)


def _store(to, x, tile):
    """Stores a tile in ``(reference, indices in front of the last axis)``."""
    ref, part = to
    *pixel, channel = tile.place
    place = *pixel, *(jnp.full_like(channel, number) for number in part), channel
    plt.store(ref.at[place], x.astype(ref.dtype), mask=tile.is_token)


def _is_second(call):
    """Returns 1 for a head of the second half with other windows, else 0."""
    if call.second == call.window:
        return 0
    return (pl.program_id(1) >= call.heads // 2).astype(jnp.int32)


def _tile_of(index, second, start, size, call):
    """Returns the tokens from `start` to `start + size` of a window.

    Args:
      index: number of the window, counted through all images.
      second: 1 for a head of the second half, else 0.
      start: first token.
      size: number of tokens, a power of two.
      call: the shapes.
    """
    height, width = (
        jnp.int32(first) + second * (other - first)
        for first, other in zip(call.window, call.second, strict=True)
    )
    rows, columns = lax.div(jnp.int32(call.height), height), lax.div(jnp.int32(call.width), width)
    windows = call.height * call.width // call.tokens
    image, index = lax.div(index, jnp.int32(windows)), lax.rem(index, jnp.int32(windows))
    window_row, window_column = lax.div(index, columns), lax.rem(index, columns)
    token = start + jnp.arange(size, dtype=jnp.int32)
    widths = jnp.full_like(token, width)
    row, column = lax.div(token, widths), lax.rem(token, widths)
    if call.interlaced:
        row, column = window_row + row * rows, window_column + column * columns
    else:
        row, column = window_row * height + row, window_column * width + column
    channel = jnp.arange(call.tile[1], dtype=jnp.int32)
    zeros = jnp.zeros_like(token)[:, None]
    place = (image + zeros, row[:, None], column[:, None], channel[None] + zeros)
    is_token = (token < call.tokens)[:, None] & (channel < call.dim)[None]
    # Rolling moves the first rows behind the last ones, into the same windows; likewise columns.
    rolled_row = (row >= call.height - call.shift[0]).astype(jnp.int32)
    rolled_column = (column >= call.width - call.shift[1]).astype(jnp.int32)
    return _Tile(place, is_token, token, 2 * rolled_row + rolled_column)


def _call_of(q, window, second, interlaced, shift, scale):
    batch, height, width, heads, dim = q.shape
    windows = batch * (height // window[0]) * (width // window[1])
    steps = math.gcd(windows, _steps(windows * heads))
    return _Windows(height, width, heads, dim, window, second, interlaced, shift, scale, steps)


def _steps(tiles):
    """Returns a power of two, from 1 to 32, for about FEWEST_PROGRAMS programs."""
    return 2 ** min(5, max(0, (tiles // FEWEST_PROGRAMS).bit_length() - 1))


def _grid(batch, call):
    return batch * call.height * call.width // call.tokens // call.steps, call.heads


def _map_spec(batch, call):
    size = batch, call.height, call.width
    return pl.BlockSpec((*size, None, call.tile[1]), lambda c, n: (0, 0, 0, n, 0))


def _biases_of(bias, call):
    """Returns the bias padded to tiles, if there is one, and its block."""
    if bias is None:
        return [], []
    padding = (0, call.tile[0] - call.tokens)
    block = (None, call.tile[0], call.tile[0])
    padded = jnp.pad(bias.astype(jnp.float32), ((0, 0), padding, padding))
    return [padded], [pl.BlockSpec(block, lambda c, n: (n, 0, 0))]
