"""Draws variables of a model at random: initial variables hide mistakes behind zeros."""

import functools

import jax
import numpy as np

from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.training.state import first_state, init_state


def random_variables(model, images):
    """Returns variables for `model.apply`; only the shape of images (B, H, W, 3) matters."""
    shapes = variable_shapes(model, images)
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda x: 0.3 * draw.normal(size=x.shape).astype(np.float32), shapes)


def random_state(model, optimizer, config, std=0.1):
    """Returns a state like `init_state`, without the seconds in which that compiles.

    Scales and variances are 1, other vectors 0, and matrices are normal with this deviation.
    """
    shapes = jax.eval_shape(functools.partial(init_state, model, optimizer, config))
    draw = np.random.default_rng(1)

    def values(path, x):
        if path[-1].key in ("scale", "var"):
            return np.ones(x.shape, x.dtype)
        return np.asarray(std * draw.normal(size=x.shape) * (x.ndim > 1), x.dtype)

    variables = {"params": shapes.params, **shapes.model_state}
    variables = jax.tree_util.tree_map_with_path(values, variables)
    return jax.jit(lambda variables: first_state(variables, optimizer, config))(variables)
