"""Selection of the smallest against sorting."""

import jax
import numpy as np

from tokenvit_jax.ops.selection import smallest_k


def test_smallest_of_many():
    values = np.random.default_rng(0).integers(9, size=(2, 523, 3))  # many ties
    values[:, :100] = 10
    found, indices = jax.jit(lambda x: smallest_k(x, 5))(values.astype(np.float32))
    expected = np.argsort(values, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(found, np.take_along_axis(values, expected, 1))
