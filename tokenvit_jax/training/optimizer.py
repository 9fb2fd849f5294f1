"""AdamW with linear warm-up and cosine decay, as vision transformers are trained."""

import re

import jax
import optax
from ml_collections import ConfigDict

from tokenvit_jax.models.reducers import is_retention

# Matrices that are no weights of a layer, by the last part of their name.
_NO_DECAY_NAME = re.compile(r"bias|scale|pos_embed|position|token$|centroids")
# Layers without decay: the MLP that computes position biases, as in the code of Swin v2.
_NO_DECAY_LAYER = "position_bias"


def learning_rate_schedule(config: ConfigDict) -> optax.Schedule:
    """Returns the learning rate as a function of the step, counted from 0.

    Linear from `warmup_learning_rate` at step 0 to `learning_rate` at step `warmup_steps`, then
    half a cosine to `end_learning_rate` at the last step, `num_steps - 1`.
    """
    optimizer = config.optimizer
    return optax.warmup_cosine_decay_schedule(
        init_value=optimizer.warmup_learning_rate,
        peak_value=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
        # A run whose only step is the last one needs a decay of some length all the same.
        decay_steps=max(config.num_steps - 1, optimizer.warmup_steps + 1),
        end_value=optimizer.end_learning_rate,
    )


def weight_decay_mask(params: dict) -> dict:
    """Returns a tree of bools like `params`: True where weight decay applies.

    It does not apply to biases, norms, scales (all of them vectors or named so), positions and
    tokens.
    """

    def decays(path: tuple, leaf: jax.Array) -> bool:
        *layers, name = [part.key for part in path]
        exempt = _NO_DECAY_NAME.search(name) or _NO_DECAY_LAYER in layers
        return leaf.ndim > 1 and not exempt

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Returns the optimizer of a configuration: optional clipping by the global norm, then AdamW.

    Of a search for tokens, retention parameters take longer steps than the others.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization".
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        learning_rate_schedule(config),
        b1=config.optimizer.b1,
        b2=config.optimizer.b2,
        weight_decay=config.optimizer.weight_decay,
        mask=weight_decay_mask,
    )
    if not config.retention.penalty:
        return optax.chain(clip, adamw)
    faster = optax.masked(optax.scale(config.retention.learning_rate_factor), _retention_mask)
    return optax.chain(clip, adamw, faster)


def _retention_mask(params: dict) -> dict:
    return jax.tree_util.tree_map_with_path(lambda path, _: is_retention(path), params)
