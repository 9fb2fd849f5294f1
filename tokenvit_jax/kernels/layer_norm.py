"""LayerNorm on a GPU: one launch forward, one backward, both of which read the tokens once.

A program normalises a block of tokens with all channels in registers. In the backward pass a
program goes through many blocks and keeps the sums for the gradients of scale and bias.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tokenvit_jax.kernels.arithmetic import fma, maximum
from tokenvit_jax.kernels.pieces import range_of

_MAX_CHANNELS = 2048
_VALUES = 2048  # of a block of tokens: 16 in each thread
_WARPS = 4
_PROGRAMS = 512  # in the backward pass, each with its sums over tokens


def layer_norm_misfit(x: Float[Array, "*B C"]) -> str | None:
    """Returns why the kernels cannot take these tokens, or None."""
    if x.ndim < 2:
        return "there is no batch axis"
    if x.shape[-1] > _MAX_CHANNELS:
        return f"{x.shape[-1]} channels are more than {_MAX_CHANNELS}"
    if isinstance(x.shape[0], int) and x.size > 2**31 - 1 - _VALUES:
        return "the array has more than 2^31 values"
    return None


def forward_pass(
    x: Float[Array, "*B C"],
    branch: Float[Array, "*B C"] | None,
    factors: Float[Array, " B"] | None,
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *,
    epsilon: float,
    dtype: DTypeLike,
    interpret: bool = False,
) -> tuple[
    Float[Array, "*B C"] | None, Float[Array, "*B C"], Float[Array, "*B"], Float[Array, "*B"]
]:
    """Returns x + factors branch or None, its LayerNorm, and mean and 1 / deviation.

    Args:
      x: (..., C).
      branch: (..., C); None: nothing is added, and the sum is not returned.
      factors: (B,), factor of the branch of each image; None: 1.
      scale: (C,).
      bias: (C,).
      epsilon: constant added to the variance.
      dtype: type of the normalised result.
      interpret: whether to interpret the kernel, for tests.
    """
    *leading, channels = x.shape
    tokens = x.size // channels
    tiling = _Tiling(tokens, channels)
    adds = branch is not None
    flat = (tokens, channels)
    inputs = {"x": x.reshape(flat)}
    if adds:
        inputs["branch"] = branch.reshape(flat)
    if factors is not None:
        inputs["factors"] = factors
    results = [jax.ShapeDtypeStruct(flat, x.dtype)] * adds + [
        jax.ShapeDtypeStruct(flat, dtype),
        jax.ShapeDtypeStruct((tokens,), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.float32),
    ]
    *total, y, mean, inverse = pl.pallas_call(
        functools.partial(
            _forward_kernel, names=(*inputs,), tiling=tiling, per_image=tokens // x.shape[0],
            epsilon=epsilon,
        ),
        grid=(tiling.num_blocks,),
        out_shape=results,
        compiler_params=plt.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="layer_norm",
    )(*inputs.values(), scale, bias)  # fmt: skip
    total = total[0].reshape(x.shape) if adds else None
    return total, y.reshape(x.shape), mean.reshape(leading), inverse.reshape(leading)


def backward_pass(
    x: Float[Array, "*B C"],
    dy: Float[Array, "*B C"],
    dtotal: Float[Array, "*B C"] | None,
    factors: Float[Array, " B"] | None,
    scale: Float[Array, " C"],
    mean: Float[Array, "*B"],
    inverse: Float[Array, "*B"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "*B C"], Float[Array, "*B C"] | None, Float[Array, "1 2 C"]]:
    """Returns the gradients of x, of the branch (None without factors), and of scale and bias.

    Args:
      x: (..., C), the tokens that were normalised.
      dy: (..., C), gradient of the normalised tokens.
      dtotal: (..., C), added to the gradient of x; None: zeros.
      factors: (B,), factor of the branch of each image, or None.
      scale: (C,).
      mean: (...,), mean of each token.
      inverse: (...,), 1 / deviation of each token.
      interpret: whether to interpret the kernel, for tests.
    """
    channels = x.shape[-1]
    tokens = x.size // channels
    tiling = _Tiling(tokens, channels)
    programs = min(_PROGRAMS, tiling.num_blocks)
    flat = (tokens, channels)
    inputs = {
        "x": x.reshape(flat),
        "scale": scale,
        "mean": mean.reshape(tokens),
        "inverse": inverse.reshape(tokens),
        "dy": dy.reshape(flat),
        "dtotal": None if dtotal is None else dtotal.reshape(flat),
        "factors": factors,
    }
    inputs = {name: value for name, value in inputs.items() if value is not None}
    maps = [jax.ShapeDtypeStruct(flat, x.dtype)] * (1 if factors is None else 2)
    dx, *dbranch, sums = pl.pallas_call(
        functools.partial(
            _backward_kernel, names=(*inputs,), programs=programs, tiling=tiling,
            per_image=tokens // x.shape[0],
        ),
        grid=(programs,),
        out_shape=[*maps, jax.ShapeDtypeStruct((programs, 2, channels), jnp.float32)],
        compiler_params=plt.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="layer_norm_gradient",
    )(*inputs.values())  # fmt: skip
    dbranch = dbranch[0].reshape(x.shape) if dbranch else None
    return dx.reshape(x.shape), dbranch, sums.sum(0, keepdims=True)


class _Tiling:
    """Blocks of tokens with all channels, padded to powers of two."""

    def __init__(self, tokens, channels):
        self.tokens, self.channels = tokens, channels
        self.width = pl.next_power_of_2(channels)
        self.height = max(1, _VALUES // self.width)
        self.num_blocks = pl.cdiv(tokens, self.height)

    def block(self, number):
        """Returns the slices of a block, its mask, and the mask of its tokens."""
        first = number * self.height
        rows = range_of(first, self.height) < self.tokens
        columns = range_of(0, self.width) < self.channels
        slices = pl.ds(first, self.height), self.all_channels(number)
        return slices, rows[:, None] & columns[None], rows

    def all_channels(self, number):
        """Returns the slice of the padded channels, from a number that is not known in advance.

        jax 0.12 refuses a masked slice that begins at a known place and ends behind an array.
        """
        return pl.ds(0 * number, self.width)

    def vector(self, ref, number):
        """Reads a vector of all channels."""
        mask = range_of(0, self.width) < self.channels
        values = plt.load(ref.at[self.all_channels(number)], mask=mask, other=0)
        return values.astype(jnp.float32)

    def of_images(self, ref, number, per_image):
        """Reads the factor of the image of each token of a block (tokens, 1)."""
        token = range_of(number * self.height, self.height)
        factors = plt.load(ref.at[token // per_image], mask=token < self.tokens, other=0)
        return factors.astype(jnp.float32)[:, None]


def _forward_kernel(*refs, names, tiling, per_image, epsilon):
    inputs, refs = dict(zip(names, refs, strict=False)), refs[len(names) :]
    scale_ref, bias_ref, *total_ref, y_ref, mean_ref, inverse_ref = refs
    program = pl.program_id(0)
    slices, mask, rows = tiling.block(program)
    x = plt.load(inputs["x"].at[slices], mask=mask, other=0)
    if "branch" in inputs:
        branch = plt.load(inputs["branch"].at[slices], mask=mask, other=0)
        if "factors" in inputs:
            factors = tiling.of_images(inputs["factors"], program, per_image)
            x = fma(branch.astype(jnp.float32), factors, x.astype(jnp.float32)).astype(x.dtype)
        else:
            x = x + branch
        plt.store(total_ref[0].at[slices], x, mask=mask)
    x = x.astype(jnp.float32)  # padded with zeros, which change no sum
    mean = jnp.sum(x, 1) * (1 / tiling.channels)
    var = maximum(0.0, jnp.sum(x * x, 1) * (1 / tiling.channels) - mean * mean)
    inverse = lax.rsqrt(var + epsilon)
    factor = inverse[:, None] * tiling.vector(scale_ref, program)[None]
    y = fma(x - mean[:, None], factor, tiling.vector(bias_ref, program)[None])
    plt.store(y_ref.at[slices], y.astype(y_ref.dtype), mask=mask)
    plt.store(mean_ref.at[slices[0]], mean, mask=rows)
    plt.store(inverse_ref.at[slices[0]], inverse, mask=rows)


def _backward_kernel(*refs, names, programs, tiling, per_image):
    inputs = dict(zip(names, refs, strict=False))
    dx_ref, *dbranch_ref, sums_ref = refs[len(names) :]
    program = pl.program_id(0)
    scale = tiling.vector(inputs["scale"], program)[None]

    def block(step, sums):
        number = program + step * programs
        slices, mask, rows = tiling.block(number)

        def tokens(name):
            return plt.load(inputs[name].at[slices], mask=mask, other=0).astype(jnp.float32)

        mean, inverse = (
            plt.load(inputs[name].at[slices[0]], mask=rows, other=0)[:, None]
            for name in ("mean", "inverse")
        )
        x, dy = tokens("x"), tokens("dy")
        normed = (x - mean) * inverse  # dy is 0 where this is padding
        scaled = dy * scale
        of_mean = jnp.sum(scaled, 1, keepdims=True) * (1 / tiling.channels)
        of_normed = jnp.sum(scaled * normed, 1, keepdims=True) * (1 / tiling.channels)
        dx = inverse * fma(normed, -of_normed, scaled - of_mean)
        dx = dx + tokens("dtotal") if "dtotal" in inputs else dx
        plt.store(dx_ref.at[slices], dx.astype(dx_ref.dtype), mask=mask)
        for ref in dbranch_ref:
            dbranch = dx * tiling.of_images(inputs["factors"], number, per_image)
            plt.store(ref.at[slices], dbranch.astype(ref.dtype), mask=mask)
        return fma(dy, normed, sums[0]), sums[1] + dy

    steps = pl.cdiv(tiling.num_blocks, programs)
    zeros = jnp.zeros((tiling.height, tiling.width), jnp.float32)
    sums = lax.fori_loop(0, steps, block, (zeros, zeros))
    mask = range_of(0, tiling.width) < tiling.channels
    for number, parts in enumerate(sums):
        place = pl.ds(program, 1), pl.ds(number, 1), tiling.all_channels(program)
        plt.store(sums_ref.at[place], jnp.sum(parts, 0)[None, None], mask=mask[None, None])
