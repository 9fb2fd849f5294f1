"""Attention within windows of a map, plain or shifted (Liu et al. 2021, "Swin Transformer")."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tokenvit_jax.kernels.attention import attend
from tokenvit_jax.kernels.chunked import one_by_one
from tokenvit_jax.kernels.platforms import by_platform, device_batch
from tokenvit_jax.kernels.window_attention import attend_windows, misfit_of_tiles
from tokenvit_jax.ops.counted import counted
from tokenvit_jax.ops.windows import to_map, to_windows

# Largest number of logits to hold at once on a CPU (128 MiB). This saves memory, not time: one row
# of windows after another was measured 1.0 to 1.2 times slower, with up to 2**24 logits.
MAX_LOGITS = 2**25


def _macs(inputs, outputs):
    batch, height, width, heads, dim = inputs[0]
    return 2 * batch * height * width * heads * dim * inputs[3][-1]


@counted(_macs, static_argnames=("window", "shift", "scale", "joined"))
def window_attention(
    q: Float[Array, "B H W N D"],
    k: Float[Array, "B H W N D"],
    v: Float[Array, "B H W N D"],
    bias: Float[Array, "N tokens tokens"],
    *,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    scale: float | None = None,
    joined: bool = False,
) -> Float[Array, "B H W N D"]:
    """Attends from every token to the tokens of its window.

    Args:
      q: queries (B, H, W, N, D).
      k: keys (B, H, W, N, D).
      v: values (B, H, W, N, D).
      bias: summand of the logits (N, h w, h w), with the tokens of a window row by row.
      window: (h, w), rows and columns of a window; they divide H and W.
      shift: rows and columns, less than a window, by which the map was rolled up and left
        beforehand. Tokens that share a window only because of the rolling do not attend to each
        other.
      scale: factor of the products of queries and keys; None: 1 / sqrt(D).
      joined: whether q, k and v are the thirds of one projection, in this order. GPUs then read
        them there; with other arrays, joining them takes longer.

    Returns:
      (B, H, W, N, D) in the type of ``v``.

    Raises:
      ValueError: the shapes do not fit together, or the window does not divide the map.

    References:
      Liu et al. 2021, Section 3.2 and Figure 4; Eq. 4 for the bias.
    """
    _check(q, k, v, bias, window, shift)
    batch, height, width, heads, dim = q.shape
    rows, columns = height // window[0], width // window[1]
    scale = dim**-0.5 if scale is None else scale

    def split(x):  # (B, H, W, N, D) -> (rows, B, columns, N, h w, D)
        x = to_windows(x, window).transpose(1, 0, 2, 5, 3, 4, 6)
        return x.reshape(rows, batch, columns, heads, window[0] * window[1], dim)

    def with_logits(q, k, v, bias, run):
        def within(q, k, v, parts):
            mask = None if parts is None else parts[..., :, None] == parts[..., None, :]
            return attend(q, k, v, mask, bias)[0]

        parts = _parts((height, width), window, shift) if any(shift) else None
        y = run(within, split(q * scale), split(k), split(v), parts)
        y = y.reshape(rows, batch, columns, heads, *window, dim)
        return to_map(y.transpose(1, 0, 2, 4, 5, 3, 6))

    def at_once(within, *windows):
        return within(*windows)

    def in_place(q, k, v, bias):
        return attend_windows(q, k, v, bias, window, shift, scale, joined)

    logits = device_batch(batch) * height * width * heads * bias.shape[-1]
    return by_platform(
        "window attention", q, k, v, bias,
        cpu=functools.partial(with_logits, run=one_by_one if logits > MAX_LOGITS else at_once),
        cuda=in_place,
        default=functools.partial(with_logits, run=at_once),
        misfits={"cuda": misfit_of_tiles(q, k, v, bias.shape[-1])},
        shared=(3,),
    )  # fmt: skip


def _parts(size, window, shift):
    """Returns the part of its window that each token is in (rows, 1, columns, 1, h w).

    Rolling moves the first ``shift`` rows behind the last rows, into the same windows; the same
    holds for columns.
    """
    rolled = [np.arange(n) >= n - s for n, s in zip(size, shift, strict=True)]
    parts = 2 * rolled[0][:, None] + rolled[1]  # (H, W)
    parts = to_windows(parts[None], window)[0]  # (rows, columns, h, w)
    rows, columns = parts.shape[:2]
    return jnp.asarray(parts.reshape(rows, 1, columns, 1, -1), jnp.int32)


def relative_position_bias(
    table: Float[Array, "A B N"], window: tuple[int, int]
) -> Float[Array, "N tokens tokens"]:
    """Looks up the position bias for every pair of tokens in a window.

    Args:
      table: (2 a - 1, 2 b - 1, N), the bias for each offset of a query from its key; offset 0 is
        in the middle.
      window: (h, w), rows and columns of a window, at most (a, b).

    Returns:
      Biases (N, h w, h w): heads, queries, keys.

    Raises:
      ValueError: the window is larger than the table allows.

    References:
      Liu et al. 2021, Section 3.2.
    """
    largest = tuple((n + 1) // 2 for n in table.shape[:2])
    if window[0] > largest[0] or window[1] > largest[1]:
        raise ValueError(f"window is {window}; table {table.shape} is for at most {largest}")
    row, column = (
        np.arange(n)[:, None] - np.arange(n) + middle // 2
        for n, middle in zip(window, table.shape[:2], strict=True)
    )
    bias = table[row[:, None, :, None], column[:, None, :]]  # (h, w, h, w, N)
    tokens = window[0] * window[1]
    return bias.reshape(tokens, tokens, -1).transpose(2, 0, 1)


def _check(q, k, v, bias, window, shift):
    if q.ndim != 5:
        raise ValueError(f"q has shape {q.shape}; expected (batch, height, width, heads, dim)")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} has shape {x.shape}; expected the shape of q, {q.shape}")
    height, width, heads = q.shape[1:4]
    if min(window) < 1 or height % window[0] or width % window[1]:
        raise ValueError(
            f"window is {window}; it must divide the height and width of q, {height} x {width}"
        )
    if not all(0 <= s < n for s, n in zip(shift, window, strict=True)):
        raise ValueError(f"shift is {shift}; it must be from 0 to below the window, {window}")
    tokens = window[0] * window[1]
    if bias.shape != (heads, tokens, tokens):
        raise ValueError(f"bias has shape {bias.shape}; expected {(heads, tokens, tokens)}")
