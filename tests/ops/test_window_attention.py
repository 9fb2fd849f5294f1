"""Window attention against float64 loops over the tokens of unrolled maps."""

import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tokenvit_jax import ops
from tokenvit_jax.measure.macs import count_macs

# The packages export functions with the same name.
module = importlib.import_module("tokenvit_jax.ops.window_attention")
kernels = importlib.import_module("tokenvit_jax.kernels.window_attention")

WINDOW = (3, 2)


def inputs(height=6, width=4, dtype=np.float32):
    rng = np.random.default_rng(0)
    maps = (rng.normal(size=(2, height, width, 2, 4)).astype(dtype) for _ in range(3))
    return *maps, rng.normal(size=(2, 6, 6)).astype(dtype)


def naive(q, k, v, bias, shift, scale):
    """Moves the windows by the shift and clips them at the border of the map."""
    q, k, v, bias = (np.asarray(x, np.float64) for x in (q, k, v, bias))
    place = lambda i, axis: (i - shift[axis]) // WINDOW[axis]  # noqa: E731
    index = lambda r, c: (r - shift[0]) % 3 * 2 + (c - shift[1]) % 2  # noqa: E731
    output = np.zeros_like(q)
    rows, columns = np.indices(q.shape[1:3])
    for b, r, c, n in np.ndindex(q.shape[:4]):
        same = (place(rows, 0) == place(r, 0)) & (place(columns, 1) == place(c, 1))
        logits = scale * k[b, same, n] @ q[b, r, c, n]
        logits += bias[n, index(r, c), index(rows[same], columns[same])]
        weights = np.exp(logits - logits.max())
        output[b, r, c, n] = weights @ v[b, same, n] / weights.sum()
    return output


@pytest.mark.parametrize("row_by_row", [False, True])
@pytest.mark.parametrize(
    ("shift", "scale"), [((0, 0), None), ((1, 1), None), ((2, 0), 1.3), ((0, 1), None)]
)
def test_equals_the_loops(shift, scale, row_by_row, monkeypatch):
    monkeypatch.setattr(module, "MAX_LOGITS", 0 if row_by_row else np.inf)
    *maps, bias = inputs()
    rolled = [np.roll(x, (-shift[0], -shift[1]), (1, 2)) for x in maps]
    attend = ops.window_attention.__wrapped__  # not compiled yet: it reads the limit
    y = jax.jit(
        functools.partial(attend, window=WINDOW, shift=shift, scale=scale)
    )(*rolled, bias)  # fmt: skip
    expected = naive(*maps, bias, shift, scale or 0.5)
    np.testing.assert_allclose(np.roll(y, shift, (1, 2)), expected, atol=1e-6)


def test_gradients(monkeypatch):
    with jax.enable_x64(True):
        arrays = inputs(dtype=np.float64)
        attend = functools.partial(ops.window_attention, window=WINDOW, shift=(1, 1))
        assert attend(*arrays).dtype == jnp.float64
        check_grads(attend, arrays, order=1, modes=["rev"], atol=1e-7, rtol=1e-7)
    arrays = inputs()

    def pull(attend):
        fn = lambda *x: attend(*x, window=WINDOW, shift=(1, 1))  # noqa: E731
        return jax.jit(lambda *x: jax.vjp(fn, *x)[1](x[0]))(*arrays)

    expected = pull(ops.window_attention)
    monkeypatch.setattr(module, "MAX_LOGITS", 0)
    chex.assert_trees_all_close(pull(ops.window_attention.__wrapped__), expected, atol=1e-6)


def test_vmap_and_types():
    q, k, v, bias = inputs()
    attend = functools.partial(ops.window_attention, window=WINDOW)
    mapped = jax.vmap(attend, (0, 0, 0, None))(*(x[:, None] for x in (q, k, v)), bias)
    np.testing.assert_allclose(mapped[:, 0], attend(q, k, v, bias), atol=1e-6)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    assert jax.eval_shape(attend, *narrow, bias).dtype == jnp.bfloat16


