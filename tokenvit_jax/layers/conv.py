"""Convolutions and BatchNorm."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tokenvit_jax import ops
from tokenvit_jax.layers.norm import BatchNorm
from tokenvit_jax.ops.batch_norm import SharedBy, affine_of, num_sharing, over_devices

# Kernels of convolutions: the usual choice with BatchNorm (He et al. 2015).
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Kernels of linear layers.
linear_init = nn.initializers.truncated_normal(0.02)
# The fan-out of a depthwise kernel is its nine entries.
depthwise_init = nn.initializers.normal((2 / 9) ** 0.5)


def uniform_init(fan_in: int) -> Callable[..., Any]:
    """Returns PyTorch's default initializer for kernels and biases: uniform in +-1 / sqrt(fan_in).

    Args:
      fan_in: number of inputs of an output.
    """
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Conv3x3(nn.Module):
    """3x3 convolution with bias and padding 1: (B, H, W, C) -> (B, H / stride, W / stride, dim).

    Sizes that the stride does not divide are rounded up.

    Attributes:
      dim: output channels.
      stride: stride in both directions.
      dtype: type of the computation.
    """

    dim: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w dim"]:
        strides, padding = (self.stride, self.stride), ((1, 1), (1, 1))
        return nn.Conv(
            self.dim, (3, 3), strides, padding, dtype=self.dtype, kernel_init=conv_init, name="conv"
        )(x)


class Conv(nn.Module):
    """k x k convolution with padding k // 2: (B, H, W, C) -> (B, H / stride, W / stride, dim).

    Sizes that the stride does not divide are rounded up. The parameters are those of `nn.Conv`. A
    1 x 1 convolution is a product of matrices.

    Attributes:
      dim: output channels.
      kernel_size: k, odd.
      use_bias: whether there is a bias.
      init: initializer of the kernel.
      dtype: type of the computation.
      stride: stride in both directions.
      bias_init: initializer of the bias.
    """

    dim: int
    kernel_size: int
    use_bias: bool = True
    init: Callable[..., Any] = conv_init
    dtype: Any = jnp.float32
    stride: int = 1
    bias_init: Callable[..., Any] = nn.initializers.zeros

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"] | Sequence[Float[Array, "B _ _ _"]],
        size: tuple[int, int] | None = None,
        align_corners: bool = False,
    ) -> Float[Array, "B h w dim"]:
        """Convolves a map, or maps that are resized and joined before (with stride 1).

        Args:
          x: map or, with ``size``, maps.
          size: height and width to which the maps are resized (bilinear).
          align_corners: as in :func:`~tokenvit_jax.ops.resize_bilinear`.
        """
        x = jax.tree.map(lambda x: x.astype(self.dtype), x)
        channels = x.shape[-1] if size is None else sum(y.shape[-1] for y in x)
        shape = (self.kernel_size, self.kernel_size, channels, self.dim)
        kernel = self.param("kernel", self.init, shape).astype(self.dtype)
        if size is not None:
            y = ops.conv_of_resized(tuple(x), kernel, size, align_corners)
        elif self.kernel_size == self.stride == 1:
            y = product(x, kernel[0, 0])
        else:
            y = ops.conv(x, kernel, self.stride)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.dim,))
            y = y + bias.astype(self.dtype)
        return y


class PatchConvTranspose(nn.Module):
    """Transposed convolution whose kernel is as wide as its stride: every cell becomes a patch.

    (B, H, W, C) -> (B, factor H, factor W, dim).

    Attributes:
      dim: output channels.
      factor: stride and side of the kernel.
      dtype: type of the computation.
      kernel_init: initializer of the kernel, with biases of 0; None: PyTorch's default for both.
    """

    dim: int
    factor: int
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w dim"]:
        batch, height, width, channels = x.shape
        k, default = self.factor, uniform_init(self.factor**2 * self.dim)  # PyTorch's fan
        kernel = self.param("kernel", self.kernel_init or default, (k, k, channels, self.dim))
        bias_init = nn.initializers.zeros if self.kernel_init else default
        bias = self.param("bias", bias_init, (self.dim,)).astype(self.dtype)
        kernel = kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
        y = product(x.astype(self.dtype), kernel).reshape(batch, height, width, k, k, self.dim)
        return y.swapaxes(2, 3).reshape(batch, k * height, k * width, self.dim) + bias


class ResidualConvUnit(nn.Module):
    """x + convolution(ReLU(convolution(ReLU(x)))), 3 x 3 with bias: (B, H, W, C) -> (B, H, W, C).

    Kernels and biases have PyTorch's default initialisation.

    Attributes:
      dtype: type of the computation.

    References:
      Lin et al. 2017, "RefineNet: Multi-Path Refinement Networks for High-Resolution Semantic
      Segmentation"; without BatchNorm as in Ranftl et al. 2021, "Vision Transformers for Dense
      Prediction".
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels, init = x.shape[-1], uniform_init(9 * x.shape[-1])
        y = x
        for name in ("conv1", "conv2"):
            conv = Conv(channels, 3, init=init, dtype=self.dtype, bias_init=init, name=name)
            y = conv(nn.relu(y))
        return x + y


