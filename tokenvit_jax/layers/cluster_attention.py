"""Multi-head attention of all tokens with a few merged tokens (ClusTR)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers.blocks import DenseParts, check_num_heads, dense
from tokenvit_jax.layers.conv import conv_init
from tokenvit_jax.layers.norm import LayerNorm
from tokenvit_jax.layers.stochastic import image_keys
from tokenvit_jax.ops.density_peaks import RULES
from tokenvit_jax.ops.heads import split_heads
from tokenvit_jax.valid import Number, OneOf, Several, check_all, whole

# Scope of the products that ClusTR's published FLOPs leave out; `published.LEFT_OUT` lists it.
FINE_SCALE = "fine_scale"
# Rules of the attributes of :class:`ClusterAttention`.
CLUSTERING = {
    "aggregation": OneOf(("clusters", "grid")),
    "assign": OneOf(RULES),
    "adaptive": Number(0, 1, below=True),
}
RATIOS = Several(whole(1, 2**16))
# Momentum of the running threshold (adaptive number of clusters), as in BatchNorm's statistics.
MOMENTUM = 0.9


class ClusterAttention(nn.Module):
    """Attends from N tokens to clusters of these tokens, at one or several scales.

    Maps (B, H, W, C) to (B, H, W, C). The tokens are clustered by density peaks, once for all heads
    and scales, and merged to about N / ratio tokens per scale. Every scale has its own keys, values
    and softmax; the outputs are added.

    Attributes:
      num_heads: number of heads, a divisor of C.
      ratios: token reduction of each scale, in falling order; 1: all tokens, without merging.
      aggregation: "clusters", or "grid": a convolution with kernel and stride sqrt(ratio), the
        spatial reduction of PVT (Wang et al. 2021).
      assign: cluster that a token joins if it is not a centre: the "nearest" centre's, or its
        "parent"'s (the nearest denser token).
      adaptive: 0: every image has all clusters. Above 0: on average this fraction of the centres
        is used, the centres with a high decision value. One threshold holds for all images: the
        quantile of the batch in training, its running mean in evaluation.
      dtype: type of the computation.
      axis_name: mapped axis that the batch is divided over, for pmap; None under jit.

    Raises:
      UserError: num_heads does not divide C, another setting is not valid, or there are fewer
        tokens than the coarsest ratio.

    References:
      Xie et al. 2022, "ClusTR", Eqs. 5 and 8.
    """

    num_heads: int
    ratios: tuple[int, ...]
    aggregation: str = "clusters"
    assign: str = "nearest"
    adaptive: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        channels = x.shape[-1]
        self._check(channels)
        tokens = x.reshape(x.shape[0], -1, channels)  # (B, N, C)
        if self.aggregation == "grid":
            scales = [(self._grid(x, scale), None) for scale in range(len(self.ratios))]
        else:
            scales = self._clusters(tokens, train)
        q = split_heads(dense(channels, self.dtype, "q")(tokens), self.num_heads)
        y = 0.0
        for scale, (merged, used) in enumerate(scales):
            kv = DenseParts(2 * channels, 2, self.dtype, name=f"kv{scale}")(merged)
            k, v = (split_heads(part, self.num_heads) for part in kv)
            with jax.named_scope(FINE_SCALE if scale else "coarse_scale"):
                y += ops.dot_product_attention(q, k, v, key_mask=used)
        return dense(channels, self.dtype, "proj")(y.reshape(x.shape))

    def _check(self, channels):
        check_num_heads(self.num_heads, channels)
        rules = CLUSTERING | {"ratios": RATIOS}
        check_all("", {name: getattr(self, name) for name in rules}, rules)
        check_ratios(self.ratios, self.aggregation)

    def _clusters(self, tokens, train):
        """Returns the merged tokens (B, M, C) of each scale and which are used (B, M), or None."""
        num_tokens = tokens.shape[1]
        numbers = cluster_numbers(num_tokens, self.ratios)
        if not min(numbers):
            raise UserError(
                f"ratios={self.ratios} needs at least {self.ratios[0]} tokens; there are "
                f"{num_tokens}"
            )
        if min(numbers) == num_tokens:  # merging would only permute them
            return [(tokens, None)] * len(numbers)
        batch = tokens.shape[0]
        rng = image_keys(self.make_rng("routing"), batch, self.axis_name) if train else None
        peaks = ops.density_peaks(tokens, rng=rng)
        scores = dense(1, self.dtype, "score")(tokens)[..., 0]  # (B, N), Eq. 3
        scales = []
        for scale, number in enumerate(numbers):
            # Created even if not needed, because the variables must not depend on the image size.
            threshold = self._threshold(peaks, number, scale, train) if self.adaptive else None
            if number == num_tokens:
                scales.append((tokens, None))
                continue
            clusters = ops.assign_clusters(
                tokens, peaks, number, assign=self.assign, threshold=threshold
            )
            merged = ops.merge_tokens(tokens, clusters.assignment, number, scores)
            self.sow("intermediates", f"clusters{scale}", clusters.assignment)
            used = None
            if self.adaptive:
                used = ops.used_clusters(peaks, clusters.centers, threshold)
                self.sow("intermediates", f"used{scale}", used)
            scales.append((merged, used))
        return scales

    def _threshold(self, peaks, number, scale, train):
        """Returns the decision value below which a centre is not used, the same for all images."""
        running = self.variable("batch_stats", f"threshold{scale}", jnp.zeros, ())
        if not train or self.is_initializing():
            return running.value
        best = lax.top_k(peaks.density * peaks.delta, number)[0]  # (B, M)
        if self.axis_name is not None:
            best = lax.all_gather(best, self.axis_name)
        threshold = jnp.quantile(best.astype(jnp.float32), 1.0 - self.adaptive)
        running.value = MOMENTUM * running.value + (1 - MOMENTUM) * threshold
        return threshold

    def _grid(self, x, scale):
        """Reduces each square of the map to one token: (B, H, W, C) -> (B, M, C)."""
        side = math.isqrt(self.ratios[scale])
        channels = x.shape[-1]
        if side > 1:
            conv = nn.Conv(
                channels, (side, side), (side, side), "VALID", dtype=self.dtype,
                kernel_init=conv_init, name=f"reduce{scale}",
            )  # fmt: skip
            x = LayerNorm(1e-6, dtype=self.dtype, name=f"reduce_norm{scale}")(conv(x))
        return x.reshape(x.shape[0], -1, channels)


def check_ratios(ratios: tuple[int, ...], aggregation: str) -> None:
    """Raises UserError unless the ratios of a stage, numbers from 1, fit together."""
    if not ratios or any(ratios[0] % ratio for ratio in ratios):
        raise UserError(
            f"ratios={ratios} is not valid for a stage; valid: numbers from 1 that divide the "
            "first, like (64, 16)"
        )
    if aggregation == "grid" and any(math.isqrt(ratio) ** 2 != ratio for ratio in ratios):
        raise UserError(
            f"ratios={ratios} is not valid for a stage with aggregation='grid'; valid: squares, "
            "like (64, 16)"
        )


def cluster_numbers(num_tokens: int, ratios: tuple[int, ...]) -> list[int]:
    """Returns the number of clusters at each scale.

    The coarsest scale has N // ratio clusters; each finer scale has a multiple of this number.

    Args:
      num_tokens: N.
      ratios: token reduction of each scale, the coarsest first, which is a multiple of the others.
    """
    return [num_tokens // ratios[0] * (ratios[0] // ratio) for ratio in ratios]
