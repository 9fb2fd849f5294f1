"""The state that a training run carries from step to step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from ml_collections import ConfigDict

from tokenvit_jax.config import input_shape
from tokenvit_jax.kernels.platforms import default_forms


class TrainState(struct.PyTreeNode):
    """The whole state of a run, without random keys (see :func:`step_rng`).

    Attributes:
      step: () int32, number of steps done.
      params: parameters, float32.
      model_state: the model's other collections, such as "batch_stats" and "centroids".
      opt_state: state of the optimizer.
      ema: moving averages of "params" and, if the model has them, "batch_stats"; None: off.
        Averaged parameters need averaged statistics, because the latest statistics belong to the
        latest parameters.
      skipped: () int32, number of unreadable images passed over so far.
    """

    step: jax.Array
    params: dict
    model_state: dict
    opt_state: optax.OptState
    ema: dict | None
    skipped: jax.Array


def eval_variables(params: dict, model_state: dict, ema: dict | None = None) -> dict[str, Any]:
    """Returns a model's variables for evaluation, from the entries of a :class:`TrainState`.

    Args:
      params: parameters.
      model_state: other collections.
      ema: moving averages, which replace the averaged variables; None: off.
    """
    return {"params": params, **model_state, **(ema or {})}


def step_rng(seed: int, step: jax.Array) -> jax.Array:
    """Returns the random key of a training step, so that a resumed run draws the same numbers."""
    return jax.random.fold_in(jax.random.key(seed), step)


def step_rngs(seed: int, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the random keys of the batch and of the model in a step, numbered from 0."""
    batch_rng, model_rng = jax.random.split(step_rng(seed, step))
    return batch_rng, model_rng


def init_state(
    model: nn.Module, optimizer: optax.GradientTransformation, config: ConfigDict
) -> TrainState:
    """Returns the state before the first step, as a pure function to run under `jax.jit`.

    Args:
      model: linen module, called as `model(images, train=...)`.
      optimizer: optax transformation.
      config: configuration; reads `seed`, `image_size`, `in_channels` and `ema_decay`.
    """
    # Steps count from 0 upwards, so no step has this key.
    rng = step_rng(config.seed, jnp.uint32(2**32 - 1))
    images = jnp.zeros((1, *input_shape(config)))
    with default_forms():
        variables = model.init(rng, images, train=False)
    return first_state(variables, optimizer, config)


def first_state(
    variables: Mapping[str, Any], optimizer: optax.GradientTransformation, config: ConfigDict
) -> TrainState:
    """Returns the state before the first step with these variables.

    Args:
      variables: of the model.
      optimizer: optax transformation.
      config: reads `ema_decay`.
    """
    model_state = dict(variables)
    params = model_state.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(params),
        ema=averaged_variables(params, model_state) if config.ema_decay else None,
        skipped=jnp.zeros((), jnp.int32),
    )


def averaged_variables(params: dict, model_state: dict) -> dict:
    """Returns copies of the variables whose moving averages are kept."""
    variables = {"params": params}
    if "batch_stats" in model_state:
        variables["batch_stats"] = model_state["batch_stats"]
    # Copies: a buffer that occurs twice in a donated state could not be donated.
    return jax.tree.map(jnp.copy, variables)
