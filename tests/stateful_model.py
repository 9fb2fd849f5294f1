"""A small classifier with every collection of variables that a backbone can have."""

import flax.linen as nn

from tokenvit_jax.layers import DynamicGroupAttention, advance_centroids
from tokenvit_jax.models.backbone import Trainable


class StatefulModel(Trainable):
    """Has parameters, batch statistics and centroids."""

    @nn.compact
    def __call__(self, images, train):
        tokens = images.reshape(images.shape[0], -1, 4)
        tokens = DynamicGroupAttention(num_heads=1, num_groups=3, top_k=5)(tokens, train)
        tokens = nn.BatchNorm(use_running_average=not train)(tokens)
        return nn.Dense(10)(tokens.mean(1))

    def after_step(self, variables, learning_rate):
        return {**variables, "centroids": advance_centroids(variables["centroids"], 0.9)}
