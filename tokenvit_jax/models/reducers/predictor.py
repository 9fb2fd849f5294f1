"""DynamicViT's prediction of the patches that stay (Rao et al. 2021), and its training."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, Int32

from tokenvit_jax.layers import LayerNorm, dense, gelu
from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.ops.gather import take
from tokenvit_jax.ops.precise_product import precise_product
from tokenvit_jax.ops.selection import smallest

# Weight in attention of a patch that a predictor dropped in training. Above 0, so that its
# probability has a gradient.
DROPPED = 1e-6


class KeepPredictor(nn.Module):
    """Predicts which patches stay: (B, N, C), (B, N) -> log probabilities (B, N, 2).

    Half of the channels of LayerNorm, linear layer and GELU describe the patch, and the other half,
    averaged over the patches that are left, the image. Three linear layers, with GELU between them,
    end in "stays" and "is dropped". In evaluation the K patches with the highest probabilities
    stay. In training every patch is drawn by itself (:func:`sample_kept`), all tokens stay in the
    sequence, and attention leaves out the dropped ones.

    A network that was trained without predictors has no keep decision, and none can be derived from
    its weights: DynamicViT's is the output of these layers, which only training determines (the
    paper trains them together with the network, from its classification loss, the share that is
    kept and the distillation of a network without predictors). Expedite's comparison (Liang, W. et
    al. 2022) names DynamicViT in the paper; how it is applied to dense prediction is left to a
    supplement that is not at hand. Here therefore

      * predictors are trained, for a network as it is with `optimizer.freeze`, and their initial
        weights are random: a predictor is not offered by `--method`, which trains nothing;
      * the loss may be any loss of the network, including one on its map: there a dropped patch
        gets the output for the remaining patch nearest to it, and the gradient of its probability
        is that of the difference between its own output and this one.

    Attributes:
      dtype: type of the linear layers; the probabilities are float32 (float64 for float64).
      init: initializer of the kernels.
      epsilon: epsilon of the LayerNorm.

    References:
      Rao et al. 2021, "DynamicViT", Eqs. 1 to 5, and its code (raoyongming/DynamicViT).
    """

    dtype: Any
    init: Initializer
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], left: Float[Array, "B N"]) -> jax.Array:
        """Predicts.

        Args:
          x: patches (B, N, C).
          left: 1 for patches that are left, 0 for patches that were dropped before (B, N).
        """
        channels = x.shape[-1]

        def linear(dim, name):
            return dense(max(1, dim), self.dtype, name, self.init)

        x = gelu(linear(channels, "fc_in")(LayerNorm(self.epsilon, self.dtype, name="norm")(x)))
        own, shared = jnp.split(x, [channels // 2], -1)
        weights = left[..., None].astype(softmax_dtype(x.dtype))
        mean = (shared * weights).sum(1, keepdims=True) / jnp.maximum(
            weights.sum(1, keepdims=True), DROPPED
        )
        mean = jnp.broadcast_to(mean.astype(x.dtype), shared.shape)
        x = jnp.concatenate([own, mean], -1)
        x = gelu(linear(channels // 2, "fc1")(x))
        x = gelu(linear(channels // 4, "fc2")(x))
        x = linear(2, "fc_out")(x)
        return jax.nn.log_softmax(x.astype(softmax_dtype(x.dtype)))


class Kept(NamedTuple):
    """Which patches are left in training.

    Attributes:
      policy: 1 for patches that are left, 0 for the others (B, N), with straight-through gradients.
      home: the remaining patch that stands for each patch of the map (B, N) int32; None if no map
        is needed.
    """

    policy: jax.Array
    home: jax.Array | None

    def restore(self, tokens: jax.Array) -> jax.Array:
        """Returns the outputs of all patches (B, N, D); a dropped one gets that of its home."""
        if self.home is None:
            return tokens
        policy = self.policy[..., None].astype(tokens.dtype)
        return policy * tokens + (1 - policy) * take(tokens, self.home)


def sample_kept(
    log_probabilities: Float[Array, "B N 2"], left: Float[Array, "B N"], rng: jax.Array
) -> Float[Array, "B N"]:
    """Draws the patches that stay; the gradient is that of the soft choice (Gumbel-softmax).

    Args:
      log_probabilities: result of :class:`KeepPredictor`.
      left: the patches that were left before (B, N); a dropped one does not come back.
      rng: one key per image (B,).

    Returns:
      1 for the patches that stay, 0 for the others (B, N).
    """
    draw = lambda key, row: jax.random.gumbel(key, row.shape, row.dtype)  # noqa: E731
    noisy = log_probabilities + jax.vmap(draw)(rng, log_probabilities)
    soft = jax.nn.softmax(noisy)[..., 0]
    hard = (noisy[..., 0] >= noisy[..., 1]).astype(soft.dtype)
    return left * (hard + (soft - lax.stop_gradient(soft)))


def nearest_kept(x: Float[Array, "B N C"], policy: Float[Array, "B N"]) -> Int32[Array, "B N"]:
    """Returns the kept patch nearest to each patch (B, N); a kept one is its own.

    Squared distances, ties to the lowest index. The result carries no gradient.
    """
    x = lax.stop_gradient(x).astype(softmax_dtype(x.dtype))
    kept = lax.stop_gradient(policy) > 0.5
    x = x - x.mean(1, keepdims=True)
    distances = jnp.sum(x * x, -1)[:, None] - 2 * precise_product("bnc,bmc->bnm", x, x)
    home, _ = smallest(jnp.where(kept[:, None], distances, jnp.inf))
    return jnp.where(kept, jnp.arange(x.shape[1], dtype=jnp.int32), home)


def ratio_loss(policy: Float[Array, "B N"], share: float) -> jax.Array:
    """Returns the squared difference between the kept share and the wanted one, over the images."""
    return jnp.mean((policy.mean(1) - share) ** 2)
