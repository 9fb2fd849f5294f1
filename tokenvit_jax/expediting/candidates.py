"""Lists the settings of Expedite that are worth trying for a model, with their multiply-adds.

The multiply-adds (MACs) are linear in the number of blocks on centres, so only a few settings need
to be counted.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tokenvit_jax.errors import UserError
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.models import swin, vit
from tokenvit_jax.models.backbone import backbone_of, variable_shapes
from tokenvit_jax.models.expedite import Expedite

# Sides of the maps of centres, as fractions of the sides of the map of tokens.
FRACTIONS = np.linspace(0.3, 0.95, 8)


class Candidate(NamedTuple):
    """A setting and its cost.

    Attributes:
      expedite: the setting.
      macs: its MACs, as a fraction of the plain model's.
    """

    expedite: Expedite
    macs: float


class Host(NamedTuple):
    """The part of a backbone that can be expedited.

    Attributes:
      first: number of blocks before this part.
      depth: number of blocks in this part.
      grids: possible maps of centres (h, w), smallest first.
      ends: whether settings that cluster up to the last block reconstruct "logits" instead of
        "blocks".
    """

    first: int
    depth: int
    grids: list[tuple[int, int]]
    ends: bool


def with_expedite(model: nn.Module, expedite: Expedite | None) -> nn.Module:
    """Returns a copy of a model whose backbone has this setting; None: no clustering."""
    return with_backbone(model, backbone_of(model).clone(expedite=expedite))


def with_backbone(model: nn.Module, backbone: nn.Module) -> nn.Module:
    """Returns a copy of a model with another backbone."""
    return backbone if model is backbone_of(model) else model.clone(backbone=backbone)


def macs_of(model: nn.Module, image_size: tuple[int, int], channels: int = 3) -> int:
    """Counts the MACs of a model for one image of (height, width) pixels."""
    images = jax.ShapeDtypeStruct((1, *image_size, channels), jnp.float32)
    variables = variable_shapes(model, images)
    return count_macs(lambda *args: model.apply(*args, False), variables, images)


def describe_host(backbone: nn.Module, image_size: tuple[int, int]) -> Host:
    """Returns the part of a backbone that can be expedited for images of a size.

    Args:
      backbone: result of :func:`backbone_of`.
      image_size: height and width [pixels].

    Raises:
      UserError: the backbone has no map of tokens to cluster, its tokens are reduced already, or it
        has too few tokens or blocks.
    """
    name = type(backbone).__name__
    if not isinstance(backbone, vit.VisionTransformer | swin.Swin):
        raise UserError(f"{name} has no blocks on centres; valid: deit, vit, swin and swinv2")
    settings = backbone.settings
    for setting in ("token_reducer", "expedite"):
        if getattr(settings, setting, None) is not None:
            raise UserError(
                f"config.model_overrides.{setting}={getattr(settings, setting)} reduces the tokens "
                "already; valid: the run of a plain model"
            )
    if isinstance(backbone, swin.Swin):
        stage = settings.expedited_stage
        first, depth = sum(settings.depths[:stage]), settings.depths[stage]
        grid = tuple(-(-size // backbone.strides[stage]) for size in image_size)
        window, _ = swin.windows_of(grid, settings.window_size, False)
        host = Host(first, depth, [(side, side) for side in range(2, min(window))], ends=False)
    else:
        grid = settings.grid(*image_size)
        grids = {tuple(max(1, round(part * size)) for size in grid) for part in FRACTIONS}
        host = Host(0, settings.depth, sorted(grids - {grid}), ends=True)
    if host.depth < 2 or not host.grids:
        raise UserError(
            f"{name} with {host.depth} blocks on {grid[0]} x {grid[1]} tokens, or on windows of "
            "them, has nothing to expedite; valid: at least 2 blocks, larger images"
        )
    return host


def reads_taps(model: nn.Module) -> bool:
    """Returns whether a model's head reads the tokens after several blocks, as DPT's does."""
    return getattr(getattr(model, "head", None), "reads", "") == "taps"


def list_candidates(
    model: nn.Module, image_size: tuple[int, int], channels: int = 3
) -> list[Candidate]:
    """Returns all settings that are worth trying for a model.

    Clustering begins after any block. In a plain host, the maps of centres have about 0.3 to 0.95
    of the rows and columns of the map of tokens. If centres go on to the last block, the output of
    the head is reconstructed, as in the published Segmenter; otherwise the output of a block is. In
    a depth model, every output that the head reads is reconstructed on its own. In a Swin
    Transformer, windows have any number of centres; its later stages need all tokens.

    Args:
      model: classifier, segmentation or depth model.
      image_size: height and width [pixels].
      channels: number of channels of the images.

    Raises:
      UserError: the model cannot be expedited, see :func:`describe_host`.
    """
    host = describe_host(backbone_of(model), image_size)
    if reads_taps(model):  # each tap is reconstructed on its own, in front of the head
        host = host._replace(ends=False)

    @functools.cache
    def count(expedite):
        return macs_of(with_expedite(model, expedite), image_size, channels)

    plain, found = count(None), []
    for clusters in host.grids:
        by_where = _settings_by_beta(host, clusters)
        # The MACs that a block adds do not depend on what is reconstructed.
        widest = max(by_where, key=len)
        few, many = min(widest), max(widest)
        added = (count(widest[many][0]) - count(widest[few][0])) // max(many - few, 1)
        for settings in by_where:
            first = min(settings)
            base = count(settings[first][0])
            for beta, expedites in settings.items():
                macs = (base + (beta - first) * added) / plain
                found += [Candidate(expedite, macs) for expedite in expedites]
    return found


def _settings_by_beta(host, clusters):
    """Returns a dict {beta: settings} for each `where`, all with the same map of centres."""
    by_beta = {"blocks": {}, "logits": {}}
    for alpha in range(1, host.depth):
        for beta in range(1, host.depth - alpha + 1):
            where = "logits" if host.ends and alpha + beta == host.depth else "blocks"
            expedite = Expedite(alpha, beta, clusters, where)
            by_beta[where].setdefault(beta, []).append(expedite)
    return [settings for settings in by_beta.values() if settings]
