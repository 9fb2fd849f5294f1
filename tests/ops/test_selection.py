"""Selection of the smallest against sorting."""

import jax
import jax.numpy as jnp
import numpy as np

from tokenvit_jax.kernels.top_indices import by_counting
from tokenvit_jax.ops.selection import smallest_k


def test_smallest_of_many():
    values = np.random.default_rng(0).integers(9, size=(2, 523, 3))  # many ties
    values[:, :100] = 10
    found, indices = jax.jit(lambda x: smallest_k(x, 5))(values.astype(np.float32))
    expected = np.argsort(values, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(found, np.take_along_axis(values, expected, 1))


def test_largest_by_counting():
    """Ties, -0 and infinities are in the order of the other forms."""
    draw = np.random.default_rng(0)
    scores = draw.integers(-2, 3, (2, 3, 70)).astype(np.float32)
    scores[scores == 0] *= draw.choice([-1, 1], (scores == 0).sum())
    scores[0, 0, 3], scores[0, 0, 5] = -np.inf, np.inf
    for count in (1, 33, 70):
        found = by_counting(jnp.asarray(scores), count, interpret=True)
        expected = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
        np.testing.assert_array_equal(found, expected)
