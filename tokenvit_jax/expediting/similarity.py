"""Compares the features of a model with and without clustering, for many settings."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenvit_jax.expediting.candidates import describe_host, with_backbone, with_expedite
from tokenvit_jax.models import swin, vit
from tokenvit_jax.models.backbone import backbone_of
from tokenvit_jax.models.expedite import FACTOR, Expedite, neighbor_distance


def similarity(model: nn.Module, variables: Any, images: jax.Array, expedite: Expedite) -> float:
    """Returns the cosine similarity of a host's features with and without clustering.

    The similarity is computed in float32 and averaged over images and positions of the map. The
    features are the patches of a plain host after its last LayerNorm, or the last map of a
    hierarchical host; of a depth model, the patches of the last tap.

    Args:
      model: classifier, segmentation or depth model.
      variables: variables of the model.
      images: (B, H, W, 3), normalised.
      expedite: the setting.

    References:
      Liang et al. 2022, Table 1, which compares intermediate layers.
    """
    return Comparison(model, variables, images)(expedite)


class Comparison:
    """:func:`similarity` as a function of the setting, fast for many settings.

    A block is compiled once for every number of tokens, not once for every setting. Blocks that
    settings share run once: the blocks before the clustering and, if successive settings differ
    only in `beta`, the blocks on the centres.
    """

    def __init__(self, model: nn.Module, variables: Any, images: jax.Array, method: str = "maps"):
        """Computes the features without clustering.

        Args:
          model: classifier, segmentation or depth model.
          variables: variables of the model.
          images: (B, H, W, 3), normalised.
          method: what is compared: the last of the "maps" that a head reads, or the "pooled"
            features of a classifier.
        """
        self._model = with_backbone(model, backbone_of(model).clone(expedite=None, remat=False))
        self._variables = jax.device_put(variables)
        self._images, self._method = jnp.asarray(images), method
        before = describe_host(backbone_of(self._model), self._images.shape[1:3]).first
        self._blocks = _BlockRunner(before)
        self._plain = self.features(None)

    def __call__(self, expedite: Expedite) -> float:
        return self.of_features(self.features(expedite))

    def of_features(self, features: jax.Array) -> float:
        """Returns the similarity of another last map of the same images (B, h, w, C)."""
        return float(mean_cosine(features, self._plain))

    def distance(self, alpha: int) -> float:
        """Returns the median squared distance of neighbouring tokens after ``alpha`` blocks.

        Args:
          alpha: number of blocks of the part that :func:`describe_host` describes, from 1.

        Returns:
          The median over the images of :func:`neighbor_distance`.
        """
        tokens = self._blocks.plain_output(alpha - 1)
        backbone = backbone_of(self._model)
        if isinstance(backbone, vit.VisionTransformer):
            settings, x = backbone.settings, tokens[0]
            grid = settings.grid(*self._images.shape[1:3])
            tokens = x[:, settings.num_front :].reshape(len(x), *grid, x.shape[-1])
        return float(jnp.median(neighbor_distance(tokens)))

    def features(self, expedite: Expedite | None) -> jax.Array:
        """Returns the compared features with a setting; None: without clustering."""
        model = with_expedite(self._model, expedite)
        self._blocks.begin(expedite)
        with nn.intercept_methods(self._blocks):
            found = model.apply(self._variables, self._images, False, method=self._method)
        return found if self._method == "pooled" else found[-1]


def measured(expedite: Expedite, distance: float, factor: float = FACTOR) -> Expedite:
    """Returns a setting whose temperature is a number.

    Args:
      expedite: the setting.
      distance: result of :meth:`Comparison.distance` for its `alpha`.
      factor: temperature divided by distance.

    Returns:
      The setting with the temperature rounded to three digits, so that it can be written down.
    """
    temperature = float(f"{max(factor * distance, jnp.finfo(jnp.float32).tiny):.3g}")
    return dataclasses.replace(expedite, temperature=temperature)


@jax.jit
def mean_cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the mean cosine of vectors (..., C) in float32; a vector of zeros counts as 0."""
    x, y = (a.astype(jnp.float32) for a in (x, y))
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.mean(jnp.sum(x * y, -1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny))


class _BlockRunner:
    """Runs the blocks of a host that is applied outside `jax.jit`, and caches their results."""

    def __init__(self, before: int):
        self._before = before
        self._compiled, self._plain, self._centers = {}, {}, {}
        self._clustering = None

    def begin(self, expedite):
        """Starts a forward pass; the first one is without clustering."""
        self._number, self._expedite = -self._before, expedite
        clustering = expedite and dataclasses.replace(expedite, beta=0, where="blocks")
        if clustering != self._clustering:
            self._clustering, self._centers = clustering, {}

    def __call__(self, call, args, kwargs, context):
        block = context.module
        # The copy that `_run` compiles has no name.
        is_block = isinstance(block, vit.Block | swin.SwinBlock) and block.name is not None
        if not is_block or context.method_name != "__call__":
            return call(*args, **kwargs)
        results, number = self._known(), self._number
        self._number += 1
        if number not in results:
            results[number] = self._run(block, *args)
        return results[number]

    def plain_output(self, number):
        """Returns the output of a block, counted from 0, without clustering."""
        return self._plain[number]

    def _known(self):
        """Returns the results {block number: output} that are valid for the next block."""
        expedite, number = self._expedite, self._number
        if expedite is None or number < expedite.alpha:
            return self._plain
        return self._centers if number < expedite.alpha + expedite.beta else {}

    def _run(self, block, x, *settings):
        key = x.shape, getattr(block, "shifted", None)
        if key not in self._compiled:
            same = block.clone(parent=None, name=None)
            self._compiled[key] = jax.jit(lambda variables, x: same.apply(variables, x, *settings))
        return self._compiled[key](block.variables, x)
