"""Draws variables of a model at random: initial variables hide mistakes behind zeros."""

import jax
import numpy as np

from tokenvit_jax.models.backbone import variable_shapes


def random_variables(model, images):
    """Returns variables for `model.apply`; only the shape of images (B, H, W, 3) matters."""
    shapes = variable_shapes(model, images)
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda x: 0.3 * draw.normal(size=x.shape).astype(np.float32), shapes)
