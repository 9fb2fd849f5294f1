"""Depthwise convolution and the gradient of its kernel, in forms for different machines."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tokenvit_jax.ops.dtypes import softmax_dtype

# Rows of a register of a TPU. XLA's convolution lays images along them; it multiplies float32 in
# parts, and shifted products do not.
_SUBLANES = 8


def convolve_by_shifts(
    x: Float[Array, "B H W C"], kernel: Float[Array, "rows columns C"]
) -> Float[Array, "B H W C"]:
    """Adds up shifted maps, each multiplied by a kernel entry, which XLA fuses into one loop."""
    dtype = softmax_dtype(x.dtype)
    taps = _taps(x, kernel.shape)
    total = sum(
        tap.astype(dtype) * kernel[i, j].astype(dtype)
        for i, row in enumerate(taps)
        for j, tap in enumerate(row)
    )
    return total.astype(x.dtype)


def convolve_by_library(
    x: Float[Array, "B H W C"], kernel: Float[Array, "rows columns C"]
) -> Float[Array, "B H W C"]:
    """Convolves by XLA's convolution with one feature group per channel."""
    return lax.conv_general_dilated(
        x, kernel[:, :, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )  # fmt: skip


def kernel_gradient_by_library(
    x: Float[Array, "B H W C"], dy: Float[Array, "B H W C"], shape: tuple[int, int, int]
) -> Float[Array, "rows columns C"]:
    """Computes the gradient of :func:`convolve_by_library`.

    Args:
      x: (B, H, W, C).
      dy: gradient of the output (B, H, W, C).
      shape: shape of the kernel (rows, columns, C).
    """
    kernel = jax.ShapeDtypeStruct(shape, x.dtype)
    (dkernel,) = jax.linear_transpose(lambda k: convolve_by_library(x, k), kernel)(dy)
    return dkernel.astype(softmax_dtype(x.dtype))


def kernel_gradient_by_sums(
    x: Float[Array, "B H W C"], dy: Float[Array, "B H W C"], shape: tuple[int, int, int]
) -> Float[Array, "rows columns C"]:
    """Sums products with shifted maps, which XLA reads once for all entries.

    The arguments are the same as in :func:`kernel_gradient_by_library`.
    """
    dtype = softmax_dtype(x.dtype)
    dy = dy.astype(dtype)
    return jnp.stack(
        [
            jnp.stack([jnp.sum(tap.astype(dtype) * dy, (0, 1, 2)) for tap in row])
            for row in _taps(x, shape)
        ]
    )


def kernel_gradient_by_lines(
    x: Float[Array, "B H W C"], dy: Float[Array, "B H W C"], shape: tuple[int, int, int]
) -> Float[Array, "rows columns C"]:
    """Adds up image rows element by element and reduces once at the end.

    A reduction over all but the last axis is a strided scalar loop in XLA's CPU backend; adding
    rows is a vector loop, measured up to 10 times faster. The arguments are the same as in
    :func:`kernel_gradient_by_library`.
    """
    dtype = softmax_dtype(x.dtype)
    batch, height, width, channels = x.shape
    rows, columns, _ = shape
    padded = _pad(x, shape)

    def add_row(sums, row):
        dy_row = lax.dynamic_index_in_dim(dy, row, 1, keepdims=False).astype(dtype)
        for i in range(rows):
            x_row = lax.dynamic_index_in_dim(padded, row + i, 1, keepdims=False).astype(dtype)
            for j in range(columns):
                sums[i][j] = sums[i][j] + x_row[:, j : j + width] * dy_row
        return sums, None

    zeros = jnp.zeros((batch, width, channels), dtype)
    sums, _ = lax.scan(add_row, [[zeros] * columns for _ in range(rows)], jnp.arange(height))
    return jnp.stack([jnp.stack([s.sum((0, 1)) for s in row]) for row in sums])


def convolve_on_tpu(
    x: Float[Array, "B H W C"], kernel: Float[Array, "rows columns C"]
) -> Float[Array, "B H W C"]:
    """Convolves by the library where it is exact and images fill the registers, else by shifts."""
    by_library = x.dtype.itemsize == 2 and x.shape[0] >= _SUBLANES
    return (convolve_by_library if by_library else convolve_by_shifts)(x, kernel)


def kernel_gradient_on_tpu(
    x: Float[Array, "B H W C"], dy: Float[Array, "B H W C"], shape: tuple[int, int, int]
) -> Float[Array, "rows columns C"]:
    """Computes the gradient of the kernel by the library where it is exact, else by sums.

    The arguments are the same as in :func:`kernel_gradient_by_library`.
    """
    form = kernel_gradient_by_library if x.dtype.itemsize == 2 else kernel_gradient_by_sums
    return form(x, dy, shape)


def _taps(x, kernel_shape):
    """Returns the views of the padded ``x`` that the kernel's entries multiply, row by row."""
    height, width = x.shape[1:3]
    rows, columns, _ = kernel_shape
    padded = _pad(x, kernel_shape)
    return [[padded[:, i : i + height, j : j + width] for j in range(columns)] for i in range(rows)]


def _pad(x, kernel_shape):
    rows, columns, _ = kernel_shape
    return jnp.pad(x, ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0)))
