"""Windows of maps against loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.ops.windows import pad_to_windows, to_map, to_windows, whole_windows


@pytest.mark.parametrize("interlaced", [False, True])
def test_windows_are_the_tokens_that_loops_find(interlaced):
    x = np.random.default_rng(0).normal(size=(2, 6, 8, 3, 5))
    windows = to_windows(x, (3, 2), interlaced=interlaced)
    assert windows.shape == (2, 2, 4, 3, 2, 3, 5)
    for i, j in np.ndindex(2, 4):
        rows = slice(i, None, 2) if interlaced else slice(3 * i, 3 * i + 3)
        columns = slice(j, None, 4) if interlaced else slice(2 * j, 2 * j + 2)
        np.testing.assert_array_equal(windows[:, i, j], x[:, rows, columns])


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_map_is_put_together_again(interlaced):
    x = jnp.arange(2 * 6 * 8 * 3).reshape(2, 6, 8, 3)
    windows = to_windows(x, (3, 2), interlaced=interlaced)
    np.testing.assert_array_equal(to_map(windows, interlaced=interlaced), x)


def test_padding_is_below_and_on_the_right():
    x = np.ones((2, 6, 8, 3), np.float32)
    padded = pad_to_windows(x, (4, 3))
    assert padded.shape == (2, 8, 9, 3)
    np.testing.assert_array_equal(padded[:, :6, :8], x)
    assert padded.sum() == x.sum()
    assert whole_windows((6, 8), (4, 3)) == (2, 3)
    assert pad_to_windows(x, (3, 4)).shape == x.shape
