"""The decoders of Segmenter (Strudel et al. 2021), from patch tokens to patch logits."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, truncated_normal

from tokenvit_jax.errors import UserError
from tokenvit_jax.heads.head import LOGITS, Head
from tokenvit_jax.layers import (
    AddLayerNorm,
    Attention,
    DropPaths,
    LayerNorm,
    Mlp,
    dense,
    drop_branch,
)
from tokenvit_jax.layers.cosine import unit_length
from tokenvit_jax.models.settings import BLOCKS, CHANNELS, EXPANSION, RATE, Rules
from tokenvit_jax.valid import whole

EPSILON = 1e-5  # epsilon of LayerNorm, as in the published weights
INIT_STD = 0.02


class LinearDecoder(Head):
    """A linear layer: tokens (B, n, C) -> logits (B, n, num_classes) in float32.

    Attributes:
      num_classes: K.
      dtype: attribute of every head; ignored here, because this head computes in float32.
      axis_name: attribute of every head; ignored here.

    References:
      Strudel et al. 2021, Section 3.2, "Linear".
    """

    valid: ClassVar[Rules] = LOGITS

    num_classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool) -> jax.Array:
        del train
        return dense(self.num_classes, jnp.float32, "classifier")(tokens.astype(jnp.float32))


class MaskTransformer(Head):
    """Attends among patches and classes: tokens (B, n, C) -> logits (B, n, K) in float32.

    The logits are the cosines of a patch and all classes, with LayerNorm over the classes.

    Attributes:
      num_classes: K.
      depth: number of blocks.
      head_dim: channels of an attention head, a divisor of C.
      mlp_ratio: expansion of the MLP.
      drop_path: stochastic depth rate of the last block; the rate grows linearly from 0 at the
        first block.
      dtype: type of the computation; parameters are float32.
      axis_name: mapped axis that the batch is split over, for pmap; None under jit.

    References:
      Strudel et al. 2021, Section 3.2, "Mask Transformer".
    """

    valid: ClassVar[Rules] = LOGITS | {
        "depth": whole(0, BLOCKS), "head_dim": CHANNELS, "mlp_ratio": EXPANSION, "drop_path": RATE
    }  # fmt: skip

    num_classes: int
    depth: int = 2
    head_dim: int = 64
    mlp_ratio: int = 4
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool) -> jax.Array:
        batch, num_patches, dim = tokens.shape
        if dim % self.head_dim:
            raise UserError(
                f"head_dim={self.head_dim} does not divide {dim} channels; valid: divisors of {dim}"
            )
        x = dense(dim, self.dtype, "embedding", truncated_normal(INIT_STD))(tokens)
        shape = (self.num_classes, dim)
        classes = self.param("class_token", truncated_normal(INIT_STD), shape).astype(x.dtype)
        x = jnp.concatenate([x, jnp.broadcast_to(classes, (batch, *shape))], 1)
        drop_paths = DropPaths(self.drop_path, self.depth, self.axis_name)
        for i, factors in enumerate(drop_paths(batch, train)):
            x = self._block(x, i, factors)
        x = LayerNorm(EPSILON, dtype=self.dtype, name="norm")(x)

        def directions(x, name):
            project = dense(dim, self.dtype, name, normal(dim**-0.5), use_bias=False)
            return unit_length(project(x))

        patches = directions(x[:, :num_patches], "patch_projection")
        classes = directions(x[:, num_patches:], "class_projection")
        cosines = jnp.einsum("bnc,bkc->bnk", patches, classes)
        return LayerNorm(EPSILON, dtype=jnp.float32, name="mask_norm")(cosines)

    def _block(self, x, number, factors):
        init = truncated_normal(INIT_STD)
        num_heads = x.shape[-1] // self.head_dim
        attention = Attention(num_heads, "none", INIT_STD, self.dtype, name=f"attention_{number}")
        mlp = Mlp(self.mlp_ratio, self.dtype, init, name=f"mlp_{number}")

        def norm(name):
            return AddLayerNorm(EPSILON, self.dtype, name=f"{name}_{number}")

        x, y = norm("norm1")(x)
        x, y = norm("norm2")(x, attention(y).y, factors[0])
        return x + drop_branch(mlp(y), factors[1])
