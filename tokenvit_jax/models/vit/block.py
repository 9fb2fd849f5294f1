"""A block of a plain vision transformer, with the steps of reducers and predictors."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import truncated_normal

from tokenvit_jax import ops
from tokenvit_jax.layers import KEPT, AddLayerNorm, Attention, Factors, Mlp, drop_branch
from tokenvit_jax.layers.stochastic import image_keys
from tokenvit_jax.models import reducers
from tokenvit_jax.models.expedite import auto_temperature
from tokenvit_jax.models.reducers import Kept, Patches
from tokenvit_jax.models.vit.settings import ViTSettings
from tokenvit_jax.ops.gather import take


class Origin(NamedTuple):
    """Which patches the tokens of a block stand for.

    Attributes:
      size: number of patches that each token stands for (B, T).
      home: the token that stands for each patch of the image (B, N) int32, counted without the
        tokens in front; None: not recorded, because no map is needed.
      before: what reconstructs the patches instead, after the first reduction; None: ``home``.
      kept: which patches are left in training with "dynamicvit", where all tokens stay in the
        sequence; None: all. It has its own way back to the map.
    """

    size: jax.Array
    home: jax.Array | None
    before: "Before | None" = None
    kept: Kept | None = None

    def restore(self, tokens: jax.Array, neighbors: int = 1) -> jax.Array:
        """Maps the remaining tokens (B, n, D) back to all patches (B, N, D).

        Args:
          tokens: values of the remaining tokens (B, n, D).
          neighbors: number of tokens from which a patch is reconstructed, if there is ``before``.
        """
        if self.before is not None:
            patches, remaining, temperature = self.before
            return ops.reconstruct_tokens(
                patches, remaining, tokens, neighbors=neighbors, temperature=temperature
            )
        if self.kept is not None:
            return self.kept.restore(tokens)
        return tokens if self.home is None else take(tokens, self.home)


class Before(NamedTuple):
    """The tokens before the first reduction, from whose distances a map is reconstructed.

    Attributes:
      patches: all patches (B, N, C).
      remaining: the patches that are left (B, n, C); a fused token is fused here, too.
      temperature: tau of the softmax, for each map (B,).
    """

    patches: jax.Array
    remaining: jax.Array
    temperature: jax.Array


class Block(nn.Module):
    """x + attention(LN(x)), the reducer, x + MLP(LN(x)): (B, T, C) -> (B, T', C).

    The predictor of "dynamicvit" comes first. Layer scale multiplies the outputs of attention and
    MLP.

    Attributes:
      settings: the architecture.
      index: number of the block, from 0.
    """

    settings: ViTSettings
    index: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        origin: Origin,
        grid: tuple[int, int],
        train: bool,
        factors: Factors = KEPT,
    ) -> tuple[jax.Array, Origin]:
        """Computes the block.

        Args:
          x: tokens (B, T, C).
          origin: the patches that the tokens stand for.
          grid: rows and columns of the map of patches, as long as the patches form one.
          train: whether routing behaves as in training.
          factors: those of the attention and the MLP.

        Returns:
          The remaining tokens, and the patches that they stand for.
        """
        settings, reducer = self.settings, self.settings.token_reducer
        init = truncated_normal(settings.init_std)

        def norm(name):
            return AddLayerNorm(settings.norm_epsilon, settings.dtype, name=name)

        def scaled(y, name):
            if settings.layer_scale:
                scale = nn.initializers.constant(settings.layer_scale)
                y = y * self.param(name, scale, (settings.dim,)).astype(y.dtype)
            return y

        attention = Attention(
            settings.num_heads, settings.qk_norm, settings.init_std, settings.dtype,
            name="attention",
        )  # fmt: skip
        predicts = reducer is not None and reducer.predicts(
            self.index, math.prod(settings.grid(*settings.position_size))
        )
        if predicts:
            x, origin = self._predict(x, origin, grid, train)
        acts = (
            reducer is not None
            and reducer.method != reducers.DYNAMICVIT
            and reducer.acts(self.index, x.shape[1] - settings.num_front)
        )
        clusters_queries = acts and reducer.method == reducers.ACT
        carries = reducer is not None and (reducer.carry or origin.kept is not None)
        x, y = norm("norm1")(x)
        attended = attention(
            y,
            scored_by=reducer.scored_by if acts else None,
            diagonal=reducer is None or reducer.diagonal,
            size=origin.size if carries else None,
            prototypes=reducer.keep[self.index] if clusters_queries else None,
            num_alone=settings.num_front,
        )
        branch = scaled(attended.y, "scale1")
        if acts and not clusters_queries:
            x = x + drop_branch(branch, factors[0])
            tokens = Patches(x, attended.received, attended.keys, origin.size)
            x, origin = self._reduce(tokens, origin, grid, train)
            x, y = norm("norm2")(x)
        else:
            x, y = norm("norm2")(x, branch, factors[0])
        mlp = Mlp(settings.mlp_ratio, settings.dtype, init, settings.activation, name="mlp")
        return x + drop_branch(scaled(mlp(y), "scale2"), factors[1]), origin

    def _predict(self, x, origin, grid, train):
        """Drops the patches that the predictor does not keep; in training it masks them."""
        settings, reducer = self.settings, self.settings.token_reducer
        patches = x[:, settings.num_front :]
        left = jnp.ones(patches.shape[:2]) if origin.kept is None else origin.kept.policy
        init = truncated_normal(settings.init_std)
        predictor = reducers.KeepPredictor(settings.dtype, init, name="keep_predictor")
        scores = predictor(patches, left)
        num_kept, num_patches = reducer.keep[self.index], patches.shape[1]
        if num_kept >= num_patches:  # a smaller image
            return x, origin
        if not train:
            scores = jnp.pad(scores[..., 0], ((0, 0), (settings.num_front, 0)))
            return self._reduce(Patches(x, scores, None, origin.size), origin, grid, train)
        policy = reducers.sample_kept(scores, left, self._routing_keys(x.shape[0], train))
        penalty = reducer.penalty_of(self.index)
        if penalty is not None and not self.is_initializing():
            loss = reducers.ratio_loss(policy, num_kept / num_patches)
            self.sow("losses", "ratio", penalty * loss)
        home = origin.home
        if home is not None:
            home = take(reducers.nearest_kept(patches, policy), home)
        size = reducers.DROPPED + (1 - reducers.DROPPED) * policy
        size = jnp.concatenate([origin.size[:, : settings.num_front], size], 1)
        return x, Origin(size, home, kept=Kept(policy, home))

    def _reduce(self, tokens, origin, grid, train):
        """Reduces the patches; ``tokens`` also has the tokens in front."""
        settings, reducer = self.settings, self.settings.token_reducer
        home, before = origin.home, origin.before
        front = jax.tree.map(lambda t: t[:, : settings.num_front], tokens)
        patches = jax.tree.map(lambda t: t[:, settings.num_front :], tokens)
        match reducer.method:
            case reducers.CONVOLUTION:
                x = reducers.HalveMap(settings.dtype, name="halve_map")(patches.x, grid)
                size = jnp.ones(x.shape[:2], origin.size.dtype)
            case reducers.SEARCH:
                rows, columns = settings.grid(*settings.position_size)
                extract = reducers.SoftExtract(
                    rows * columns, reducer.penalty_of(self.index), name=reducers.SEARCH
                )
                x, size = extract(patches.x, patches.score, train), patches.size
            case _:
                num_kept = reducer.keep[self.index]
                if num_kept == 0:
                    return front.x, Origin(front.size, None)
                if home is not None and reducer.neighbors > 1:
                    before = before or self._before(patches.x, grid)
                    joined = jnp.concatenate([patches.x, before.remaining], -1)
                    patches = patches._replace(x=joined)
                x, size, new_home = reducers.reduce_tokens(
                    patches, num_kept, reducer, self._routing_keys(tokens.x.shape[0], train),
                    restorable=home is not None and before is None,
                )  # fmt: skip
                if before is not None:
                    x, remaining = jnp.split(x, 2, -1)
                    before = before._replace(remaining=remaining)
                elif home is not None:
                    home = take(new_home, home)
        size = jnp.concatenate([front.size, size], 1)
        return jnp.concatenate([front.x, x], 1), Origin(size, home, before)

    def _before(self, patches, grid):
        maps = patches.reshape(patches.shape[0], *grid, patches.shape[-1])
        return Before(patches, patches, auto_temperature(maps))

    def _routing_keys(self, batch, train):
        if train:
            return image_keys(self.make_rng("routing"), batch, self.settings.axis_name)
        # The result of an image must depend neither on its place in the batch nor on chance.
        return jnp.broadcast_to(jax.random.key(self.index), batch)
