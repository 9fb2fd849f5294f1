"""Depthwise convolution, also together with what surrounds it in feed-forward networks."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tokenvit_jax.kernels import channel_sums
from tokenvit_jax.kernels import depthwise_block as block_kernels
from tokenvit_jax.kernels.depthwise_block import Block
from tokenvit_jax.kernels.depthwise_conv import (
    convolve_by_library,
    convolve_by_shifts,
    convolve_on_tpu,
    kernel_gradient_by_library,
    kernel_gradient_by_lines,
    kernel_gradient_on_tpu,
)
from tokenvit_jax.kernels.platforms import by_platform
from tokenvit_jax.ops.channel_affine import per_device
from tokenvit_jax.ops.counted import counted
from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.ops.gelu import gelu, gelu_and_slope, gelu_gradient, with_sums_gradient


def _macs(inputs, outputs):
    (batch, height, width, channels), (rows, columns, _) = inputs[:2]
    return batch * height * width * channels * rows * columns


@counted(_macs)
def depthwise_conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "rows columns C"]
) -> Float[Array, "B H W C"]:
    """Convolves every channel with its own kernel (stride 1, zero padding, same size).

    On CPU, XLA fuses a sum of shifted products into one loop, whose forward pass was measured 9 to
    25 times faster than ``lax.conv_general_dilated`` with feature groups (`benchmark
    --op=depthwise_conv`). On an H100 the latter was measured 1.5 to 3.7 times faster, and 2.6 to
    4.5 times with the backward pass (docs/benchmarks/gpu_forms.md).

    Args:
      x: (B, H, W, C).
      kernel: (rows, columns, C), both odd.

    Returns:
      (B, H, W, C) in the type of ``x``.

    Raises:
      ValueError: the kernel has an even size, or other channels than ``x``.
    """
    _check(x, kernel)
    return _block(Block(), x, kernel, None, None, None, None)[0]


@counted(_macs, ("deferred", "residual", "activate", "with_sums"))
def depthwise_block(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "rows columns C"],
    bias: Float[Array, " C"] | None = None,
    *,
    input_bias: Float[Array, " C"] | None = None,
    scale: Float[Array, " C"] | None = None,
    shift: Float[Array, " C"] | None = None,
    deferred: bool = False,
    residual: bool = False,
    activate: bool = False,
    with_sums: bool = False,
) -> tuple[Float[Array, "B H W C"], Float[Array, "2 C"] | None]:
    """Convolves every channel, together with the operations in front of and after it.

    Computes u = scale (x + input_bias) + shift and y = u + conv(u) + bias, where only what is given
    takes part, so that each map goes through memory once.

    Args:
      x: (B, H, W, C).
      kernel: (rows, columns, C), both odd.
      bias: (C,), added to the output.
      input_bias: (C,), added to the input.
      scale: (C,), factor of the input.
      shift: (C,), added to the scaled input. The map is padded with zeros after that.
      deferred: whether ``x`` is a result of :func:`defer_gelu` with the same ``input_bias``: u is
        computed from gelu(x + input_bias).
      residual: whether u is added to the output.
      activate: whether the result is gelu(y) instead of y.
      with_sums: whether the sums are returned.

    Returns:
      (B, H, W, C) in the type of ``x``; and the sums of the result and of its square over the
      batch (2, C) in float32 (float64 for float64), or None.

    Raises:
      ValueError: the kernel has an even size, or other channels than ``x``.
    """
    _check(x, kernel)
    block = Block(deferred, residual, activate, with_sums)
    return _block(block, x, kernel, bias, input_bias, scale, shift)


def _macs_of_branches(inputs, outputs):
    return (len(inputs) - 1) * _macs(inputs, outputs)


@counted(_macs_of_branches, ("with_sums",))
def depthwise_branches(
    x: Float[Array, "B H W C"],
    kernels: tuple[Float[Array, "rows columns C"], ...],
    *,
    with_sums: bool = False,
) -> tuple[tuple[Float[Array, "B H W C"], ...], Float[Array, "n 2 C"] | None]:
    """Convolves every channel with its own kernel, several times side by side.

    Args:
      x: (B, H, W, C).
      kernels: n kernels (rows, columns, C) of one shape, with odd sizes.
      with_sums: whether the sums are returned.

    Returns:
      n maps (B, H, W, C) in the type of ``x``; and the sums of each and of its square over the
      batch (n, 2, C) in float32 (float64 for float64), or None.

    Raises:
      ValueError: there is no kernel, or the kernels have an even size, different sizes, or other
        channels than ``x``.
    """
    for kernel in kernels:
        _check(x, kernel)
    if not kernels:
        raise ValueError("kernels is empty; valid: at least one kernel")
    if len({kernel.shape for kernel in kernels}) > 1:
        shapes = ", ".join(str(kernel.shape) for kernel in kernels)
        raise ValueError(f"kernels have shapes {shapes}; valid: kernels of one shape")
    return _branches(with_sums, x, jnp.stack(kernels))


@functools.partial(jax.jit, static_argnames="with_sums")
def defer_gelu(
    x: Float[Array, "B H W C"], bias: Float[Array, " C"], *, with_sums: bool = False
) -> tuple[Float[Array, "B H W C"], Float[Array, "2 C"] | None]:
    """Defers gelu(x + bias) to the :func:`depthwise_block` that reads it.

    The activated map never goes through memory. The result stands for it: its value is ``x``, and
    its gradient is that of gelu(x + bias).

    Args:
      x: (B, H, W, C).
      bias: (C,).
      with_sums: whether the sums are returned.

    Returns:
      ``x``, for `depthwise_block(..., input_bias=bias, deferred=True)` only; and the sums of
      gelu(x + bias) and of its square over the batch (2, C) in float32 (float64 for float64), or
      None.
    """
    return _defer_gelu(with_sums, x, bias)


def _check(x, kernel):
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}; expected (batch, height, width, channels)")
    if kernel.ndim != 3 or kernel.shape[2] != x.shape[3]:
        raise ValueError(
            f"kernel has shape {kernel.shape}; expected (rows, columns, {x.shape[3]}) for x of "
            f"shape {x.shape}"
        )
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(f"kernel has shape {kernel.shape}; rows and columns must be odd")


# ------------------------------------------------------------------------------------------------
# Choice of forms, and gradients
# ------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(block, *arrays):
    y, _, sums = _run_block(block, *arrays, differentiable=False)
    return y, sums


def _block_forward(block, *arrays):
    y, z, sums = _run_block(block, *arrays, differentiable=True)
    z = y if block.with_sums and not block.activate else z
    x, *vectors = arrays
    return (y, sums), (x, z, *vectors)


def _run_block(block, x, kernel, bias, input_bias, scale, shift, *, differentiable):
    """Returns the result, what is in front of its activation if a gradient needs it, and sums."""
    options = {"block": block, "differentiable": differentiable}
    form = functools.partial(_forward_by_xla, **options)
    y, z, sums = by_platform(
        "depthwise block", x, kernel, bias, input_bias, scale, shift,
        cpu=functools.partial(form, convolve=convolve_by_shifts, store=_stored),
        default=functools.partial(form, convolve=convolve_by_library),
        tpu=functools.partial(form, convolve=convolve_on_tpu),
        cuda=functools.partial(block_kernels.block_forward, **options),
        misfits={"cuda": block_kernels.misfit(x.shape, kernel.shape)},
        shared=(1, 2, 3, 4, 5),
    )  # fmt: skip
    return y, z, None if sums is None else sums.sum(0)


def _block_backward(block, residuals, cotangents):
    x, z, kernel, bias, input_bias, scale, shift = residuals
    dy, dsums = cotangents
    form = functools.partial(_backward_by_xla, block=block)
    dg, sums = by_platform(
        "depthwise block gradient", dy, dsums, x, z, kernel, input_bias, scale, shift,
        cpu=functools.partial(form, convolve_by_shifts, kernel_gradient_by_lines),
        default=functools.partial(form, convolve_by_library, kernel_gradient_by_library),
        tpu=functools.partial(form, convolve_on_tpu, kernel_gradient_on_tpu),
        cuda=functools.partial(block_kernels.block_backward, block=block),
        misfits={"cuda": block_kernels.misfit(x.shape, kernel.shape)},
        shared=(1, 4, 5, 6, 7),
    )  # fmt: skip
    sums = sums.sum(0)
    dkernel, (dbias, dshift, dscale) = sums[:-3].reshape(kernel.shape), sums[-3:]
    # The operator that deferred the activation has the gradient of its bias.
    dinput_bias = jnp.zeros_like(dshift) if block.deferred else dshift
    if scale is not None and not block.deferred:
        dinput_bias = dinput_bias * scale
    vectors = (dkernel, dbias, dinput_bias, dscale, dshift)
    given = (kernel, bias, input_bias, scale, shift)
    return dg, *(
        None if x is None else dx.astype(x.dtype) for dx, x in zip(vectors, given, strict=True)
    )


_block.defvjp(_block_forward, _block_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _branches(with_sums, x, kernels):
    return _branches_forward(with_sums, x, kernels)[0]


def _branches_forward(with_sums, x, kernels):
    form = functools.partial(_branches_by_xla, block=Block(with_sums=with_sums))
    ys, sums = by_platform(
        "depthwise branches", x, kernels,
        cpu=functools.partial(form, convolve=convolve_by_shifts),
        default=functools.partial(form, convolve=convolve_by_library),
        tpu=functools.partial(form, convolve=convolve_on_tpu),
        cuda=functools.partial(block_kernels.branches_forward, with_sums=with_sums),
        misfits={"cuda": block_kernels.misfit(x.shape, kernels.shape[1:])},
        shared=(1,),
    )  # fmt: skip
    return (tuple(ys), None if sums is None else sums.sum(0)), (x, ys, kernels)


def _branches_backward(with_sums, residuals, cotangents):
    x, ys, kernels = residuals
    dys, dsums = cotangents
    block = Block(with_sums=with_sums)
    gradients = []
    for i, (y, dy) in enumerate(zip(ys, dys, strict=True)):
        own = x, y if with_sums else None, kernels[i], *[None] * 4
        sums = dsums[i] if with_sums else None
        gradients.append(_block_backward(block, own, (dy, sums))[:2])
    dxs, dkernels = zip(*gradients, strict=True)
    return sum(dxs), jnp.stack(dkernels)


_branches.defvjp(_branches_forward, _branches_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _defer_gelu(with_sums, x, bias):
    return _defer_gelu_forward(with_sums, x, bias)[0]


def _defer_gelu_forward(with_sums, x, bias):
    if not with_sums:
        return (x, None), (x, bias)
    sums = by_platform(
        "sums of gelu", x, bias, default=_gelu_sums_by_xla, cuda=channel_sums.gelu_sums,
        misfits={"cuda": channel_sums.misfit(x.shape)}, shared=(1,),
    )  # fmt: skip
    return (x, sums.sum(0)), (x, bias)


def _defer_gelu_backward(with_sums, residuals, cotangents):
    del with_sums
    return gelu_gradient(*cotangents, *residuals)


_defer_gelu.defvjp(_defer_gelu_forward, _defer_gelu_backward)


# ------------------------------------------------------------------------------------------------
# Forms in XLA's operations
# ------------------------------------------------------------------------------------------------


def _forward_by_xla(
    x, kernel, bias, input_bias, scale, shift, *, block, differentiable, convolve,
    store=lambda y: y,
):  # fmt: skip
    u = _input(x, input_bias, scale, shift, block.deferred)[0]
    z = convolve(u, kernel.astype(x.dtype))
    z = z if bias is None else z + bias.astype(x.dtype)
    z = u + z if block.residual else z
    y = store(gelu(z)) if block.activate else z
    sums = per_device(_sums_of_squares(y)) if block.with_sums else None
    return y, z if block.activate and differentiable else None, sums


def _branches_by_xla(x, kernels, *, block, convolve):
    convolved = functools.partial(
        _forward_by_xla, block=block, differentiable=False, convolve=convolve
    )
    found = [convolved(x, kernel, *[None] * 4) for kernel in kernels]
    ys, _, sums = zip(*found, strict=True)
    return list(ys), jnp.stack(sums, 1) if block.with_sums else None


def _stored(y):
    """Returns ``y``, which XLA does not take along into the product of a linear layer on a CPU.

    The loop that adds up the shifted products would end up there in pieces that each go through
    memory. Rounding to the precision that ``y`` has changes nothing, but is no part of products.
    """
    precision = jnp.finfo(y.dtype)
    return lax.reduce_precision(y, precision.nexp, precision.nmant)


def _backward_by_xla(
    convolve, kernel_gradient, dy, dsums, x, z, kernel, input_bias, scale, shift, *, block
):
    dz = dy
    if block.keeps_output:
        z = lax.optimization_barrier(z)
        y, slope = gelu_and_slope(z) if block.activate else (z, 1)
        dz = (with_sums_gradient(dy, dsums, y) * slope).astype(x.dtype)
        dz = lax.optimization_barrier(dz)
    u, g = _input(x, input_bias, scale, shift, block.deferred)
    du = convolve(dz, kernel[::-1, ::-1].astype(x.dtype))  # the transpose
    du = dz + du if block.residual else du
    dkernel = kernel_gradient(u, dz, kernel.shape)
    sums = jnp.stack([_sum(dz), _sum(du), _sum(du.astype(dkernel.dtype) * g)])
    sums = jnp.concatenate([dkernel.reshape(-1, x.shape[-1]), sums])
    return (du if scale is None else (du * scale).astype(x.dtype)), per_device(sums)


def _gelu_sums_by_xla(x, bias):
    return per_device(_sums_of_squares(gelu(_wide(x) + bias)))


def _input(x, bias, scale, shift, deferred):
    """Returns the input of the convolution, in the type of x, and what its scale multiplies."""
    g = x if bias is None else _wide(x) + bias
    g = gelu(g) if deferred else g
    u = g if scale is None else _wide(g) * scale
    u = u if shift is None else _wide(u) + shift
    # The convolution reads its input once per entry: compute it once.
    return (x if u is x else lax.optimization_barrier(u.astype(x.dtype))), g


def _sums_of_squares(y):
    y = _wide(y)
    return jnp.stack([_sum(y), _sum(y * y)])


def _sum(x):
    return jnp.sum(_wide(x), (0, 1, 2))


def _wide(x):
    return x.astype(softmax_dtype(x.dtype))
