"""Ways to make a network cheaper, at no more than the cost of a setting of Expedite."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn

from experiments import predictors
from tokenvit_jax.expediting.candidates import macs_of, with_expedite
from tokenvit_jax.expediting.rivals import (
    adaptive_pooling,
    largest_within,
    reduced_tokens,
    smaller_image,
    with_reducer,
)
from tokenvit_jax.models.backbone import backbone_of
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.models.reducers import ACT, DYNAMICVIT, evit_keep

# EViT and DynamicViT reduce in three blocks, as in their papers; a finer grid of rates.
BLOCKS = (4, 7, 10)
RATES = [round(0.99 - 0.01 * step, 2) for step in range(98)]
# Remaining tokens from which a dropped patch is reconstructed, as in Expedite.
NEIGHBORS = 20
# Label -> attributes of the reducer.
REDUCERS = {
    "ToMe, carry": {"method": "tome", "carry": True},
    "ToMe": {"method": "tome"},
    "weighted K-Medoids, carry": {"method": "weighted_kmedoids", "carry": True},
    "weighted K-Medoids": {"method": "weighted_kmedoids"},
    "K-Medoids": {"method": "kmedoids"},
    "weighted K-Means": {"method": "weighted_kmeans"},
    "K-Means": {"method": "kmeans"},
    "EViT": {"method": "evit"},
    "EViT, reconstructed": {"method": "evit", "neighbors": NEIGHBORS},
    "DynamicViT": {"method": DYNAMICVIT},
    "DynamicViT, reconstructed": {"method": DYNAMICVIT, "neighbors": NEIGHBORS},
    "PoWER-BERT": {"method": "powerbert"},
    "PoWER-BERT, reconstructed": {"method": "powerbert", "neighbors": NEIGHBORS},
    "importance": {"method": "importance"},
    "random": {"method": "random"},
    "random, reconstructed": {"method": "random", "neighbors": NEIGHBORS},
    "ACT": {"method": ACT},
}


class Method(NamedTuple):
    """A network with a setting.

    Attributes:
      model: the network.
      image_size: height and width of the images that it gets [pixels].
      about: the size that its cost depends on, for the table.
      keep: patches after every block, if predictors choose them; None: there are no predictors.
    """

    model: nn.Module
    image_size: tuple[int, int]
    about: str
    keep: tuple[int, ...] | None = None


def at_cost_of(
    model: nn.Module,
    expedite: Expedite,
    image_size: tuple[int, int],
    reducers: list[str],
    remember: Callable[[str, Callable[[], Any]], Any],
) -> dict[str, Method]:
    """Returns Expedite and the methods that cost at most as much, by name.

    ACT makes only attention cheaper and may not reach the cost: then it has as many prototypes per
    head as Expedite has centres, and costs more.

    Args:
      model: the plain network, a backbone.
      expedite: setting with a temperature.
      image_size: height and width [pixels].
      reducers: some keys of REDUCERS.
      remember: function of a name and of a function that finds a size, which takes long.
    """
    clusters = "{} x {}".format(*expedite.clusters)
    own = with_expedite(model, expedite)
    budget = remember("Expedite", lambda: macs_of(own, image_size))
    about = f"{expedite.alpha}, {expedite.beta}, {clusters}"
    methods = {
        "Expedite": Method(own, image_size, about),
        "adaptive pooling": Method(
            with_expedite(model, adaptive_pooling(expedite)), image_size, about
        ),
    }
    smaller = remember("smaller image", lambda: smaller_image(model, image_size, budget))
    if smaller:
        methods["smaller image"] = Method(model, tuple(smaller), "{} x {} pixels".format(*smaller))
    for name in reducers:
        method = REDUCERS[name]["method"]
        find = functools.partial(kept_tokens, model, image_size, method, budget)
        keep = remember(method, find) or (math.prod(expedite.clusters),) * model.settings.depth
        reducer = REDUCERS[name] | {"keep": tuple(keep)}
        about = f"{keep[-1]} prototypes" if method == ACT else f"{keep[-1]} at the end"
        predicted = reducer["keep"] if method == DYNAMICVIT else None
        methods[name] = Method(with_reducer(model, reducer), image_size, about, predicted)
    return methods


def kept_tokens(
    model: nn.Module, image_size: tuple[int, int], method: str, budget: float
) -> tuple[int, ...]:
    """Returns the number of patches after every block of the dearest reducer within a budget."""
    if method not in ("evit", DYNAMICVIT):
        return reduced_tokens(model, image_size, method, budget)
    settings = backbone_of(model).settings
    if method == DYNAMICVIT:
        keeps = predictors.keeps(backbone_of(model), image_size, BLOCKS, RATES)
    else:
        num_patches = math.prod(settings.grid(*image_size))
        keeps = [evit_keep(num_patches, settings.depth, rate, BLOCKS) for rate in RATES]
    return largest_within(keeps, budget, _cost(model, image_size, method))


def _cost(model: nn.Module, image_size: tuple[int, int], method: str) -> Callable[[Any], int]:
    return lambda keep: macs_of(with_reducer(model, {"method": method, "keep": keep}), image_size)
