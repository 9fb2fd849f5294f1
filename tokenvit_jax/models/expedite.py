"""Clusters tokens before the middle blocks of a trained host and reconstructs them afterwards.

Expedite (Liang et al. 2022, "Expediting Large-Scale Vision Transformer for Dense Prediction without
Fine-tuning"): the first blocks see all tokens, the next ones the centres of superpixels, and the
last ones all tokens again, reconstructed from the refined centres. The host keeps its parameters.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.models.settings import BLOCKS, Checked, Rules, check_unused
from tokenvit_jax.ops.reconstruct_tokens import MODES, NORMS
from tokenvit_jax.valid import Either, Number, OneOf, Several, whole

WHERE = ("blocks", "logits")
# Settings that a kind of reconstruction does not read.
UNREAD = {
    "soft": (),
    "hard": ("neighbors", "normalize"),
    "window": ("neighbors",),
    "bilinear": ("neighbors", "normalize"),
}
AUTO = "auto"
# Temperature over the median squared distance of neighbouring tokens. 0.05 was the best or close to
# it for three trained networks whose distances are 0.68, 12 and 534 (experiments/real_networks).
FACTOR = 0.05
TEMPERATURES = Number(float(np.finfo(np.float32).tiny), 1e20)


@dataclasses.dataclass(frozen=True)
class Expedite(Checked):
    """Where and how tokens are clustered and reconstructed.

    The paper's baselines are ``iterations=0`` (adaptive average pooling) and ``mode="bilinear"``,
    alone or together; ``alpha=0`` with ``mode="bilinear"`` is the paper's baseline of a smaller
    image.

    Attributes:
      alpha: number of blocks on all tokens, before the clustering. 0: no clustering; the image is
        resized so that its map has the size of the map of centres.
      beta: number of blocks on the centres, before all tokens are reconstructed; at least 1.
      clusters: rows and columns of the centres (h, w); in a Swin Transformer, within each window.
      where: what is reconstructed: the tokens after "blocks" alpha + beta, or the "logits" that a
        head computes from the centres after the last block.
      window: side of the neighbourhood of cells that a token can belong to, odd.
      iterations: number of rounds of clustering.
      temperature: tau of both softmaxes, a squared distance; or "auto", which is `FACTOR` times
        the :func:`neighbor_distance` of the tokens to be clustered, because the scale of features
        differs by orders of magnitude from network to network. The commands measure the distance
        once, on images, and write the number. A model that is applied with "auto" measures it on
        each image: a module cannot read data beforehand, and a refusal would also stop what needs
        no data, such as `init` and the counting of operations. The result for an image does not
        depend on the rest of its batch, but the median costs a sort of 2 H W numbers.
      neighbors: number of nearest centres from which a token is reconstructed; if there are fewer
        centres, all are used.
      mode: kind of reconstruction, as in :func:`tokenvit_jax.ops.reconstruct_tokens`.
      normalize: normalisation of the centres' weights: "sum", or "l2" as in the released code.
    """

    prefix: ClassVar[str] = "expedite."
    valid: ClassVar[Rules] = {
        "alpha": whole(0, BLOCKS),
        "beta": whole(0, BLOCKS),  # 0: only the clustering, without blocks (expediting)
        "clusters": Several(whole(1, 2**12), 2),
        "where": OneOf(WHERE),
        "window": whole(1, 255),
        "iterations": whole(0, 1000),
        "temperature": Either((TEMPERATURES, OneOf((AUTO,)))),
        "neighbors": whole(1, 2**24),
        "mode": OneOf(MODES),
        "normalize": OneOf(NORMS),
    }

    alpha: int
    beta: int
    clusters: tuple[int, int]
    where: str = "blocks"
    window: int = 5
    iterations: int = 5
    temperature: float | str = AUTO
    neighbors: int = 20
    mode: str = "soft"
    normalize: str = "sum"

    def check(self, depth: int) -> None:
        """Raises UserError unless clustering and reconstruction fit into ``depth`` blocks."""
        for name, first, last in (("alpha", 0, depth - 1), ("beta", 1, depth - self.alpha)):
            if not first <= getattr(self, name) <= last:
                raise UserError(
                    f"expedite.{name}={getattr(self, name)} is not valid; valid: {first} to {last} "
                    f"in a model or stage of {depth} blocks"
                )
        if self.window % 2 == 0:
            raise UserError(f"expedite.window={self.window} is not valid; valid: odd numbers")
        if self.where == "logits" and self.alpha + self.beta < depth:
            raise UserError(
                f"expedite.beta={self.beta} is not valid with expedite.where='logits'; valid: "
                f"{depth - self.alpha}, all blocks after expedite.alpha={self.alpha}"
            )
        if self.alpha == 0 and self.mode != "bilinear":
            raise UserError(
                f"expedite.mode={self.mode!r} is not valid with expedite.alpha=0, without "
                "tokens to compare with; valid: 'bilinear'"
            )
        self._check_unused()

    def _check_unused(self):
        """Refuses settings without effect, except the temperature, which the commands measure."""
        check_unused(self.prefix, self, f"expedite.mode={self.mode!r}", UNREAD[self.mode])
        if self.alpha == 0:
            check_unused(self.prefix, self, "expedite.alpha=0", ("window", "iterations"))
        elif self.iterations == 0 and self.mode != "window":
            check_unused(self.prefix, self, "expedite.iterations=0", ("window",))

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raises UserError if there are more centres than tokens in ``grid``.

        More rows than the map has, or more columns, are valid: DPT's published setting on KITTI
        needs them.
        """
        most = grid[0] * grid[1]
        if math.prod(self.clusters) > most:
            raise UserError(
                f"expedite.clusters={self.clusters} is not valid; valid: rows and columns from 1, "
                f"at most {most} centres for a map of {grid[0]} x {grid[1]}"
            )

    def cluster(
        self,
        tokens: jax.Array,
        grid: tuple[int, int],
        temperature: float | jax.Array | None = None,
    ) -> jax.Array:
        """Returns the centres (B, h w, C) of tokens (B, H W, C).

        Args:
          tokens: (B, H W, C).
          grid: (H, W), rows and columns of the map of tokens.
          temperature: result of :meth:`temperature_for` if ``tokens`` are parts of a map; None: it
            is computed from ``tokens``.
        """
        self.check_grid(grid)
        return ops.cluster_superpixels(
            tokens, grid, self.clusters, window=self.window, iterations=self.iterations,
            temperature=self._given(temperature, tokens, grid),
        )  # fmt: skip

    def reconstruct(
        self,
        tokens: jax.Array,
        centers: jax.Array,
        refined: jax.Array,
        grid: tuple[int, int],
        temperature: float | jax.Array | None = None,
    ) -> jax.Array:
        """Maps refined cluster centres back to the original tokens: (B, H W, D).

        Args:
          tokens: the clustered tokens (B, H W, C).
          centers: the cluster centres of these tokens (B, h w, C).
          refined: the centres after the middle blocks (B, h w, D).
          grid: (H, W), rows and columns of the map of tokens.
          temperature: as in :meth:`cluster`.
        """
        names = ("neighbors", "mode", "normalize", "clusters", "window")
        settings = {name: getattr(self, name) for name in names}
        temperature = self._given(temperature, tokens, grid)
        return ops.reconstruct_tokens(
            tokens, centers, refined, grid=grid, temperature=temperature, **settings
        )

    def temperature_for(self, tokens: jax.Array) -> float | jax.Array:
        """Returns the temperature for maps of tokens (B, H, W, C): a number, or numbers (B,)."""
        if self.temperature != AUTO:
            return self.temperature
        return auto_temperature(tokens)

    def _given(self, temperature, tokens, grid):
        if temperature is not None:
            return temperature
        return self.temperature_for(tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1]))

    def shrink(self, images: jax.Array, patch_size: int) -> jax.Array:
        """Returns images (B, H, W, C) resized to h x w patches, bilinear and antialiased."""
        height, width = (size * patch_size for size in self.clusters)
        return jax.image.resize(
            images, (images.shape[0], height, width, images.shape[-1]), "bilinear"
        )

    def enlarge(self, refined: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Returns the map (B, h w, D) of a smaller image resized to (B, H W, D), bilinear."""
        tokens = jnp.zeros((refined.shape[0], grid[0] * grid[1], 1), refined.dtype)
        return self.reconstruct(tokens, tokens[:, : refined.shape[1]], refined, grid)


@jax.jit
def neighbor_distance(tokens: jax.Array) -> jax.Array:
    """Returns the median squared distance of neighbouring tokens of each map, in float32.

    Neighbours are next to each other in a row or in a column.

    Args:
      tokens: maps of tokens (B, H, W, C).

    Returns:
      (B,); 1 for maps of a single token, whose temperature has no effect.
    """
    x = tokens.astype(jnp.float32)
    pairs = (x[:, 1:] - x[:, :-1], x[:, :, 1:] - x[:, :, :-1])
    distances = [jnp.sum(pair**2, -1) for pair in pairs]
    distances = jnp.concatenate(
        [d.reshape(x.shape[0], d.shape[1] * d.shape[2]) for d in distances], 1
    )
    return jnp.median(distances, 1) if distances.shape[1] else jnp.ones(x.shape[0])


@jax.jit
def auto_temperature(tokens: jax.Array) -> jax.Array:
    """Returns the temperature "auto" of each map (B, H, W, C) -> (B,), without a gradient."""
    x = jax.lax.stop_gradient(tokens.astype(jnp.float32))
    spread = jnp.mean(jnp.sum((x - x.mean((1, 2), keepdims=True)) ** 2, -1), (1, 2))
    # The median of a map is 0 if most of its neighbours are equal.
    info = jnp.finfo(jnp.float32)
    return jnp.maximum(FACTOR * neighbor_distance(x), info.eps * spread) + info.tiny
