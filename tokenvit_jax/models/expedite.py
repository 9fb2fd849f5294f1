"""Token clustering and reconstruction around the middle blocks of a trained host.

Expedite (Liang et al. 2022, "Expediting Large-Scale Vision Transformer for Dense Prediction without
Fine-tuning"): the first blocks see all tokens, the next ones the centres of superpixels, the last
ones all tokens again, put together from the refined centres. The parameters stay those of the host.
"""

import dataclasses

import jax

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Expedite:
    """Where tokens are clustered and reconstructed, and how.

    Attributes:
      alpha: blocks on all tokens, before the clustering; from 1.
      beta: blocks on the centres, after which all tokens are reconstructed; from 1.
      clusters: rows and columns of the centres (h, w).
      window: side of the neighbourhood of cells that a token can belong to, odd.
      iterations: rounds of clustering.
      temperature: tau, of both softmaxes.
      neighbors: nearest centres that a token is put together from; at most all of them.
    """

    alpha: int
    beta: int
    clusters: tuple[int, int]
    window: int = 5
    iterations: int = 5
    temperature: float = 50.0
    neighbors: int = 20

    def check(self, depth: int) -> None:
        """Raises UserError unless clustering and reconstruction fit into ``depth`` blocks."""
        for name, last in (("alpha", depth - 1), ("beta", depth - self.alpha)):
            if not 1 <= getattr(self, name) <= last:
                raise UserError(
                    f"expedite.{name}={getattr(self, name)} is not valid; valid: 1 to {last} in a "
                    f"model of {depth} blocks"
                )
        for name, fits, valid in (
            ("window", self.window >= 1 and self.window % 2 == 1, "odd numbers from 1"),
            ("iterations", self.iterations >= 0, "numbers from 0"),
            ("temperature", self.temperature > 0, "above 0"),
            ("neighbors", self.neighbors >= 1, "numbers from 1"),
        ):
            if not fits:
                value = getattr(self, name)
                raise UserError(f"expedite.{name}={value} is not valid; valid: {valid}")

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raises UserError unless there are fewer centres than tokens, in rows and columns."""
        if len(self.clusters) != 2 or not all(
            1 <= size <= most for size, most in zip(self.clusters, grid, strict=True)
        ):
            raise UserError(
                f"expedite.clusters={self.clusters} is not valid; valid: rows and columns from 1 "
                f"to those of the map, {grid[0]} x {grid[1]}"
            )

    def cluster(self, tokens: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Returns the centres (B, h w, C) of tokens (B, H W, C)."""
        self.check_grid(grid)
        settings = {name: getattr(self, name) for name in ("window", "iterations", "temperature")}
        return ops.cluster_superpixels(tokens, grid, self.clusters, **settings)

    def reconstruct(self, tokens: jax.Array, centers: jax.Array, refined: jax.Array) -> jax.Array:
        """Returns all tokens (B, N, C) from the centres before and after the middle blocks."""
        settings = {name: getattr(self, name) for name in ("neighbors", "temperature")}
        return ops.reconstruct_tokens(tokens, centers, refined, **settings)
