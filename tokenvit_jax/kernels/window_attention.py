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

MAX_TOKENS, MAX_DIM = 64, 64  # of a tile; larger ones would not stay in registers
FEWEST_PROGRAMS = 512  # each attends within up to 32 windows, for which it sums up gradients
EXCLUDED = -1e30  # logit of padding and of tokens in other parts of a window


class _Windows(NamedTuple):
    """Shapes of a call, and which of its windows a program is for.

    Attributes:
      height: rows of the map.
      width: columns of the map.
      heads: number of heads.
      dim: head dim.
      window: rows and columns of a window.
      shift: rows and columns by which the map was rolled up and left.
      scale: factor of the logits.
      steps: number of windows of a program.
    """

    height: int
    width: int
    heads: int
    dim: int
    window: tuple[int, int]
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


def misfit_of_tiles(q: Array, k: Array, v: Array, tokens: int) -> str | None:
    """Returns why :func:`attend_windows` cannot take the arguments, or None.

    Args:
      q: queries (..., D).
      k: keys (..., D).
      v: values (..., D).
      tokens: number of tokens of a window.
    """
    if {x.dtype for x in (q, k, v)} not in ({jnp.dtype(t)} for t in (jnp.bfloat16, jnp.float16)):
        return f"windows in {q.dtype}, not bfloat16 or float16"
    if tokens > MAX_TOKENS:
        return f"windows of {tokens} tokens, more than {MAX_TOKENS}"
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
    return attend_windows(q, k, v, None, (q.shape[1], 1), (0, 0), scale, interpret)[:, :, 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def attend_windows(
    q: Float[Array, "B H W N D"],
    k: Float[Array, "B H W N D"],
    v: Float[Array, "B H W N D"],
    bias: Float[Array, "N tokens tokens"] | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
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
      interpret: whether to run the kernels by jax, for tests.

    Returns:
      (B, H, W, N, D) in the type of ``v``.
    """
    call = _call_of(q, window, shift, scale)
    biases, bias_specs = _biases_of(bias, call)
    return pl.pallas_call(
        functools.partial(_attend, call=call),
        grid=_grid(q, call),
        in_specs=[_map_spec(q)] * 3 + bias_specs,
        out_specs=_map_spec(q),
        out_shape=jax.ShapeDtypeStruct(v.shape, v.dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="window_attention",
    )(q, k, v, *biases)


def _forward(q, k, v, bias, window, shift, scale, interpret):
    return attend_windows(q, k, v, bias, window, shift, scale, interpret), (q, k, v, bias)


def _backward(window, shift, scale, interpret, residuals, d_output):
    q, k, v, bias = residuals
    call = _call_of(q, window, shift, scale)
    biases, bias_specs = _biases_of(bias, call)
    chunks, heads = _grid(q, call)
    tiles = (chunks, heads, call.tile[0], call.tile[0])  # each program sums up its windows
    d_maps = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    d_biases = [jax.ShapeDtypeStruct(tiles, jnp.float32) for _ in biases]
    d_bias_specs = [
        pl.BlockSpec((None, None, *tiles[2:]), lambda c, n: (c, n, 0, 0)) for _ in biases
    ]
    d_q, d_k, d_v, *d_biases = pl.pallas_call(
        functools.partial(_differentiate, call=call),
        grid=(chunks, heads),
        in_specs=[_map_spec(q)] * 4 + bias_specs,
        out_specs=[_map_spec(q)] * 3 + d_bias_specs,
        out_shape=d_maps + d_biases,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="window_attention_gradient",
    )(q, k, v, d_output.astype(v.dtype), *biases)
    if bias is None:
        return d_q, d_k, d_v, None
    d_bias = d_biases[0].sum(0)[:, : call.tokens, : call.tokens]
    return d_q, d_k, d_v, d_bias.astype(bias.dtype)


attend_windows.defvjp(_forward, _backward)


def _attend(q_ref, k_ref, v_ref, *refs, call):
    *bias_refs, out_ref = refs
    first = pl.program_id(0) * call.steps
    biases = [ref[...] for ref in bias_refs]

    def attend(step, carry):
        place, is_token, same = _place_of(first + step, call)
        q, k, v = (
            plt.load(ref.at[place], mask=is_token, other=0.0) for ref in (q_ref, k_ref, v_ref)
        )
        q = (q * call.scale).astype(q.dtype)
        logits = jnp.where(same, sum(biases, plt.dot(q, k.T)), EXCLUDED)
        weights = jnp.exp(logits - logits.max(1, keepdims=True))
        total = weights.sum(1, keepdims=True)
        output = plt.dot(weights.astype(v.dtype), v) / total
        plt.store(out_ref.at[place], output.astype(out_ref.dtype), mask=is_token)
        return carry

    lax.fori_loop(0, call.steps, attend, 0)


def _differentiate(q_ref, k_ref, v_ref, d_out_ref, *refs, call):
    has_bias = len(refs) == 5
    bias_refs, (d_q_ref, d_k_ref, d_v_ref) = refs[:has_bias], refs[has_bias : has_bias + 3]
    first = pl.program_id(0) * call.steps

    def differentiate(step, d_biases):
        place, is_token, same = _place_of(first + step, call)
        load = lambda ref: plt.load(ref.at[place], mask=is_token, other=0.0)  # noqa: E731

        def store(ref, x):
            plt.store(ref.at[place], x.astype(ref.dtype), mask=is_token)

        q, k, v, d_out = load(q_ref), load(k_ref), load(v_ref), load(d_out_ref)
        q = (q * call.scale).astype(q.dtype)
        logits = sum((ref[...] for ref in bias_refs), plt.dot(q, k.T))
        logits = jnp.where(same, logits, EXCLUDED)
        weights = jnp.exp(logits - logits.max(1, keepdims=True))
        weights = weights / weights.sum(1, keepdims=True)
        store(d_v_ref, plt.dot(weights.astype(v.dtype).T, d_out))
        d_weights = plt.dot(d_out, v.T)
        d_logits = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True))
        short = d_logits.astype(q.dtype)
        store(d_q_ref, plt.dot(short, k) * call.scale)
        store(d_k_ref, plt.dot(short.T, q))
        return [d_bias + d_logits for d_bias in d_biases]

    start = [jnp.zeros(ref.shape, jnp.float32) for ref in bias_refs]
    d_biases = lax.fori_loop(0, call.steps, differentiate, start)
    for ref, d_bias in zip(refs[has_bias + 3 :], d_biases, strict=True):
        ref[...] = d_bias


def _place_of(index, call):
    """Returns the place of a window's tile in a map, which entries exist, which tokens meet.

    Args:
      index: number of the window among those of all images.
      call: the shapes.

    Returns:
      Indices of a (tile, D) tile; (tile, D) bool; (tile, tile) bool.
    """
    tokens, channels = call.tile
    columns = call.width // call.window[1]
    windows = call.height // call.window[0] * columns
    image, index = lax.div(index, windows), lax.rem(index, windows)
    token = jnp.arange(tokens, dtype=jnp.int32)
    row = lax.div(index, columns) * call.window[0] + token // call.window[1]
    column = lax.rem(index, columns) * call.window[1] + token % call.window[1]
    channel = jnp.arange(channels, dtype=jnp.int32)
    zeros = jnp.zeros_like(token)[:, None]
    place = (image + zeros, row[:, None], column[:, None], channel[None] + zeros)
    is_token = (token < call.tokens)[:, None] & (channel < call.dim)[None]
    same = (token < call.tokens)[None]
    if any(call.shift):
        # Rolling moves the first rows behind the last ones, into the same windows; columns alike.
        rolled_row = (row >= call.height - call.shift[0]).astype(jnp.int32)
        rolled_column = (column >= call.width - call.shift[1]).astype(jnp.int32)
        part = 2 * rolled_row + rolled_column
        same &= part[:, None] == part[None]
    return place, is_token, same


def _call_of(q, window, shift, scale):
    batch, height, width, heads, dim = q.shape
    windows = batch * (height // window[0]) * (width // window[1])
    steps = math.gcd(windows, _steps(windows * heads))
    return _Windows(height, width, heads, dim, window, shift, scale, steps)


def _steps(tiles):
    """Returns a power of two, from 1 to 32, for about FEWEST_PROGRAMS programs."""
    return 2 ** min(5, max(0, (tiles // FEWEST_PROGRAMS).bit_length() - 1))


def _grid(q, call):
    return math.prod(q.shape[:3]) // call.tokens // call.steps, call.heads


def _map_spec(q):
    channels = max(16, pl.next_power_of_2(q.shape[-1]))
    return pl.BlockSpec((*q.shape[:3], None, channels), lambda c, n: (0, 0, 0, n, 0))


def _biases_of(bias, call):
    """Returns the bias padded to tiles, if there is one, and its block."""
    if bias is None:
        return [], []
    padding = (0, call.tile[0] - call.tokens)
    block = (None, call.tile[0], call.tile[0])
    padded = jnp.pad(bias.astype(jnp.float32), ((0, 0), padding, padding))
    return [padded], [pl.BlockSpec(block, lambda c, n: (n, 0, 0))]