class ConvModule(nn.Module):
    """Convolution, BatchNorm and ReLU: (B, H, W, C) -> (B, H, W, dim).

    With a ``size``, the input is a list of maps that are resized to it and joined.

    The running variance is PyTorch's: with one value per image, as in the smallest cells of
    pyramid pooling, it differs from flax's by a factor B / (B - 1).

    Attributes:
      dim: output channels.
      kernel_size: side of the kernel, odd.
      dtype: type of the computation.
      axis_name: devices that share statistics, see :class:`BatchNorm`.
    """

    dim: int
    kernel_size: int
    dtype: Any = jnp.float32
    axis_name: SharedBy = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"] | Sequence[Float[Array, "B _ _ _"]],
        train: bool,
        size: tuple[int, int] | None = None,
    ) -> Float[Array, "B h w dim"]:
        conv = Conv(self.dim, self.kernel_size, use_bias=False, dtype=self.dtype, name="conv")
        norm = BatchNorm(dtype=self.dtype, axis_name=self.axis_name, unbiased=True, name="norm")
        return nn.relu(norm(conv(x, size), use_running_average=not train))


class Weights(nn.Module):
    """Kernel and bias of a layer that is computed together with others.

    Attributes:
      shape: shape of the kernel; the last axis is that of the bias.
      init: initializer of the kernel.
      use_bias: whether there is a bias.
      bias_init: initializer of the bias.
    """

    shape: tuple[int, ...]
    init: Callable[..., Any]
    use_bias: bool = True
    bias_init: Callable[..., Any] = nn.initializers.zeros

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "..."], Float[Array, " C"] | None]:
        kernel = self.param("kernel", self.init, self.shape)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", self.bias_init, self.shape[-1:])


class FoldedBatchNorm(BatchNorm):
    """BatchNorm as factors and offsets of channels, which a neighbour takes along.

    It has the attributes, parameters and statistics of :class:`BatchNorm`; its type of the result
    is that of the parameters.
    """

    @nn.compact
    def __call__(
        self,
        sums: Float[Array, "2 C"] | None,
        channels: int,
        count: int,
        input_bias: Float[Array, " C"] | None = None,
        *,
        use_running_average: bool,
    ) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
        """Returns the factors and the offsets.

        Args:
          sums: sums of the values and of their squares (2, C) over the part of the batch on this
            device. Not used with the running averages.
          channels: C.
          count: number of values of a channel that were added.
          input_bias: bias of the normalized values, which neither the sums nor the values that are
            scaled contain. The statistics of a batch cancel it.
          use_running_average: whether the statistics are the running averages.
        """
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        shift = 0 if input_bias is None else input_bias
        if use_running_average:
            factor = lax.rsqrt(var.value + self.epsilon) * scale
            return factor, bias - (mean.value - shift) * factor
        if not self.is_initializing():
            sums = over_devices(sums, self.axis_name)
            count = count * num_sharing(self.axis_name)
        affine = affine_of(sums, count, scale, bias, self.epsilon)
        if not self.is_initializing():
            for average, value in ((mean, affine.mean + shift), (var, affine.var)):
                average.value = self.momentum * average.value + (1 - self.momentum) * value
        return affine.factor, affine.offset


