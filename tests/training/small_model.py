"""A classifier with every kind of state that a step handles, and that compiles in seconds."""

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from tokenvit_jax.layers import (
    DropPaths,
    DynamicGroupAttention,
    advance_centroids,
    batch_norm,
    drop_branch,
)
from tokenvit_jax.models.backbone import Trainable
from tokenvit_jax.ops.batch_norm import DeviceGroups
from tokenvit_jax.tasks import default_config

NUM_CLASSES = 5
BATCH_SIZE = 16


class SmallModel(Trainable):
    """Patches, BatchNorm, attention in groups, stochastic depth."""

    axis_name: str | None = None
    has_batch_norm: bool = True
    drop_path: float = 0.5
    old_weight: float = 0.9
    norm_group: int = 0  # devices that share statistics; 0: all

    @property
    def local_statistics(self):
        return self.norm_group > 0

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        # No bias: before BatchNorm its gradient is rounding noise, which Adam would blow up.
        x = nn.Conv(8, (8, 8), strides=8, use_bias=False, name="patches")(images)
        x = x.reshape(x.shape[0], -1, 8)
        if self.has_batch_norm:
            axis = DeviceGroups(self.axis_name, self.norm_group)
            axis = axis if self.norm_group else self.axis_name
            norm = batch_norm(dtype=x.dtype, axis_name=axis, name="norm")
            x = norm(x, use_running_average=not train)
        y = DynamicGroupAttention(num_heads=2, num_groups=3, top_k=4, name="attention")(x, train)
        _, factors = DropPaths(self.drop_path, 2, self.axis_name)(len(x), train)
        x = x + drop_branch(y, factors[1])
        return nn.Dense(NUM_CLASSES, name="head")(x.mean(axis=1))

    def after_step(self, variables, learning_rate):
        centroids = advance_centroids(
            variables["centroids"], self.old_weight, axis_name=self.axis_name
        )
        return {**variables, "centroids": centroids}


def small_config() -> ConfigDict:
    """A configuration for the small model."""
    config = default_config("classification")
    config.image_size = 32
    config.batch_size = BATCH_SIZE
    config.num_steps = 10
    config.optimizer.learning_rate = 1e-2
    return config


def random_batch(seed: int) -> dict[str, np.ndarray]:
    """A global batch of random pixels and labels."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (BATCH_SIZE, 32, 32, 3), dtype=np.uint8),
        "label": rng.integers(0, NUM_CLASSES, BATCH_SIZE, dtype=np.int32),
        "skipped": rng.integers(0, 2, BATCH_SIZE, dtype=np.int32),
    }
