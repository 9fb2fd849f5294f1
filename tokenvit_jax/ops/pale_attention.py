"""Pale-shaped attention (Wu et al. 2022, "Pale Transformer", Section 3.1).

A map of H x W tokens has n = H / s_r row groups, of which group i is the s_r rows i, i + n,
i + 2 n, ..., and W / s_c column groups alike. A pale is the union of a row group and a column
group. The vanilla form attends within whole pales, the parallel form within row groups with one
half of the heads and within column groups with the other (Eqs. 1 to 3).

Rows at equal distances are an axis of the reshaped map, so grouping needs no index arrays: each
form is reshapes and transposes around dense attention within groups, whose gradients are reshapes
and transposes too.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from tokenvit_jax.ops.attention import MAX_LOGITS, dot_product_attention

MODES = ("parallel", "rows", "columns", "cross", "vanilla")
HALVED = ("parallel", "cross")  # one half of the heads for rows, the other for columns
ROWS, COLUMNS = 1, 2  # axes of (B, H, W, N, D)


@functools.partial(jax.jit, static_argnames=("pale", "mode", "scale"))
def pale_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    pale: tuple[int, int] = (7, 7),
    mode: str = "parallel",
    scale: float | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Attends from every token to the tokens of its row group, column group or pale.

    Modes:
      * "parallel": the first half of the heads within row groups, the second within column groups.
      * "rows", "columns": all heads within row groups, or within column groups.
      * "cross": as "parallel", with stripes of s_r adjacent rows and s_c adjacent columns (Dong et
        al. 2022, "CSWin Transformer").
      * "vanilla": within pale i, the union of row group i and column group i. A token whose two
        groups have different indices lies in two pales; its output is the mean of the two.

    Args:
      q: queries (B, H, W, N, D).
      k: keys (B, H, W, N, D).
      v: values (B, H, W, N, D).
      pale: (s_r, s_c), rows and columns of a pale; they divide H and W.
      mode: see above.
      scale: factor of the logits; None: 1 / sqrt(D).
      mask: (H, W) bool, False at padding, which is never attended to and whose output is zero;
        None: no padding.

    Returns:
      (B, H, W, N, D) in the type of ``v``.

    Raises:
      ValueError: shapes that do not fit, a pale size that does not divide the map, an unknown mode,
        an odd number of heads where they are halved, or H / s_r != W / s_c with "vanilla".

    References:
      Wu et al. 2022, Eqs. 1 to 3.
    """
    _check(q, k, v, pale, mode, mask)
    if mask is not None:
        mask = mask[None, :, :, None, None]
    within = functools.partial(_attend_within, mask=mask, scale=scale)
    match mode:
        case "rows":
            y = within(q, k, v, ROWS, pale[0])
        case "columns":
            y = within(q, k, v, COLUMNS, pale[1])
        case "vanilla":
            y = _attend_pales(q, k, v, pale, mask, scale)
        case _:
            rows, columns = zip(*(jnp.split(x, 2, axis=3) for x in (q, k, v)), strict=True)
            interlaced = mode == "parallel"
            y_rows = within(*rows, ROWS, pale[0], interlaced=interlaced)
            y_columns = within(*columns, COLUMNS, pale[1], interlaced=interlaced)
            y = jnp.concatenate([y_rows, y_columns], 3)
    return y if mask is None else jnp.where(mask, y, jnp.zeros_like(y))


def _attend_within(q, k, v, axis, size, *, mask, scale, interlaced=True):
    """Attends within groups of ``size`` rows or columns, interlaced or adjacent."""
    num_groups = q.shape[axis] // size
    split = (size, num_groups) if interlaced else (num_groups, size)
    group_axis = axis + interlaced

    def to_groups(x):  # (B, H, W, ...) -> (B, n, s_r, W, ...) or (B, n, H, s_c, ...)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], *split, *x.shape[axis + 1 :]), group_axis, 1)

    groups = [to_groups(x) for x in (q, k, v)]
    flat = [x.reshape(*x.shape[:2], -1, *x.shape[4:]) for x in groups]
    mask = None if mask is None else to_groups(mask).reshape(num_groups, -1)
    y = _attend_groups(*flat, mask, scale).reshape(groups[0].shape)
    return jnp.moveaxis(y, 1, group_axis).reshape(q.shape)


