"""Selection of the smallest and the largest against sorting."""

import jax
import jax.numpy as jnp
import numpy as np

from tokenvit_jax.kernels.top_indices import by_counting, ranks
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


def test_ranks():
    """Places of all scores; the last of three blocks has two. NaN comes first."""
    scores = np.random.default_rng(0).integers(0, 9, (2, 130)).astype(np.float32)
    scores[0, 5], scores[1, 7:9], scores[1, 30] = np.inf, -np.inf, np.nan
    order, places = map(np.asarray, jax.jit(lambda x: ranks(x, interpret=True))(scores))
    expected = np.argsort(np.where(np.isnan(scores), -np.inf, -scores), axis=1, kind="stable")
    np.testing.assert_array_equal(order, expected)
    np.testing.assert_array_equal(np.take_along_axis(places, order, 1), [np.arange(130)] * 2)
