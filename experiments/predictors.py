"""Trains DynamicViT's predictors for a network that stays as it is, without labels.

The loss is what Expedite's Table 1 measures, 1 - cosine between the map with dropped patches, which
copy the nearest remaining one, and the plain network's map. DynamicViT's own loss holds the number
of kept patches. Nothing else is trained.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from tokenvit_jax.models.reducers import DYNAMICVIT, dynamicvit_keep

PENALTY = 2 / 3  # of each predictor, in the paper
STEPS = 60
BATCH = 4
LEARNING_RATE = 1e-3
REPORT_STEPS = 10


class Images(NamedTuple):
    """Normalised images (N, H, W, 3), and the plain network's normed map (N, h, w, C)."""

    pixels: np.ndarray
    plain: np.ndarray


def keeps(
    model: nn.Module, image_size: tuple[int, int], blocks: tuple[int, ...], rates: Sequence[float]
) -> list[tuple[int, ...]]:
    """Returns the numbers of patches after every block for each rate.

    Args:
      model: the plain network, a backbone.
      image_size: height and width [pixels].
      blocks: the blocks with a predictor, counted from 1.
      rates: rates of `dynamicvit_keep`.
    """
    settings = model.settings
    num_patches = math.prod(settings.grid(*image_size))
    # Blocks without a predictor keep all patches, also those of the images of position_size.
    everything = max(num_patches, math.prod(settings.grid(*settings.position_size)))
    found = [dynamicvit_keep(num_patches, settings.depth, rate, blocks) for rate in rates]
    return [tuple(everything if k == num_patches else k for k in keep) for keep in found]


def with_predictors(model: nn.Module, keep: tuple[int, ...], **changes: Any) -> nn.Module:
    """Returns the network with predictors."""
    return model.clone(token_reducer={"method": DYNAMICVIT, "keep": tuple(keep), **changes})


def train(
    model: nn.Module, variables: Mapping[str, Any], keep: tuple[int, ...], images: Images, seed: int
) -> dict[str, np.ndarray]:
    """Trains the predictors.

    Args:
      model: the plain network.
      variables: its variables.
      keep: patches after every block.
      images: the images to learn from.
      seed: seed of the first weights, the order of the images and the drawn decisions.

    Returns:
      The parameters of the predictors by path.
    """
    reduced = with_predictors(model, keep, penalty=PENALTY)
    own = flatten_dict(variables["params"], sep="/")
    key = jax.random.key(seed)

    @jax.jit
    def init(key):
        params = reduced.init(key, images.pixels[:1], train=False)["params"]
        return {p: x for p, x in flatten_dict(params, sep="/").items() if p not in own}

    found = init(key)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, STEPS))

    def loss_fn(found, own, pixels, plain, key):
        params = {"params": unflatten_dict(own | found, sep="/")}
        rngs = dict(zip(("routing", "dropout"), jax.random.split(key), strict=True))
        method = functools.partial(type(reduced).features, train=True)
        (maps,), losses = reduced.apply(
            params, pixels, rngs=rngs, method=method, mutable=["losses"]
        )
        similar = optax.losses.cosine_similarity(maps, plain).mean()
        return 1 - similar + sum(jax.tree.leaves(losses)), similar

    @jax.jit
    def step(found, opt_state, *inputs):
        (_, similar), grads = jax.value_and_grad(loss_fn, has_aux=True)(found, *inputs)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(found, updates), opt_state, similar

    opt_state, draw, similar = optimizer.init(found), np.random.default_rng(seed), []
    for number in range(STEPS):
        at = draw.choice(len(images.pixels), BATCH, replace=False)
        keys = jax.random.fold_in(key, number)
        found, opt_state, now = step(
            found, opt_state, own, images.pixels[at], images.plain[at], keys
        )
        similar.append(float(now))
        if (number + 1) % REPORT_STEPS == 0:
            mean = np.mean(similar[-REPORT_STEPS:])
            print(f"predictors, step {number + 1}: cosine {mean:.3f}", flush=True)
    return jax.device_get(found)


def add(variables: Mapping[str, Any], found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the variables of a network with its predictors."""
    own = flatten_dict(variables["params"], sep="/")
    return {**variables, "params": unflatten_dict(own | dict(found), sep="/")}
