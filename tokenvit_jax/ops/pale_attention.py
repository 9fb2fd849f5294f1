"""Pale-shaped attention (Wu et al. 2022, "Pale Transformer", Section 3.1).

A map of H x W tokens has n = H / s_r row groups; group i is the s_r rows i, i + n, i + 2 n, ...
It has W / s_c column groups, divided in the same way. A pale is the union of a row group and a
column group. The vanilla form attends within whole pales; the parallel form attends within row
groups with one half of the heads and within column groups with the other (Eqs. 1 to 3).

Rows at equal distances are an axis of the reshaped map, so grouping needs no index arrays. Each
form is dense attention within groups, between reshapes and transposes whose gradients are also
reshapes and transposes.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokenvit_jax.kernels.chunked import MAX_LOGITS, one_by_one
from tokenvit_jax.kernels.platforms import by_platform, device_batch
from tokenvit_jax.kernels.window_attention import MAX_STRIPE, attend_stripes, misfit_of_tiles
from tokenvit_jax.ops.attention import dot_product_attention
from tokenvit_jax.ops.counted import counted_as
from tokenvit_jax.ops.windows import to_map, to_windows

MODES = ("parallel", "rows", "columns", "cross", "vanilla")
HALVED = ("parallel", "cross")  # half of the heads attends within rows, half within columns


@functools.partial(jax.jit, static_argnames=("pale", "mode", "scale"))
def pale_attention(
    q: Float[Array, "B H W N D"],
    k: Float[Array, "B H W N D"],
    v: Float[Array, "B H W N D"],
    *,
    pale: tuple[int, int] = (7, 7),
    mode: str = "parallel",
    scale: float | None = None,
    mask: Bool[Array, "H W"] | None = None,
) -> Float[Array, "B H W N D"]:
    """Attends from every token to the tokens of its row group, column group or pale.

    Modes:
      * "parallel": the first half of the heads within row groups, the second within column groups.
      * "rows", "columns": all heads within row groups, or within column groups.
      * "cross": like "parallel", with stripes of s_r adjacent rows and s_c adjacent columns (Dong
        et al. 2022, "CSWin Transformer").
      * "vanilla": within pale i, the union of row group i and column group i. A token whose two
        groups have different indices lies in two pales; its output is the mean of the two.

    Args:
      q: queries (B, H, W, N, D).
      k: keys (B, H, W, N, D).
      v: values (B, H, W, N, D).
      pale: (s_r, s_c), rows and columns of a pale; they divide H and W.
      mode: one of the modes above.
      scale: factor of the logits; None: 1 / sqrt(D).
      mask: (H, W) bool, False at padding, to which no token attends and whose output is zero; None:
        no padding.

    Returns:
      (B, H, W, N, D) in the type of ``v``.

    Raises:
      ValueError: the shapes do not fit together, the pale does not divide the map, the mode is
        unknown, the mode halves an odd number of heads, or H / s_r != W / s_c with "vanilla".

    References:
      Wu et al. 2022, Eqs. 1 to 3.
    """
    _check(q, k, v, pale, mode, mask)
    if mask is not None:
        mask = mask[None, :, :, None, None]
    within = functools.partial(_attend_within, mask=mask, scale=scale)
    row_group, column_group = (pale[0], q.shape[2]), (q.shape[1], pale[1])
    match mode:
        case "rows":
            y = within(q, k, v, row_group)
        case "columns":
            y = within(q, k, v, column_group)
        case "vanilla":
            y = _attend_pales(q, k, v, pale, mask, scale)
        case _:
            y = _attend_in_halves(q, k, v, row_group, column_group, mask, scale, mode == "parallel")
    return y if mask is None else jnp.where(mask, y, jnp.zeros_like(y))


def _attend_in_halves(q, k, v, row_group, column_group, mask, scale, interlaced):
    """Attends with half of the heads within rows and with half of them within columns."""
    stripes = row_group, column_group

    def halves(x):
        return jnp.split(x, 2, axis=3)

    def one_after_the_other(q, k, v):
        within = functools.partial(_attend_within, mask=mask, scale=scale, interlaced=interlaced)
        parts = zip(halves(q), halves(k), halves(v), stripes, strict=True)
        return jnp.concatenate([within(*part) for part in parts], 3)

    def both_at_once(q, k, v):
        def to_groups(x):
            parts = zip(halves(x), stripes, strict=True)
            return jnp.concatenate([_to_groups(*part, interlaced) for part in parts], 1)

        both_masks = mask
        if mask is not None:
            both_masks = jnp.concatenate([_to_groups(mask, s, interlaced)[0] for s in stripes])
            both_masks = both_masks.reshape(len(both_masks), -1)
        y = _attend_groups(to_groups(q), to_groups(k), to_groups(v), both_masks, scale)
        parts = zip(jnp.split(y, 2, axis=1), stripes, strict=True)
        return jnp.concatenate([_from_groups(*part, q.shape[1:3], interlaced) for part in parts], 3)

    tokens = math.prod(row_group)
    in_place = counted_as(
        "stripes",
        2 * math.prod(q.shape[1:]) * tokens,
        functools.partial(
            attend_stripes, rows=row_group, columns=column_group, interlaced=interlaced,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
        ),
    )  # fmt: skip
    square = row_group == column_group[::-1] and q.shape[1] == q.shape[2]
    reason = misfit_of_tiles(q, k, v, tokens, MAX_STRIPE)
    if not square or mask is not None:
        reason = "padding, or row groups that differ from column groups in their size"
    return by_platform(
        "pale attention", q, k, v, cpu=one_after_the_other, cuda=in_place,
        default=both_at_once if square else one_after_the_other, misfits={"cuda": reason},
    )  # fmt: skip


def _to_groups(x, stripe, interlaced):
    """Divides a map into its groups: (B, H, W, ...) -> (B, n, L, ...)."""
    x = to_windows(x, stripe, interlaced=interlaced)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3] * x.shape[4], *x.shape[5:])


def _from_groups(x, stripe, size, interlaced):
    """Undoes :func:`_to_groups` for a map of a size (H, W)."""
    counts = size[0] // stripe[0], size[1] // stripe[1]
    x = x.reshape(x.shape[0], *counts, *stripe, *x.shape[3:])
    return to_map(x, interlaced=interlaced)


def _attend_within(q, k, v, stripe, *, mask, scale, interlaced=True):
    """Attends within stripes of whole rows or whole columns, interlaced or adjacent."""
    groups = [_to_groups(x, stripe, interlaced) for x in (q, k, v)]
    if mask is not None:
        mask = _to_groups(mask, stripe, interlaced)
        mask = mask.reshape(mask.shape[1], -1)
    y = _attend_groups(*groups, mask, scale)
    return _from_groups(y, stripe, q.shape[1:3], interlaced)


def _attend_groups(q, k, v, mask, scale):
    """Attends within n groups: q, k, v (B, n, L, N, D), mask (n, L) -> (B, n, L, N, D)."""
    if mask is not None:
        mask = jnp.broadcast_to(mask, q.shape[:3])

    def attend(q, k, v, mask):
        return dot_product_attention(q, k, v, scale=scale, key_mask=mask)

    def at_once(*groups):
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), groups)
        return attend(*flat).reshape(q.shape)

    def by_groups(*groups):
        # Each step has all images, so that a batch that is split over devices stays split.
        groups = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), groups)
        return jnp.moveaxis(one_by_one(attend, *groups), 0, 1)

    # On a CPU, one group of all images at a time was measured 1.3 to 1.5 times faster, forward and
    # backward, than the chunks of queries in `dot_product_attention`.
    batch, num_groups, length, heads, _ = q.shape
    if device_batch(batch) * num_groups * heads * length**2 <= MAX_LOGITS:
        return at_once(q, k, v, mask)
    return by_platform("groups of tokens", q, k, v, mask, cpu=by_groups, default=at_once)


def _attend_pales(q, k, v, pale, mask, scale):
    """Attends within whole pales of T = s_r W + s_c H - s_r s_c tokens.

    The map is (n, n) blocks of s_r x s_c tokens; block (i, j) is in row group i and column group j.
    Pale i is row i of the blocks, and column i without its diagonal block.
    """
    batch, height, width, *rest = q.shape
    n = height // pale[0]

    def merged(x):  # (B, n, m, s_r, s_c, ...) -> (B, n, m s_r s_c, ...)
        return x.reshape(*x.shape[:2], math.prod(x.shape[2:5]), *x.shape[5:])

    def to_pales(x):
        blocks = to_windows(x, pale, interlaced=True)  # (B, n, n, s_r, s_c, ...)
        parts = [blocks, _drop_diagonal(jnp.swapaxes(blocks, 1, 2))]
        return jnp.concatenate([merged(x) for x in parts], 2)

    mask = None if mask is None else to_pales(mask).reshape(n, -1)
    y = _attend_groups(*(to_pales(x) for x in (q, k, v)), mask, scale)
    in_row, in_column = jnp.split(y, [pale[0] * width], axis=2)
    in_row = in_row.reshape(batch, n, n, *pale, *rest)
    in_column = in_column.reshape(batch, n, n - 1, *pale, *rest)
    # A block on the diagonal is in one pale only: its output is averaged with itself.
    in_column = jnp.swapaxes(_put_diagonal(in_column, _diagonal(in_row)), 1, 2)
    return to_map((in_row + in_column) / 2, interlaced=True)


# Without its first entry, a flattened (n, n) matrix consists of n - 1 rows, each with n entries off
# the diagonal and then one on it.


def _diagonal(x):
    """Returns the diagonal: (B, n, n, ...) -> (B, n, ...)."""
    n = x.shape[1]
    return x.reshape(x.shape[0], n * n, *x.shape[3:])[:, :: n + 1]


def _drop_diagonal(x):
    """Leaves out the diagonal: (B, n, n, ...) -> (B, n, n - 1, ...)."""
    batch, n, _, *rest = x.shape
    off = x.reshape(batch, n * n, *rest)[:, 1:].reshape(batch, n - 1, n + 1, *rest)[:, :, :-1]
    return off.reshape(batch, n, n - 1, *rest)


def _put_diagonal(off, diagonal):
    """Undoes :func:`_drop_diagonal`: (B, n, n - 1, ...) and (B, n, ...) -> (B, n, n, ...)."""
    batch, n, _, *rest = off.shape
    rows = off.reshape(batch, n - 1, n, *rest)
    rows = jnp.concatenate([rows, diagonal[:, 1:, None]], 2).reshape(batch, n * n - 1, *rest)
    return jnp.concatenate([diagonal[:, :1], rows], 1).reshape(batch, n, n, *rest)


def _check(q, k, v, pale, mode, mask):
    if q.ndim != 5:
        raise ValueError(f"q has shape {q.shape}; expected (batch, height, width, heads, dim)")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} has shape {x.shape}; expected the shape of q, {q.shape}")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
    if len(pale) != 2 or min(pale) < 1:
        raise ValueError(f"pale is {pale}; it must be two numbers of at least 1")
    height, width, heads = q.shape[1:4]
    if height % pale[0] or width % pale[1]:
        raise ValueError(
            f"pale is {pale}; it must divide the height and width of q, {height} x {width}"
        )
    if mode in HALVED and heads % 2:
        raise ValueError(f"q has {heads} heads; mode {mode!r} needs an even number")
    if mode == "vanilla" and height // pale[0] != width // pale[1]:
        raise ValueError(
            f"pale is {pale}, which divides {height} x {width} into {height // pale[0]} row groups "
            f"and {width // pale[1]} column groups; mode 'vanilla' needs equal numbers"
        )
    if mask is not None and mask.shape != (height, width):
        raise ValueError(f"mask has shape {mask.shape}; expected {(height, width)}")
