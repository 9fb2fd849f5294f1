"""Standardisation of the kernels of convolutions, on accelerators of many kernels at once."""

import functools

import jax.numpy as jnp
from jax import custom_vjp, lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tokenvit_jax.kernels.platforms import by_platform
from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.ops.packed import join_rows


@functools.partial(custom_vjp, nondiff_argnums=(1, 2))
def standardize_kernels(
    kernels: list[Float[Array, "h w m n"]], epsilon: float, dtype: DTypeLike
) -> list[Float[Array, "h w m n"]]:
    """Shifts the weights of every output channel to mean 0 and divides by their deviation.

    Args:
      kernels: kernels (rows, columns, inputs, outputs) of any sizes.
      epsilon: constant added to the (biased) variance.
      dtype: type of the results; they are computed in float32 (float64 for float64).

    References:
      Qiao et al. 2019, "Weight Standardization".
    """
    return _map(functools.partial(_standardize, epsilon=epsilon, dtype=dtype), kernels)


def _backward(epsilon, dtype, kernels, gradients):
    del dtype
    return (_map(functools.partial(_gradient, epsilon=epsilon), kernels, gradients),)


standardize_kernels.defvjp(
    lambda kernels, epsilon, dtype: (standardize_kernels(kernels, epsilon, dtype), kernels),
    _backward,
)


def _map(function, *lists):
    """Maps a function of kernels and the axes of their inputs over lists of kernels."""

    def together(*lists):
        rows = [[x.transpose(3, 0, 1, 2).reshape(x.shape[3], -1) for x in xs] for xs in lists]
        results = join_rows(lambda *xs: (function(*xs, axes=1),), *rows)
        shapes = [(x.shape[3], *x.shape[:3]) for x in lists[0]]
        return [
            y.reshape(shape).transpose(1, 2, 3, 0)
            for (y,), shape in zip(results, shapes, strict=True)
        ]

    return by_platform(
        "standardised kernels",
        *lists,
        default=together,
        cpu=lambda *lists: [function(*xs, axes=(0, 1, 2)) for xs in zip(*lists, strict=True)],
        shared=tuple(range(len(lists))),
    )


def _normalized(x, epsilon, axes):
    """Returns the standardised weights, and one over their deviation, in a wide type."""
    x = x.astype(softmax_dtype(x.dtype))
    x = x - x.mean(axes, keepdims=True)
    inverse = lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + epsilon)
    return x * inverse, inverse


def _standardize(x, epsilon, dtype, axes):
    return _normalized(x, epsilon, axes)[0].astype(dtype)


def _gradient(x, dy, epsilon, axes):
    y, inverse = _normalized(x, epsilon, axes)
    dy = dy.astype(y.dtype)
    slope = (dy * y).mean(axes, keepdims=True)
    return (inverse * (dy - dy.mean(axes, keepdims=True) - y * slope)).astype(x.dtype)