def _attend_groups(q, k, v, mask, scale):
    """Attends within n groups: q, k, v (B, n, L, N, D), mask (n, L) or None -> (B, n, L, N, D)."""
    if mask is not None:
        mask = jnp.broadcast_to(mask, q.shape[:3])

    def attend(group):
        q, k, v, mask = group
        return dot_product_attention(q, k, v, scale=scale, key_mask=mask)

    def at_once(*groups):
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), groups)
        return attend(flat).reshape(q.shape)

    def one_by_one(*groups):
        # All images in each step, so that a batch that is split over devices stays split.
        groups = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), groups)
        y = lax.map(jax.checkpoint(attend, prevent_cse=False), groups)
        return jnp.moveaxis(y, 0, 1)

    # On a CPU, one group of all images at a time was measured 1.3 to 1.5 times faster, forward and
    # backward, than what `dot_product_attention` does about too many logits.
    batch, num_groups, length, heads, _ = q.shape
    if batch * num_groups * heads * length**2 <= MAX_LOGITS:
        return at_once(q, k, v, mask)
    return lax.platform_dependent(q, k, v, mask, cpu=one_by_one, default=at_once)


def _attend_pales(q, k, v, pale, mask, scale):
    """Attends within whole pales of T = s_r W + s_c H - s_r s_c tokens.

    Seen as (n, n) blocks of s_r x s_c tokens, block (i, j) in row group i and column group j, pale
    i is row i of the blocks and column i without its diagonal block.
    """
    batch, height, width, *rest = q.shape
    n = height // pale[0]

    def to_blocks(x):  # (B, H, W, ...) -> (B, n, n, s_r, s_c, ...)
        x = x.reshape(x.shape[0], pale[0], n, pale[1], n, *x.shape[3:])
        return jnp.moveaxis(x, (2, 4), (1, 2))

    def to_pales(x):
        blocks = to_blocks(x)
        parts = [blocks, _drop_diagonal(jnp.swapaxes(blocks, 1, 2))]
        return jnp.concatenate([x.reshape(*x.shape[:2], -1, *x.shape[5:]) for x in parts], 2)

    mask = None if mask is None else to_pales(mask).reshape(n, -1)
    y = _attend_groups(*(to_pales(x) for x in (q, k, v)), mask, scale)
    in_row, in_column = jnp.split(y, [pale[0] * width], axis=2)
    in_row = in_row.reshape(batch, n, n, *pale, *rest)
    in_column = in_column.reshape(batch, n, n - 1, *pale, *rest)
    # A block on the diagonal lies in one pale: the mean of its output with itself.
    in_column = jnp.swapaxes(_put_diagonal(in_column, _diagonal(in_row)), 1, 2)
    mean = (in_row + in_column) / 2
    return jnp.moveaxis(mean, (1, 2), (2, 4)).reshape(q.shape)


# Without its first entry, a flat (n, n) matrix is n - 1 rows of n entries off the diagonal and one
# on it.


def _diagonal(x):
    """(B, n, n, ...) -> (B, n, ...)."""
    n = x.shape[1]
    return x.reshape(x.shape[0], n * n, *x.shape[3:])[:, :: n + 1]


def _drop_diagonal(x):
    """(B, n, n, ...) -> (B, n, n - 1, ...)."""
    batch, n, _, *rest = x.shape
    off = x.reshape(batch, n * n, *rest)[:, 1:].reshape(batch, n - 1, n + 1, *rest)[:, :, :-1]
    return off.reshape(batch, n, n - 1, *rest)


def _put_diagonal(off, diagonal):
    """(B, n, n - 1, ...) and (B, n, ...) -> (B, n, n, ...); undoes :func:`_drop_diagonal`."""
    batch, n, _, *rest = off.shape
    rows = off.reshape(batch, n - 1, n, *rest)
    rows = jnp.concatenate([rows, diagonal[:, 1:, None]], 2).reshape(batch, n * n - 1, *rest)
    return jnp.concatenate([diagonal[:, :1], rows], 1).reshape(batch, n, n, *rest)


def _check(q, k, v, pale, mode, mask):
    if q.ndim != 5:
        raise ValueError(f"q has shape {q.shape}; expected (batch, height, width, heads, dim)")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} has shape {x.shape}; it must be that of q, {q.shape}")
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
            f"and {width // pale[1]} column groups; mode 'vanilla' needs as many of both"
        )
    if mask is not None and mask.shape != (height, width):
        raise ValueError(f"mask has shape {mask.shape}; expected {(height, width)}")
