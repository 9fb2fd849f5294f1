"""Resizing and pooling of maps against float64 loops and PyTorch's arrays."""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.ops import adaptive_average_pool, resize_bilinear, resize_nearest

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "resize.npz"))
RNG = np.random.default_rng(0)


def naive_bilinear(x, size, align_corners=False):
    def weight(i, old, new):
        place = i * (old - 1) / max(new - 1, 1) if align_corners else (i + 0.5) * old / new - 0.5
        place = min(max(place, 0), old - 1)
        low = math.floor(place)
        return {min(low + 1, old - 1): place - low} | {low: 1 - (place - low)}

    y = np.zeros((len(x), *size, x.shape[-1]))
    for i in range(size[0]):
        for j in range(size[1]):
            for row, a in weight(i, x.shape[1], size[0]).items():
                for column, b in weight(j, x.shape[2], size[1]).items():
                    y[:, i, j] += a * b * x[:, row, column]
    return y


def naive_nearest(x, size):
    rows, columns = (
        [int(i * o / n) for i in range(n)] for o, n in zip(x.shape[1:3], size, strict=True)
    )
    return np.stack([np.stack([x[:, i, j] for j in columns], 1) for i in rows], 1)


def naive_pool(x, side):
    def cell(i, size):
        return slice(math.floor(i * size / side), math.ceil((i + 1) * size / side))

    y = np.zeros((len(x), side, side, x.shape[-1]))
    for i in range(side):
        for j in range(side):
            y[:, i, j] = x[:, cell(i, x.shape[1]), cell(j, x.shape[2])].mean((1, 2))
    return y


ALIGNED = {"align_corners": True}
# Twice and four times as large, odd, smaller, equal, and from one row.
SIZES = [((3, 4), (6, 16)), ((5, 7), (9, 13)), ((9, 6), (4, 5)), ((3, 4), (3, 4)), ((1, 2), (5, 7))]


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize(
    ("resize", "naive"),
    [
        (resize_bilinear, naive_bilinear),
        (partial(resize_bilinear, **ALIGNED), partial(naive_bilinear, **ALIGNED)),
        (resize_nearest, naive_nearest),
    ],
)
def test_resizing_equals_its_definition(resize, naive, old, new):
    """Values, the gradient as the transposed matrix, and narrow types."""
    x, cotangent = RNG.normal(size=(2, *old, 3)), RNG.normal(size=(2, *new, 3))
    y, pull = jax.vjp(jax.jit(partial(resize, size=new)), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, naive(x, new), atol=1e-6)
    (dx,) = pull(jnp.asarray(cotangent, jnp.float32))
    unit = np.eye(math.prod(old)).reshape(-1, *old, 1)
    matrix = naive(unit, new).reshape(len(unit), -1)
    expected = np.einsum("on,bnc->boc", matrix, cotangent.reshape(2, -1, 3)).reshape(x.shape)
    np.testing.assert_allclose(dx, expected, atol=1e-5)
    narrow = resize(jnp.asarray(x, jnp.bfloat16), new)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(float), naive(x, new), atol=0.05)


@pytest.mark.parametrize("side", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(6, 12), (5, 7), (3, 4)])
def test_pooling_equals_its_definition(size, side):
    x = RNG.normal(size=(2, *size, 3))
    y = adaptive_average_pool(jnp.asarray(x, jnp.float32), side)
    np.testing.assert_allclose(y, naive_pool(x, side), atol=1e-6)
    assert adaptive_average_pool(jnp.asarray(x, jnp.bfloat16), side).dtype == jnp.bfloat16


def test_resizing_and_pooling_equal_pytorch():
    def near(found, expected):
        np.testing.assert_allclose(found, expected.transpose(0, 2, 3, 1), atol=1e-5)

    for number in (1, 2, 4, 5):  # to 13 x 25, 6 x 8, 9 x 31 and 1 x 5
        x = GOLDEN[f"{number}/in"].transpose(0, 2, 3, 1)
        expected = GOLDEN[f"{number}/bilinear_half"]
        near(resize_bilinear(x, expected.shape[2:]), expected)
        near(resize_bilinear(x, expected.shape[2:], **ALIGNED), GOLDEN[f"{number}/bilinear_align"])
        near(resize_nearest(x, expected.shape[2:]), GOLDEN[f"{number}/nearest_none"])
    for side in (1, 2, 3, 6):
        x = GOLDEN["pool/in"].transpose(0, 2, 3, 1)
        near(adaptive_average_pool(x, side), GOLDEN[f"pool/{side}"])


def test_matrices_of_interpolation_are_no_multiply_adds():
    x = jax.ShapeDtypeStruct((1, 5, 7, 3), jnp.float32)
    assert count_macs(lambda x: resize_bilinear(x, (9, 13)), x) == 0
    assert count_macs(lambda x: resize_bilinear(x, (9, 13), **ALIGNED), x) == 0
    assert count_macs(lambda x: adaptive_average_pool(x, 6), x) == 0
