"""Pale Transformer (Wu et al. 2022), Figure 2 and Table 1."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import (
    KEPT,
    AddLayerNorm,
    ConditionalPositionEncoding,
    Factors,
    LayerNorm,
    Mlp,
    PaleAttention,
    PatchEmbedding,
    drop_branch,
)
from tokenvit_jax.layers.conv import linear_init
from tokenvit_jax.models.pyramid import Pyramid, PyramidSettings, pool_tokens
from tokenvit_jax.models.settings import EXPANSION, SIDE, BatchNormSettings, Rules
from tokenvit_jax.ops.pale_attention import HALVED
from tokenvit_jax.valid import Flag, OneOf, Several, whole

# Attention of the blocks, in turn from the first block of the network on (Table 8).
ATTENTION_MODES = {
    "parallel": ("parallel",),
    "sequential": ("rows", "columns"),
    "cross": ("cross",),
    "vanilla": ("vanilla",),
}
POSITIONS = ("none", "ape", "cpe")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaleSettings(BatchNormSettings, PyramidSettings):
    """Settings of the Pale Transformer; the common ones are in :class:`PyramidSettings`.

    Attributes:
      mlp_ratio: expansion of the MLP.
      pale_sizes: rows and columns of a pale in the four stages; all ones with mode "parallel" give
        axial attention (Table 8).
      mode: "parallel"; "sequential", alternating rows and columns from the first block of the
        network on; "cross", stripes as wide as a pale; or "vanilla", whole pales.
      mask_padding: whether attention leaves out the padding of a map to whole pales.
      position: "cpe", a conditional position encoding in every block; "ape", a learned table added
        at the start of every stage; or "none" (Table 9).
      position_size: height and width of the images whose maps fit the tables of "ape" [pixels].
      token_head: whether to add a classifier of single tokens, for :meth:`Pale.token_logits`.
    """

    valid: ClassVar[Rules] = {
        "mlp_ratio": EXPANSION,
        "pale_sizes": Several(whole(1, 256)),
        "mode": OneOf(tuple(ATTENTION_MODES)),
        "mask_padding": Flag(),
        "position": OneOf(POSITIONS),
        "position_size": Several(SIDE, 2),
        "token_head": Flag(),
    }

    depths: tuple[int, ...] = (2, 2, 16, 2)
    mlp_ratio: int = 4
    pale_sizes: tuple[int, ...] = (7, 7, 7, 7)
    mode: str = "parallel"
    mask_padding: bool = False
    position: str = "cpe"
    position_size: tuple[int, int] = (224, 224)
    token_head: bool = False

    def check_relations(self) -> None:
        super().check_relations()
        for heads, depth in zip(self.num_heads, self.depths, strict=True):
            if depth and heads % 2 and not set(HALVED).isdisjoint(ATTENTION_MODES[self.mode]):
                raise UserError(
                    f"num_heads={heads} must be even: mode {self.mode!r} halves the heads; valid: "
                    "even numbers, or another mode"
                )


SIZES = {
    "pale_t": PaleSettings(dims=(64, 128, 256, 512), num_heads=(2, 4, 8, 16)),
    "pale_s": PaleSettings(dims=(96, 192, 384, 768), num_heads=(2, 4, 8, 16)),
    "pale_b": PaleSettings(dims=(128, 256, 512, 1024), num_heads=(4, 8, 16, 32)),
}


class AbsolutePositionEncoding(nn.Module):
    """Adds a learned table, resized if sizes differ (bilinear): (B, H, W, C) -> (B, H, W, C)."""

    size: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        table = self.param("position", linear_init, (*self.size, x.shape[-1]))
        if self.size != x.shape[1:3]:
            table = jax.image.resize(table, x.shape[1:], "bilinear")
        return x + table.astype(self.dtype)


class PaleBlock(nn.Module):
    """Eqs. 6 to 8: conditional position encoding, pale attention, MLP; both branches pre-normed.

    Attributes:
      settings: the architecture.
      stage: stage of the block, from 0.
      index: index of the block in the network, from 0.
    """

    settings: PaleSettings
    stage: int
    index: int

    @property
    def mode(self) -> str:
        """Attention of the block: an entry of :data:`ATTENTION_MODES`."""
        modes = ATTENTION_MODES[self.settings.mode]
        return modes[self.index % len(modes)]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, factors: Factors = KEPT) -> jax.Array:
        settings, stage = self.settings, self.stage
        attention = PaleAttention(
            settings.num_heads[stage], settings.pale_sizes[stage], self.mode,
            settings.mask_padding, settings.dtype, settings.norm_axis, name="attention",
        )  # fmt: skip
        mlp = Mlp(settings.mlp_ratio, settings.dtype, name="mlp")

        def norm(name):
            return AddLayerNorm(1e-6, settings.dtype, name=name)

        if settings.position == "cpe":
            x = ConditionalPositionEncoding(settings.dtype, name="cpe")(x)
        x, y = norm("norm1")(x)
        x, y = norm("norm2")(x, attention(y, train), factors[0])
        return x + drop_branch(mlp(y), factors[1])


class Pale(Pyramid):
    """Pale Transformer for images (B, H, W, 3) of any size from 32 x 32."""

    settings: PaleSettings

    block_type = PaleBlock
    head_modules = ("classifier", "token_classifier", "head_norm")
    map_norm_epsilon = 1e-6

    def setup(self):
        super().setup()
        self.head_norm = LayerNorm(1e-6, self.settings.dtype)
        if self._has_token_classifier:
            self.token_classifier = self.make_classifier()

    @nn.nowrap
    def fit_parameter(self, path: str, value: np.ndarray, theirs: Pyramid) -> np.ndarray:
        """Resizes tables of absolute positions like :class:`AbsolutePositionEncoding`."""
        names = path.split("/")
        if names[-1] != "position":
            return value
        shape = (*self._table_size(int(names[0].removeprefix("embeddings_"))), value.shape[-1])
        if value.shape == shape:
            return value
        return np.asarray(jax.image.resize(value, shape, "bilinear"))

    @nn.nowrap
    def _table_size(self, stage):
        size = self.settings.position_size
        return tuple(-(-side // self.strides[stage]) for side in size)

    def embedding(self, stage: int) -> nn.Module:
        settings = self.settings
        patch = {"kernel_size": 7, "stride": 4, "padding": 2} if stage == 0 else {}
        embedding = PatchEmbedding(settings.dims[stage], **patch, dtype=settings.dtype)
        if settings.position != "ape":
            return embedding
        table = AbsolutePositionEncoding(self._table_size(stage), settings.dtype)
        return nn.Sequential([embedding, table])

    def head(self, x: jax.Array, train: bool) -> jax.Array:
        x = self.head_norm(x)
        if self._has_token_classifier and self.is_initializing():
            self.token_classifier(x.astype(jnp.float32))  # creates its parameters
        return x

    @property
    def _has_token_classifier(self):
        return self.settings.token_head and self.settings.num_classes > 0

    def token_logits(
        self, images: jax.Array, train: bool = False, box: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the logits of the image and of every token, for token labelling.

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: as in :meth:`features`.
          box: as ``mix_box`` in :meth:`features` (MixToken); None: nothing is mixed.

        Returns:
          (B, num_classes) and (B, ceil(H / 32), ceil(W / 32), num_classes), both float32. The
          logits of the tokens are not moved back: inside the box they belong to the neighbour
          image.

        Raises:
          UserError: the model has no token head or no classes.

        References:
          Jiang et al. 2021, "All Tokens Matter".
        """
        if not self._has_token_classifier:
            settings = self.settings
            raise UserError(
                f"token_head={settings.token_head}, num_classes={settings.num_classes}: the model "
                "has no classifier of tokens; valid: True and at least 1"
            )
        tokens = self.head(self.features(images, train, box)[-1], train)
        return self.classify(pool_tokens(tokens), train), self.token_classifier(
            tokens.astype(jnp.float32)
        )
