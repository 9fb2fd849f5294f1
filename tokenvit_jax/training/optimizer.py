"""AdamW or SGD with linear warm-up and decay, as vision transformers are trained.

For fine-tuning, layers can learn more slowly the closer they are to the images
(`optimizer.layer_decay`), the backbone more slowly than the head (`optimizer.backbone_factor`), or
some not at all (`optimizer.freeze`).
"""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from tokenvit_jax.ops.packed import norm_packed, update_packed
from tokenvit_jax.training.freezing import Frozen, map_paths

# Last parts of the names of arrays without weight decay although they are matrices.
_NO_DECAY_NAME = re.compile(
    r"bias|scale|pos_embed|position|token$|centroids|queries$|level_embedding$"
)
# A layer without weight decay: the MLP that computes position biases, as in the code of Swin v2.
_NO_DECAY_LAYER = "position_bias"


def learning_rate_schedule(config: ConfigDict) -> optax.Schedule:
    """Returns the learning rate as a function of the step, counted from 0.

    The rate rises linearly from `warmup_learning_rate` at step 0 to `learning_rate` at step
    `warmup_steps`; then it decays to `end_learning_rate` at the last step, `num_steps - 1`: by half
    a cosine, or by the remaining fraction of the steps to the power of `power`. Or it is multiplied
    by `milestone_factor` at each of the steps `milestones`, which are after the warm-up.

    Args:
      config: configuration; `num_steps` and `optimizer` are read.
    """
    optimizer = config.optimizer
    peak, end = optimizer.learning_rate, optimizer.end_learning_rate
    # Even in a run of one step, the decay needs a positive length.
    last = max(config.num_steps - 1, optimizer.warmup_steps + 1)
    if optimizer.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            optimizer.warmup_learning_rate, peak, optimizer.warmup_steps, last, end
        )
    warmup = optax.linear_schedule(optimizer.warmup_learning_rate, peak, optimizer.warmup_steps)
    if optimizer.schedule == "step":
        steps = [step - optimizer.warmup_steps for step in optimizer.milestones]
        factors = dict.fromkeys(steps, optimizer.milestone_factor)
        decay = optax.piecewise_constant_schedule(peak, factors)
    else:
        decay = optax.polynomial_schedule(peak, end, optimizer.power, last - optimizer.warmup_steps)
    return optax.join_schedules([warmup, decay], [optimizer.warmup_steps])


def weight_decay_mask(params: dict) -> dict:
    """Returns a tree of bools like `params`: True where weight decay applies.

    Weight decay does not apply to biases, norms and scales (recognised as vectors or by name), nor
    to position embeddings, learned tokens and queries, and embeddings of levels.
    """

    def decays(path: tuple, leaf: jax.Array) -> bool:
        *layers, name = [part.key for part in path]
        exempt = _NO_DECAY_NAME.search(name) or _NO_DECAY_LAYER in layers
        return leaf.ndim > 1 and not exempt

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    config: ConfigDict, model: nn.Module | None = None
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a configuration, with optional clipping by the global norm.

    Its ``update`` takes the global norm of the gradient as ``norm``, which it needs to clip shards
    of a gradient; None: it computes the norm of the arrays it is given.

    `optimizer.name` is "adamw", whose weight decay is decoupled from the gradient, or "sgd", with
    Nesterov momentum (timm's SGD) and weight decay as a part of the gradient. Parameters that
    `optimizer.freeze` names get no update and have no state.

    Args:
      config: configuration; `num_steps`, `clip_norm` and `optimizer` are read.
      model: model that is trained; None is valid if nothing is frozen.

    References:
      Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".
    """
    clip = _clip(config.clip_norm) if config.clip_norm else optax.identity()
    make = {"adamw": _adamw, "sgd": _sgd}[config.optimizer.name]
    chain = optax.chain(clip, make(config.optimizer, learning_rate_schedule(config)))
    optimizer = _packed(optax.with_extra_args_support(chain))
    frozen = Frozen(config.optimizer.freeze, model)
    if not frozen:
        return optimizer
    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, frozen.labels)


def learning_rate_factors(config: ConfigDict, model: nn.Module, params: Any) -> Any:
    """Returns a tree of floats like `params`, the factors on their learning rates.

    With `optimizer.layer_decay` d, the factor of layer l of L is d^(L - 1 - l), times the model's
    own factor, and in the backbone times `optimizer.backbone_factor`. None means 1 for all
    parameters.

    Args:
      config: configuration; `optimizer.layer_decay` and `optimizer.backbone_factor` are read.
      model: model of the parameters; its layers are counted from the images.
      params: parameters.

    References:
      Bao et al. 2022, "BEiT"; He et al. 2022, "Masked Autoencoders", Appendix A.1.
    """
    own, decay = model.learning_rate_factors(params), config.optimizer.layer_decay
    backbone, top = config.optimizer.backbone_factor, model.num_layers - 1
    if decay == backbone == 1:
        return own

    def factor(path, _):
        layers_above = top - model.layer_of(path)
        return decay**layers_above * (1.0 if model.is_head(path) else backbone)

    factors = map_paths(factor, params)
    return factors if own is None else jax.tree.map(lambda a, b: a * b, factors, own)


def _clip(max_norm):
    """Scales updates down to a global norm; the norm is the one that a training step logs."""

    def clip(updates, state, params=None, *, norm=None, **_):
        del params
        norm = norm_packed(updates) if norm is None else norm
        factor = jnp.where(norm > max_norm, max_norm / norm, 1.0)
        return jax.tree.map(lambda x: x * factor, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, clip)


def _packed(optimizer):
    """Makes an optimizer update all vectors as one on accelerators; its state looks the same."""

    def update(updates, state, params, **extra):
        return update_packed(functools.partial(optimizer.update, **extra), updates, state, params)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _adamw(optimizer, schedule):
    return optax.adamw(
        schedule,
        b1=optimizer.b1,
        b2=optimizer.b2,
        weight_decay=optimizer.weight_decay,
        mask=_decay_mask(optimizer),
    )


def _decay_mask(optimizer):
    """Returns what optax takes for the parameters that decay; None: all do."""
    return weight_decay_mask if optimizer.decay == "matrices" else None


def _sgd(optimizer, schedule):
    return optax.chain(
        optax.add_decayed_weights(optimizer.weight_decay, _decay_mask(optimizer)),
        optax.sgd(schedule, momentum=optimizer.b1, nesterov=True),
    )
