"""Rates other ways to make a model cheaper, at most at the cost of a setting of Expedite.

The rivals are a smaller image, adaptive average pooling in place of clustering, Token Merging,
weighted K-Medoids, and the clustered queries of ACT. All keep the weights of the model. Pooling
keeps the blocks and the map of the setting; the others use the most pixels, tokens or prototypes
whose cost does not exceed the setting's. ACT, which makes only attention cheaper, often has none.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from tokenvit_jax.expediting.candidates import Candidate, macs_of, with_backbone, with_expedite
from tokenvit_jax.models import swin, vit
from tokenvit_jax.models.backbone import MIN_IMAGE_SIZE, backbone_of
from tokenvit_jax.models.reducers import ACT

REDUCERS = ("tome", "weighted_kmedoids", ACT)


class Rival(NamedTuple):
    """Another method, and what it does to a model.

    Attributes:
      name: name of the method.
      setting: its setting; for a reducer in the form of command-line flags.
      macs: its MACs, as a fraction of the plain model's.
      similarity: cosine between its features and the plain model's, at most 1.
    """

    name: str
    setting: str
    macs: float
    similarity: float


def rate_rivals(
    model: nn.Module,
    variables: Any,
    images: jax.Array,
    chosen: Candidate,
    similarity_of: Callable[[jax.Array], float],
) -> list[Rival]:
    """Returns the rivals that the model allows and that the cost of a setting suffices for.

    Args:
      model: classifier, segmentation or depth model without clustering.
      variables: variables of the model.
      images: (B, H, W, channels), normalised.
      chosen: the setting and its MACs, as a fraction of the plain model's.
      similarity_of: function from a last map (B, h, w, C) to its similarity, such as
        :meth:`tokenvit_jax.expediting.similarity.Comparison.of_features`.
    """
    size, channels = images.shape[1:3], images.shape[-1]
    plain, budget = macs_of(model, size, channels), chosen.macs
    host = with_backbone(model, backbone_of(model).clone(remat=False))
    variables = jax.device_put(variables)

    def rate(name, setting, model, images, macs):
        similarity = similarity_of(last_map(model, variables, images, size))
        return Rival(name, setting, macs, similarity)

    rivals = []
    smaller = smaller_image(model, size, budget * plain, channels)
    if smaller:
        height, width = smaller
        resized = jax.image.resize(images, (len(images), *smaller, images.shape[3]), "bilinear")
        macs = macs_of(model, smaller, channels) / plain
        rivals.append(rate("smaller image", f"{height}x{width} pixels", host, resized, macs))
    pooled = adaptive_pooling(chosen.expedite)
    macs = macs_of(with_expedite(model, pooled), size, channels) / plain
    setting = "{}x{} centres".format(*pooled.clusters)
    rivals.append(rate("adaptive pooling", setting, with_expedite(host, pooled), images, macs))
    for method in REDUCERS if allows_reducers(backbone_of(model)) else ():
        keep = reduced_tokens(model, size, method, budget * plain, channels)
        if keep:
            reducer = best_reducer(method, keep)
            macs = macs_of(with_reducer(model, reducer), size, channels) / plain
            carry = reducer["carry"]
            setting = f"--method={method}{' --carry' * carry} --keep={','.join(map(str, keep))}"
            name = f"{method}{', carry' * carry}"
            rivals.append(rate(name, setting, with_reducer(host, reducer), images, macs))
    return rivals


def last_map(
    model: nn.Module, variables: Any, images: jax.Array, image_size: tuple[int, int]
) -> jax.Array:
    """Returns the last map that a head reads, resized bilinearly to the map of another image size.

    Args:
      model: a model of any task, or a backbone.
      variables: variables of the model.
      images: (B, H, W, channels), normalised.
      image_size: height and width [pixels] whose map the result fits.
    """

    @jax.jit
    def compute(variables, images):
        y = model.apply(variables, images, False, method="maps")[-1]
        grid = tuple(-(-side // backbone_of(model).strides[-1]) for side in image_size)
        return jax.image.resize(y, (len(y), *grid, y.shape[-1]), "bilinear")

    return compute(variables, images)


def smaller_image(
    model: nn.Module, image_size: tuple[int, int], budget: float, channels: int = 3
) -> tuple[int, int] | None:
    """Returns the largest image of nearly the same shape within a budget; None: there is none.

    Args:
      model: the model.
      image_size: height and width [pixels] of the full image.
      budget: highest allowed number of MACs.
      channels: number of channels of the images.
    """
    backbone = backbone_of(model)
    stage = backbone.settings.expedited_stage if isinstance(backbone, swin.Swin) else 0
    stride = math.lcm(backbone.strides[stage], getattr(model, "multiple", 1))
    grid = np.array(image_size) / stride
    # Sides change one by one, so that the steps are fine.
    maps = {tuple(np.round(grid * part + (0.25, -0.25))) for part in np.arange(0.995, 0, -0.01)}
    sizes = [tuple(int(side) * stride for side in sides) for sides in maps]
    sizes = [(h, w) for h, w in sizes if h * w < math.prod(image_size) and h <= image_size[0]]
    sizes = [size for size in sizes if min(size) >= MIN_IMAGE_SIZE]
    cost = functools.partial(macs_of, model, channels=channels)
    return largest_within(sorted(sizes, reverse=True), budget, cost)


def adaptive_pooling(expedite: Any) -> Any:
    """Returns a setting with average pooling and bilinear upsampling in place of clustering."""
    default = {field.name: field.default for field in dataclasses.fields(expedite)}
    unread = {name: default[name] for name in ("window", "neighbors", "normalize")}
    return dataclasses.replace(expedite, iterations=0, mode="bilinear", **unread)


def allows_reducers(backbone: nn.Module) -> bool:
    """Returns whether token reducers can be inserted into a backbone."""
    return isinstance(backbone, vit.VisionTransformer) and backbone.settings.pool == "token"


def with_reducer(model: nn.Module, reducer: dict[str, Any]) -> nn.Module:
    """Returns a copy of a model whose plain backbone has a token reducer."""
    return with_backbone(model, backbone_of(model).clone(token_reducer=reducer))


def best_reducer(method: str, keep: tuple[int, ...]) -> dict[str, Any]:
    """Returns the attributes of a reducer for a model that was trained without one."""
    return {"method": method, "keep": keep, "carry": method != ACT}


def reduced_tokens(
    model: nn.Module, image_size: tuple[int, int], method: str, budget: float, channels: int = 3
) -> tuple[int, ...] | None:
    """Returns the most patches after each block within a budget; None: there are none.

    Every block removes the same number of patches, up to rounding; ACT has the same number of
    prototypes in every block.

    Args:
      model: the model.
      image_size: height and width [pixels].
      method: method of the reducer.
      budget: highest allowed number of MACs.
      channels: number of channels of the images.
    """
    settings = backbone_of(model).settings
    num_patches = int(np.prod(settings.grid(*image_size)))
    lasts, depth = range(num_patches - 1, 0, -1), settings.depth
    if method == ACT:
        keeps = [(last,) * depth for last in lasts]
    else:
        keeps = [linear_keep(num_patches, depth, last) for last in lasts]

    def count(keep):
        return macs_of(with_reducer(model, best_reducer(method, keep)), image_size, channels)

    return largest_within(keeps, budget, count)


def linear_keep(num_patches: int, depth: int, last: int) -> tuple[int, ...]:
    """Returns K of every block if it falls linearly to ``last`` after the last block.

    A block keeps at least half of its patches, as Token Merging must.
    """
    keep = []
    for block in range(1, depth + 1):
        wanted = num_patches - round((num_patches - last) * block / depth)
        keep.append(max(wanted, -(-(keep[-1] if keep else num_patches) // 2)))
    return tuple(keep)


def largest_within(options: Sequence, budget: float, cost: Callable[[Any], float]) -> Any:
    """Returns the first option, ordered by falling cost, within a budget; None if none is."""
    at = bisect.bisect_left(options, True, key=lambda option: cost(option) <= budget)
    return options[at] if at < len(options) else None
