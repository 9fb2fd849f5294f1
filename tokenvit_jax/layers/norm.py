"""LayerNorm, also together with a residual sum, GroupNorm, and BatchNorm."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float

from tokenvit_jax import ops
from tokenvit_jax.ops.batch_norm import SharedBy, global_count


class LayerNorm(nn.Module):
    """LayerNorm with statistics in float32, like `nn.LayerNorm`: (..., C) -> (..., C).

    Attributes:
      epsilon: constant added to the variance.
      dtype: type of the result.
      scale_init: initializer of the scale.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        scale, bias = _scale_and_bias(self, x.shape[-1])
        return ops.layer_norm(x, scale, bias, epsilon=self.epsilon, dtype=self.dtype)


class AddLayerNorm(nn.Module):
    """Residual sum and its LayerNorm: x, branch -> x + branch, LN(x + branch).

    The branch of each image can have a factor, that of stochastic depth. The parameters are those
    of :class:`LayerNorm`. On GPUs, one kernel computes both, and in the backward pass one kernel
    adds the gradients of both.

    Attributes:
      epsilon: constant added to the variance.
      dtype: type of the normalized result.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*B C"],
        branch: Float[Array, "*B C"] | None = None,
        factors: Float[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "*B C"], Float[Array, "*B C"]]:
        scale, bias = _scale_and_bias(self, x.shape[-1])
        return ops.add_layer_norm(
            x, branch, scale, bias, epsilon=self.epsilon, dtype=self.dtype, factors=factors
        )


class GroupNorm(nn.Module):
    """GroupNorm with statistics in float32, like `nn.GroupNorm`: (B, ..., C) -> (B, ..., C).

    Attributes:
      num_groups: number of groups of neighbouring channels.
      epsilon: constant added to the variance.
      dtype: type of the result.
      scale_init: initializer of the scale.
    """

    num_groups: int
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Float[Array, "B *M C"]) -> Float[Array, "B *M C"]:
        scale, bias = _scale_and_bias(self, x.shape[-1])
        return ops.group_norm(
            x, scale, bias, num_groups=self.num_groups, epsilon=self.epsilon, dtype=self.dtype
        )


class BatchNorm(nn.Module):
    """BatchNorm, optionally of GELU(x): (..., C) -> (..., C).

    Parameters and collection "batch_stats" are those of `nn.BatchNorm`.

    Attributes:
      momentum: weight of the old running statistics.
      epsilon: constant added to the variance.
      dtype: type of the result.
      axis_name: mapped axis or axes whose devices share statistics, or groups of these devices,
        which then have running statistics of their own; None: one device.
      with_gelu: whether GELU(x) is normalized instead of x.
      unbiased: whether the running variance is an average of n / (n - 1) times the variance of a
        batch of n values, as in PyTorch, instead of the variance itself.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    axis_name: SharedBy = None
    with_gelu: bool = False
    unbiased: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"], use_running_average: bool) -> Float[Array, "*B C"]:
        channels = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        scale, bias = _scale_and_bias(self, x.shape[-1])
        if use_running_average:
            x = ops.gelu(x) if self.with_gelu else x
            factor = jax.lax.rsqrt(running_var.value + self.epsilon) * scale
            return ((x - running_mean.value) * factor + bias).astype(self.dtype)
        y, mean, var = ops.batch_norm(
            x,
            scale,
            bias,
            epsilon=self.epsilon,
            dtype=self.dtype,
            axis_name=None if self.is_initializing() else self.axis_name,
            with_gelu=self.with_gelu,
        )
        if not self.is_initializing():
            if self.unbiased:
                count = global_count(x, self.axis_name)
                var = var * (count / max(count - 1, 1))
            for running, new in ((running_mean, mean), (running_var, var)):
                running.value = self.momentum * running.value + (1 - self.momentum) * new
        return y


def _scale_and_bias(module, channels):
    init = getattr(module, "scale_init", nn.initializers.ones)
    scale = module.param("scale", init, (channels,))
    return scale, module.param("bias", nn.initializers.zeros, (channels,))
