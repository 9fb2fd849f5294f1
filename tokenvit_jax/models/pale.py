"""Pale Transformer (Wu et al. 2022), Figure 2 and Table 1."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import (
    ConditionalPositionEncoding,
    DropPath,
    Mlp,
    PaleAttention,
    PatchEmbedding,
    dense,
)
from tokenvit_jax.layers.conv import linear_init
from tokenvit_jax.models.pyramid import Pyramid
from tokenvit_jax.models.registry import register

# Attention of the blocks, in turns from the first block of the network (Table 8).
ATTENTION_MODES = {
    "parallel": ("parallel",),
    "sequential": ("rows", "columns"),
    "cross": ("cross",),
    "vanilla": ("vanilla",),
}
POSITIONS = ("none", "ape", "cpe")


class AbsolutePositionEncoding(nn.Module):
    """x + a learned table: (B, H, W, C) -> (B, H, W, C); bilinear where the sizes differ."""

    size: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        table = self.param("position", linear_init, (*self.size, x.shape[-1]))
        if self.size != x.shape[1:3]:
            table = jax.image.resize(table, x.shape[1:], "bilinear")
        return x + table.astype(self.dtype)


class PaleBlock(nn.Module):
    """Eqs. 6 to 8: conditional position encoding, pale attention, MLP; both normed before."""

    num_heads: int
    pale_size: int
    mode: str
    mask_padding: bool
    mlp_ratio: int
    cpe: bool
    drop_path: float
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        attention = PaleAttention(
            self.num_heads, self.pale_size, self.mode, self.mask_padding, self.dtype,
            self.axis_name, name="attention",
        )  # fmt: skip
        mlp = Mlp(self.mlp_ratio, self.dtype, name="mlp")

        def norm(x, name):
            return nn.LayerNorm(1e-6, dtype=self.dtype, name=name)(x)

        def drop(y):
            return DropPath(self.drop_path, self.axis_name)(y, train)

        if self.cpe:
            x = ConditionalPositionEncoding(self.dtype, name="cpe")(x)
        x = x + drop(attention(norm(x, "norm1"), train))
        return x + drop(mlp(norm(x, "norm2")))


class Pale(Pyramid, kw_only=True):
    """Pale Transformer for images (B, H, W, 3) of any size from 32 x 32.

    Attributes, beside those of :class:`Pyramid`:
      mlp_ratio: expansion of the MLP.
      pale_sizes: rows and columns of a pale in the four stages; ones with mode "parallel" are axial
        attention (Table 8).
      mode: "parallel"; "sequential", rows in the first block of the network, columns in the second,
        in turns; "cross", stripes as wide as a pale; or "vanilla", whole pales.
      mask_padding: whether attention leaves out what pads a map to whole pales.
      position: "cpe", a conditional position encoding in every block; "ape", a learned table added
        at the start of every stage; or "none" (Table 9).
      position_size: height and width of the images whose maps the tables of "ape" fit.
      token_head: a second classifier, of single tokens, for :meth:`token_logits`.
    """

    depths: tuple[int, ...] = (2, 2, 16, 2)
    mlp_ratio: int = 4
    pale_sizes: tuple[int, ...] = (7, 7, 7, 7)
    mode: str = "parallel"
    mask_padding: bool = False
    position: str = "cpe"
    position_size: tuple[int, int] = (224, 224)
    token_head: bool = False

    def setup(self):
        for name, valid in (("mode", ATTENTION_MODES), ("position", POSITIONS)):
            value = getattr(self, name)
            if value not in valid:
                raise UserError(f"{name}={value!r} is not valid; valid: {', '.join(valid)}")
        super().setup()
        self.head_norm = nn.LayerNorm(1e-6, dtype=self.dtype)
        if self.token_head:
            self.token_classifier = dense(self.num_classes, jnp.float32)

    def embedding(self, stage: int) -> nn.Module:
        patch = {"kernel_size": 7, "stride": 4, "padding": 2} if stage == 0 else {}
        embedding = PatchEmbedding(self.dims[stage], **patch, dtype=self.dtype)
        if self.position != "ape":
            return embedding
        stride = 4 * 2**stage
        height, width = (-(-size // stride) for size in self.position_size)
        return nn.Sequential([embedding, AbsolutePositionEncoding((height, width), self.dtype)])

    def block(self, stage: int, index: int) -> tuple[type[nn.Module], dict[str, Any]]:
        modes = ATTENTION_MODES[self.mode]
        return PaleBlock, {
            "num_heads": self.num_heads[stage],
            "pale_size": self.pale_sizes[stage],
            "mode": modes[index % len(modes)],
            "mask_padding": self.mask_padding,
            "mlp_ratio": self.mlp_ratio,
            "cpe": self.position == "cpe",
            "dtype": self.dtype,
            "axis_name": self.axis_name,
        }

    def head(self, x: jax.Array, train: bool) -> jax.Array:
        x = self.head_norm(x)
        if self.token_head and self.is_initializing():
            self.token_classifier(x.astype(jnp.float32))  # creates its parameters
        return x

    def token_logits(
        self, images: jax.Array, train: bool, box: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the logits of the image and of every token, for token labelling.

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: as in :meth:`features`.
          box: of MixToken, as ``mix_box`` in :meth:`features`; None: nothing is mixed.

        Returns:
          (B, num_classes) and (B, ceil(H / 32), ceil(W / 32), num_classes), both float32. Tokens
          stay where they are computed: those inside the box are of the neighbour image.

        Raises:
          UserError: the model has no token_head.

        References:
          Jiang et al. 2021, "All Tokens Matter".
        """
        if not self.token_head:
            raise UserError("token_head=False: the model has no classifier of tokens; valid: True")
        tokens = self.head(self.features(images, train, box)[-1], train)
        return self.classify(tokens, train), self.token_classifier(tokens.astype(jnp.float32))


@register
def pale_t(**kwargs) -> Pale:
    return Pale(**{"dims": (64, 128, 256, 512), "num_heads": (2, 4, 8, 16)} | kwargs)


@register
def pale_s(**kwargs) -> Pale:
    return Pale(**{"dims": (96, 192, 384, 768), "num_heads": (2, 4, 8, 16)} | kwargs)


@register
def pale_b(**kwargs) -> Pale:
    return Pale(**{"dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)} | kwargs)
