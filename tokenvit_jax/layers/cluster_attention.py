"""Multi-head attention of all tokens with a few merged tokens, of ClusTR."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers.blocks import dense
from tokenvit_jax.layers.conv import conv_init
from tokenvit_jax.layers.stochastic import image_keys
from tokenvit_jax.ops.density_peaks import RULES

# Of the products that the published FLOPs of ClusTR leave out: `published.LEFT_OUT` names it.
FINE_SCALE = "fine_scale"
AGGREGATIONS = ("clusters", "grid")
# Of the running threshold with an adaptive number of clusters, as of BatchNorm's statistics.
MOMENTUM = 0.9


class ClusterAttention(nn.Module):
    """Attention of N tokens with clusters of them, at one or several scales (Eqs. 5 and 8).

    (B, H, W, C) -> (B, H, W, C). The tokens are clustered by density peaks, once for all heads and
    scales, and merged to about N / ratio tokens per scale. Every scale has keys, values and a
    softmax of its own; the outputs are added.

    Attributes:
      num_heads: C is a multiple of it.
      ratios: token reduction of each scale, falling; 1: all tokens, nothing to merge.
      aggregation: "clusters", or "grid": a convolution of kernel and stride sqrt(ratio), the
        spatial reduction of PVT (Wang et al. 2021).
      assign: cluster of a token that is no centre: of the "nearest" centre, or of its "parent", the
        nearest denser token.
      adaptive: 0: every image has all clusters. Else only centres with a high decision value are
        used, on average this part of them: one threshold for all images, the quantile of the batch
        in training and its running mean afterwards.
      axis_name: mapped axis that the batch is divided over, for pmap; None under jit.

    Raises:
      UserError: num_heads does not divide C, another setting is not valid, or there are fewer
        tokens than the coarsest ratio.
    """

    num_heads: int
    ratios: tuple[int, ...]
    aggregation: str = "clusters"
    assign: str = "nearest"
    adaptive: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]
        self._check(channels)
        tokens = x.reshape(x.shape[0], -1, channels)  # (B, N, C)
        if self.aggregation == "grid":
            scales = [(self._grid(x, scale), None) for scale in range(len(self.ratios))]
        else:
            scales = self._clusters(tokens, train)
        q = self._heads(dense(channels, self.dtype, "q")(tokens))
        y = 0.0
        for scale, (merged, used) in enumerate(scales):
            kv = dense(2 * channels, self.dtype, f"kv{scale}")(merged)
            k, v = map(self._heads, jnp.split(kv, 2, axis=-1))  # (B, M, heads, D)
            with jax.named_scope(FINE_SCALE if scale else "coarse_scale"):
                y += ops.dot_product_attention(q, k, v, key_mask=used)
        return dense(channels, self.dtype, "proj")(y.reshape(x.shape))

    def _check(self, channels):
        if channels % self.num_heads:
            raise UserError(f"num_heads={self.num_heads} does not divide {channels} channels")
        for name, valid in (("aggregation", AGGREGATIONS), ("assign", RULES)):
            value = getattr(self, name)
            if value not in valid:
                raise UserError(f"{name}={value!r} is not valid; valid: {', '.join(valid)}")
        if not 0 <= self.adaptive < 1:
            raise UserError(f"adaptive={self.adaptive} is not valid; valid: from 0 to below 1")
        ratios = self.ratios if isinstance(self.ratios, tuple) else ()
        if not ratios or any(ratio < 1 or ratios[0] % ratio for ratio in ratios):
            raise UserError(
                f"ratios={self.ratios} is not valid for a stage; valid: numbers from 1 that divide "
                "the first, like (64, 16)"
            )

    def _heads(self, x):
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def _clusters(self, tokens, train):
        """Returns merged tokens (B, M, C) and, if not all of them count, used (B, M) per scale."""
        num_tokens = tokens.shape[1]
        numbers = cluster_numbers(num_tokens, self.ratios)
        if not min(numbers):
            raise UserError(
                f"ratios={self.ratios} needs at least {self.ratios[0]} tokens; there are "
                f"{num_tokens}"
            )
        if min(numbers) == num_tokens:  # merging would only permute them
            return [(tokens, None)] * len(numbers)
        rng = image_keys(self.make_rng("routing"), len(tokens), self.axis_name) if train else None
        peaks = ops.density_peaks(tokens, rng=rng)
        scores = dense(1, self.dtype, "score")(tokens)[..., 0]  # (B, N), Eq. 3
        scales = []
        for scale, number in enumerate(numbers):
            # Before it is known to be needed: the variables do not depend on the size of the image.
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
        """Returns the decision value below which a centre is not used, of all images together."""
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
        """Returns (B, M, C), each token the reduction of a square of the map."""
        side = math.isqrt(self.ratios[scale])
        channels = x.shape[-1]
        if side > 1:
            conv = nn.Conv(
                channels, (side, side), (side, side), "VALID", dtype=self.dtype,
                kernel_init=conv_init, name=f"reduce{scale}",
            )  # fmt: skip
            x = nn.LayerNorm(1e-6, dtype=self.dtype, name=f"reduce_norm{scale}")(conv(x))
        return x.reshape(x.shape[0], -1, channels)


def cluster_numbers(num_tokens: int, ratios: tuple[int, ...]) -> list[int]:
    """Returns the number of clusters of each scale: N // ratio of the coarsest, multiples of it.

    Args:
      num_tokens: N.
      ratios: token reduction of each scale, the coarsest first; it is a multiple of the others.
    """
    return [num_tokens // ratios[0] * (ratios[0] // ratio) for ratio in ratios]