def convolve_same(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k k C dim"], stride: int
) -> Float[Array, "B h w dim"]:
    """Convolves maps with TensorFlow's padding "SAME", in the type of ``x``.

    Args:
      x: (B, H, W, C).
      kernel: (k, k, C, dim).
      stride: stride in both directions; sizes that it does not divide are rounded up.
    """
    kernel = kernel.astype(x.dtype)
    if len(kernel) == stride == 1:
        return product(x, kernel[0, 0])
    padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), "SAME")
    return ops.conv_with_padding(x, kernel, stride, tuple(padding))


def product(x: Float[Array, "... C"], kernel: Float[Array, "C dim"]) -> Float[Array, "... dim"]:
    """Multiplies by a kernel in the type of ``x``."""
    return ops.linear_product(x, kernel.astype(x.dtype))


def affine_product(
    x: Float[Array, "... C"],
    kernel: Float[Array, "C dim"],
    bias: Float[Array, " dim"],
    factor: Float[Array, " C"],
    offset: Float[Array, " C"],
) -> tuple[Float[Array, "... dim"], Float[Array, " dim"]]:
    """Applies a linear layer to factor x + offset, all but a bias.

    Args:
      x: (..., C).
      kernel: (C, dim).
      bias: (dim,).
      factor: (C,).
      offset: (C,).

    Returns:
      The product (..., dim) in the type of ``x``, and the bias (dim,) that is still to be added.
    """
    pixels = x.size // x.shape[-1]
    if isinstance(pixels, int) and pixels < kernel.shape[1]:  # x is smaller than the kernel
        return product((x * factor + offset).astype(x.dtype), kernel), bias
    # The bias by a sum of products, not a product of matrices: it is small, and float32 everywhere.
    return product(x, factor[:, None] * kernel), bias + jnp.sum(offset[:, None] * kernel, 0)


def affine_products(
    xs: Sequence[Float[Array, "... C"]],
    kernels: Sequence[Float[Array, "C dim"]],
    biases: Sequence[Float[Array, " dim"]],
    factors: Sequence[Float[Array, " C"]],
    offsets: Sequence[Float[Array, " C"]],
) -> list[Float[Array, "... dim"]]:
    """Applies a linear layer to factor x + offset, for several x of one shape.

    The layers take their factors along together, because each operation on weights is a launch.

    Args:
      xs: n arrays (..., C).
      kernels: n kernels (C, dim).
      biases: n biases (dim,).
      factors: n factors (C,).
      offsets: n offsets (C,).

    Returns:
      n arrays (..., dim) in the type of ``xs``.
    """
    x, dim = xs[0], kernels[0].shape[1]
    pixels = x.size // x.shape[-1]
    if isinstance(pixels, int) and pixels < dim:  # each x is smaller than its kernel
        pairs = map(affine_product, xs, kernels, biases, factors, offsets)
        return [y + bias.astype(x.dtype) for y, bias in pairs]
    kernels, biases, factors, offsets = map(jnp.stack, (kernels, biases, factors, offsets))
    biases = biases + jnp.sum(offsets[..., None] * kernels, 1)
    kernels = factors[..., None] * kernels
    kernels, biases = kernels.astype(x.dtype), biases.astype(x.dtype)
    return [product(*args) + bias for *args, bias in zip(xs, kernels, biases, strict=True)]


def batch_norm(
    *, dtype: Any, axis_name: SharedBy, with_gelu: bool = False, name: str | None = None
) -> BatchNorm:
    """Returns BatchNorm.

    Args:
      dtype: type of the computation.
      axis_name: devices that share statistics, see :class:`BatchNorm`.
      with_gelu: whether GELU comes first.
      name: name of the module; None: linen chooses it.
    """
    return BatchNorm(dtype=dtype, axis_name=axis_name, with_gelu=with_gelu, name=name)
