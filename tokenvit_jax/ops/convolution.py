"""Convolutions, also of maps that are resized first."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from tokenvit_jax.kernels.platforms import by_platform, device_batch
from tokenvit_jax.ops.counted import counted
from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.ops.linear import linear_product
from tokenvit_jax.ops.resize import linear_weights, resize_bilinear, times_along

# From these numbers of pixels and channels on, products are faster than XLA's gradient on a CPU.
_MANY_PIXELS, _MANY_CHANNELS = 1024, 128


def conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k k C dim"], stride: int = 1
) -> Float[Array, "B h w dim"]:
    """Convolves maps that are padded with (k - 1) / 2 zeros on every side.

    The values and gradients are those of `lax.conv_general_dilated`. On a CPU, XLA's gradient of
    the kernel takes several times as long as the convolution; products of matrices do not.

    Args:
      x: (B, H, W, C).
      kernel: (k, k, C, dim), k odd, in the type of ``x``.
      stride: stride in both directions; sizes that it does not divide are rounded up.
    """
    pad = kernel.shape[0] // 2
    return conv_with_padding(x, kernel, stride, ((pad, pad), (pad, pad)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_with_padding(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "k k C dim"],
    stride: int,
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> Float[Array, "B h w dim"]:
    """Convolves maps that are padded with given numbers of zeros; see :func:`conv`.

    Args:
      x: (B, H, W, C).
      kernel: (k, k, C, dim), in the type of ``x``.
      stride: stride in both directions.
      padding: zeros above and below, left and right.
    """
    return _convolve(x, kernel, stride, padding)


def _convolve(x, kernel, stride, padding):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layout)


def _forward(x, kernel, stride, padding):
    return _convolve(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, residuals, dy):
    x, kernel = residuals
    (dx,) = jax.linear_transpose(lambda x: _convolve(x, kernel, stride, padding), x)(dy)

    def default(x, dy):  # as autodiff writes it
        of_kernel = functools.partial(_convolve, x, stride=stride, padding=padding)
        return jax.linear_transpose(of_kernel, kernel)(dy)[0]

    pixels = device_batch(x.shape[0]) * math.prod(dy.shape[1:3])
    if pixels < _MANY_PIXELS or min(kernel.shape[2:]) < _MANY_CHANNELS:
        return dx, default(x, dy)
    by_products = functools.partial(
        _by_products, side=kernel.shape[0], stride=stride, padding=padding
    )
    dkernel = by_platform("gradient of a convolution", x, dy, cpu=by_products, default=default)
    return dx, dkernel


conv_with_padding.defvjp(_forward, _backward)


def _by_products(x, dy, *, side, stride, padding):
    """Returns the gradient of the kernel, one product of matrices for each of its entries."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows = dy.reshape(-1, dy.shape[-1])
    reach = [stride * (length - 1) + 1 for length in dy.shape[1:3]]

    def entry(number):
        start = (0, number // side, number % side, 0)
        seen = lax.dynamic_slice(x, start, (x.shape[0], *reach, x.shape[-1]))
        seen = seen[:, ::stride, ::stride].reshape(-1, x.shape[-1])
        return lax.dot_general(seen, rows, (((0,), (0,)), ((), ())))

    # One after another: all of these slices would take several times the memory of the map.
    dkernel = lax.map(entry, jnp.arange(side * side))
    return dkernel.reshape(side, side, *dkernel.shape[1:])


def _macs_of_resized(inputs, outputs):
    return math.prod(outputs[0][:3]) * math.prod(inputs[-1])


@counted(_macs_of_resized, static_argnames=("size", "align_corners"))
def conv_of_resized(
    maps: Sequence[Float[Array, "B _ _ _"]],
    kernel: Float[Array, "k k D dim"],
    size: tuple[int, int],
    align_corners: bool = False,
) -> Float[Array, "B H W dim"]:
    """Resizes maps bilinearly, joins their channels and convolves them: `conv` of all of them.

    Resizing mixes pixels and the products of a convolution mix channels, so that they commute.
    Here the products come first, on the small maps; their sums are elementwise. For UperNet's last
    convolution, whose maps have 1, 1/2, 1/4 and 1/8 of the size, a third of the products is left.
    Compiled for an H200 (16 images, bfloat16, forward and backward), it takes 27 launches and
    moves the bytes of 3.0 ms instead of 19 and 2.9 ms; DPT's takes 9 and 1.0 ms instead of 8 and
    1.2 ms. The products are counted as if the maps were resized first.

    Args:
      maps: maps (B, h, w, C), each with its own size and channels; all have one type.
      kernel: (k, k, D, dim), k odd, D the sum of all channels, in the type of the maps.
      size: height H and width W of the result.
      align_corners: as in :func:`~tokenvit_jax.ops.resize_bilinear`.
    """
    ends = np.cumsum([x.shape[-1] for x in maps])
    kernels = jnp.split(kernel, ends[:-1], axis=2)
    small = [math.prod(x.shape[1:3]) < math.prod(size) for x in maps]
    pairs = list(zip(maps, kernels, small, strict=True))
    total = 0
    whole = [(resize_bilinear(x, size, align_corners), part) for x, part, few in pairs if not few]
    if whole:
        joined, parts = (
            jnp.concatenate(arrays, -1 - i) for i, arrays in enumerate(zip(*whole, strict=True))
        )
        total = conv(joined, parts).astype(softmax_dtype(kernel.dtype))
    for x, part, few in pairs:
        if few:
            total = total + _products_first(x, part, size, align_corners)
    return total.astype(kernel.dtype)


def _products_first(x, kernel, size, align_corners):
    """Returns the convolution of a resized map (B, H, W, dim), in float32 for narrower types."""
    side, _, channels, dim = kernel.shape
    products = linear_product(x, kernel.transpose(2, 0, 1, 3).reshape(channels, -1))
    products = products.reshape(*x.shape[:3], side, side, dim).astype(softmax_dtype(x.dtype))
    columns = _shifted_weights(x.shape[2], size[1], side, align_corners)
    products = _sum_along(products, columns, axis=2, entries=4)
    rows = _shifted_weights(x.shape[1], size[0], side, align_corners)
    return _sum_along(products, rows, axis=1, entries=3)


def _shifted_weights(old, new, side, align_corners):
    """Returns the weights of old places for every entry of a kernel and new place, in float64.

    Entry e of the kernel sees new place n + e - side // 2; beyond the border there are zeros.

    Returns:
      (new, side, old).
    """
    pad = side // 2
    weights = np.pad(linear_weights(old, new, align_corners), ((pad, pad), (0, 0)))
    return np.stack([weights[entry : entry + new] for entry in range(side)], 1)


def _sum_along(products, weights, axis, entries):
    """Returns y[n] = sum of weights[n, e, o] products[o, e] over entries e and old places o.

    Args:
      products: array with old places along `axis` and entries along the later axis `entries`.
      weights: (new, side, old).
      axis: becomes the axis of the new places.
      entries: axis that the sum removes.
    """
    new, side, old = weights.shape
    if new % old or new > old**2:  # or so few values that the matrix is small
        letters = "abcdefg"[: products.ndim]
        spec = f"z{letters[entries]}{letters[axis]},{letters}->"
        spec += letters.replace(letters[axis], "z").replace(letters[entries], "")
        matrix = jnp.asarray(weights, products.dtype)
        return jnp.einsum(spec, matrix, products, precision=lax.Precision.HIGHEST)
    # New places k j to k j + k - 1 see the old places j - reach to j + reach.
    weights = weights.reshape(old, new // old, side, old)
    place, _, _, seen = np.nonzero(weights)
    reach = np.max(np.abs(place - seen))
    weights = np.pad(weights, ((0, 0), (0, 0), (0, 0), (reach, reach)))
    padding = [(0, 0)] * (products.ndim - 1)
    padding[axis] = (reach, reach)
    terms = [[] for _ in range(new // old)]
    for entry in range(side):
        part = jnp.pad(lax.index_in_dim(products, entry, entries, keepdims=False), padding)
        for start in range(2 * reach + 1):
            near = lax.slice_in_dim(part, start, start + old, axis=axis)
            shares = np.stack([weights[j, :, entry, j + start] for j in range(old)], 1)
            for phase, share in enumerate(shares):
                if share.any():
                    terms[phase].append(times_along(share, near, axis))
    phases = [sum(some) for some in terms]
    shape = list(phases[0].shape)
    shape[axis] = new
    return jnp.stack(phases, axis + 1).reshape(shape)
