"""How similar the features of a model are with and without clustering, for many settings."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenvit_jax.expedite_search import describe_host
from tokenvit_jax.models import swin, vit
from tokenvit_jax.models.backbone import backbone_of, backbone_variables
from tokenvit_jax.models.expedite import Expedite


def similarity(model: nn.Module, variables: Any, images: jax.Array, expedite: Expedite) -> float:
    """Returns how similar the features of a host are with and without clustering.

    It is the cosine of both, in float32, mean over the places of the map and the images. The
    features are those of a plain host after its last LayerNorm, or the last map of a hierarchical
    one.

    Args:
      model: classifier or segmentation model.
      variables: of it.
      images: (B, H, W, 3), normalised.
      expedite: the setting.

    Source: Liang et al. 2022, Table 1, there of inner layers.
    """
    return Comparison(model, variables, images)(expedite)


class Comparison:
    """:func:`similarity` as a function of the setting, which is quick for many of them.

    A block is compiled once for every number of tokens, not once for every setting; the blocks that
    several settings have in common run once: those before the clustering, and those on the centres
    where settings that follow one another differ in `beta` alone.
    """

    def __init__(self, model: nn.Module, variables: Any, images: jax.Array):
        """Computes the features without clustering; arguments as those of :func:`similarity`."""
        backbone = backbone_of(model)
        self._backbone = backbone.clone(expedite=None, remat=False)
        self._variables = jax.device_put(backbone_variables(model, variables))
        self._images = jnp.asarray(images)
        before = describe_host(self._backbone, self._images.shape[1:3]).first
        self._blocks = _BlockRunner(before)
        self._plain = self._features(None)

    def __call__(self, expedite: Expedite) -> float:
        return float(mean_cosine(self._features(expedite), self._plain))

    def _features(self, expedite):
        backbone = self._backbone.clone(expedite=expedite)
        self._blocks.begin(expedite)
        with nn.intercept_methods(self._blocks):
            maps = backbone.apply(self._variables, self._images, False, method="features")
        return maps[-1]


@jax.jit
def mean_cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the mean cosine of vectors (..., C) and others, in float32; that of 0 is 0."""
    x, y = (a.astype(jnp.float32) for a in (x, y))
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.mean(jnp.sum(x * y, -1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny))


class _BlockRunner:
    """Takes the place of the calls of the blocks of a host that is applied outside of `jax.jit`."""

    def __init__(self, before: int):
        self._before = before
        self._compiled, self._plain, self._centers = {}, {}, {}
        self._clustering = None

    def begin(self, expedite):
        """Starts a forward pass. Features without clustering come first."""
        self._number, self._expedite = -self._before, expedite
        clustering = expedite and dataclasses.replace(expedite, beta=0, where="blocks")
        if clustering != self._clustering:
            self._clustering, self._centers = clustering, {}

    def __call__(self, call, args, kwargs, context):
        block = context.module
        # A copy that is being compiled has no name.
        is_block = isinstance(block, vit.Block | swin.SwinBlock) and block.name is not None
        if not is_block or context.method_name != "__call__":
            return call(*args, **kwargs)
        results, number = self._known(), self._number
        self._number += 1
        if number not in results:
            results[number] = self._run(block, *args)
        return results[number]

    def _known(self):
        """Results of blocks, by number, that hold for the next one."""
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