def test_multiply_adds():
    attend = functools.partial(ops.window_attention, window=WINDOW, shift=(1, 0))
    assert count_macs(attend, *inputs()) == 2 * 2 * 24 * 6 * 2 * 4


def test_bias_of_a_pair_is_that_of_its_offset():
    """Also looks up biases in a table for larger windows."""
    table = np.random.default_rng(1).normal(size=(7, 5, 2)).astype(np.float32)
    for rows, columns in ((4, 3), (2, 3), (3, 1)):
        bias = ops.relative_position_bias(table, (rows, columns))
        assert bias.shape == (2, rows * columns, rows * columns)
        bias = bias.reshape(2, rows, columns, rows, columns)
        for i, j, r, c in np.ndindex(rows, columns, rows, columns):
            np.testing.assert_array_equal(bias[:, i, j, r, c], table[3 + i - r, 2 + j - c])
    with pytest.raises(ValueError, match=r"window is \(4, 4\); .* is for at most \(4, 3\)"):
        ops.relative_position_bias(table, (4, 4))


@pytest.mark.parametrize(
    ("window", "shift", "message"),
    [
        ((4, 2), (0, 0), r"window is \(4, 2\); it must divide .* of q, 6 x 4"),
        ((3, 2), (3, 0), r"shift is \(3, 0\); it must be from 0 to below the window, \(3, 2\)"),
        ((2, 2), (0, 0), r"bias has shape \(2, 6, 6\); expected \(2, 4, 4\)"),
    ],
)
def test_bad_arguments_are_named(window, shift, message):
    with pytest.raises(ValueError, match=message):
        ops.window_attention(*inputs(), window=window, shift=shift)


def assert_equal_with_gradients(attend, expected, *args):
    """Asserts that values and gradients are equal within a few roundings of the largest number."""

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(attend, *args):
        value, pull = jax.vjp(attend, *args)
        return value, pull(jnp.sin(value))

    found, expected = (jax.tree.leaves(value_and_gradients(f, *args)) for f in (attend, expected))
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        eps = float(jnp.finfo(args[0].dtype).eps)
        np.testing.assert_allclose(x, y, atol=8 * eps * np.abs(y).max())


@pytest.mark.parametrize(
    ("window", "shift", "dtype", "joined"),
    [((3, 2), (2, 1), jnp.float32, True), ((7, 7), (0, 0), jnp.bfloat16, False)],
    ids=str,
)
def test_the_kernels_for_a_gpu(window, shift, dtype, joined, monkeypatch):
    monkeypatch.setattr(kernels, "FEWEST_PROGRAMS", 4)  # several windows per program
    rng = np.random.default_rng(0)
    shape = (2, 2 * window[0], 2 * window[1], 2, 12)
    maps = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3)]
    bias = jnp.asarray(rng.normal(size=(2, window[0] * window[1], window[0] * window[1])))
    assert_equal_with_gradients(
        lambda *x: kernels.attend_windows(*x, window, shift, 0.3, joined, True),
        lambda *x: ops.window_attention(*x, window=window, shift=shift, scale=0.3),
        *maps, bias,
    )  # fmt: skip


def test_the_kernels_for_short_sequences():
    maps = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 19, 2, 16)), jnp.float32)
    assert_equal_with_gradients(
        functools.partial(kernels.attend_short, scale=0.3, interpret=True),
        functools.partial(ops.dot_product_attention, scale=0.3),
        *maps,
    )


def test_the_kernels_for_pales(monkeypatch):
    monkeypatch.setattr(kernels, "FEWEST_PROGRAMS", 4)
    monkeypatch.setattr(kernels, "MAX_TOKENS", 16)  # two blocks of queries per window
    maps = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 9, 9, 4, 8)), jnp.float32)
    assert_equal_with_gradients(
        functools.partial(
            kernels.attend_stripes, rows=(3, 9), columns=(9, 3), interlaced=True,
            scale=0.3, interpret=True,
        ),
        functools.partial(ops.pale_attention, pale=(3, 3), scale=0.3),
        *maps,
    )  # fmt: skip
