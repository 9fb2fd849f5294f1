"""Recipes of whole-body pose estimation on COCO-WholeBody, and on the embedded figures."""

import functools

from ml_collections import ConfigDict

from tokenvit_jax.config import AUTO
from tokenvit_jax.recipes import choose_config
from tokenvit_jax.recipes.dgt import COMMON as DGT
from tokenvit_jax.tasks import default_config

# Backbone -> its settings that differ from training on ImageNet-1K.
MODELS = {
    "clustr_t": {"drop_path": 0.1},
    "clustr_s": {"drop_path": 0.1},
    "clustr_b": {"drop_path": 0.1},
    "dgt_t": {"drop_path": 0.1, **DGT},
    "pale_t": {"drop_path": 0.1},
    "swin_t": {"drop_path": 0.1},
}
BATCH_SIZE = 512
STEPS_PER_EPOCH = 293  # 149,813 persons
EPOCHS, MILESTONES = 210, (170, 200)


def pose_config(arg: str) -> ConfigDict:
    """Returns the configuration of top-down pose estimation.

    Args:
      arg: a key of `MODELS`: on COCO-WholeBody; "figures": a small model on the embedded figures.
    """
    configs = {name: functools.partial(whole_body_config, name) for name in MODELS}
    return choose_config(arg, configs | {"figures": figures_config})


def whole_body_config(model: str) -> ConfigDict:
    """Returns the configuration of a backbone on COCO-WholeBody.

    ClusTR's paper names optimizer, batch and epochs; it takes everything else from TCFormer, whose
    released configuration has these values.

    Args:
      model: a key of `MODELS`.
    """
    config = default_config("pose")
    config.model = model
    config.model_overrides = {"remat": False, **MODELS[model]}
    config.dtype = "bfloat16"

    config.dataset = "coco_wholebody"
    config.image_size = (256, 192)
    config.batch_size = BATCH_SIZE
    config.data.workers = AUTO
    config.data.eval_batch_size = 256
    config.augment.flip = 0.5
    config.augment.shift = 0.16
    config.augment.half_body = 0.3
    config.augment.scale = 0.5
    config.augment.rotation = 40.0

    config.num_steps = EPOCHS * STEPS_PER_EPOCH
    optimizer = config.optimizer
    optimizer.learning_rate = 5e-4
    optimizer.weight_decay = 0.01
    optimizer.decay = "all" if model.startswith("clustr") else "matrices"
    optimizer.schedule = "step"
    optimizer.milestones = tuple(epoch * STEPS_PER_EPOCH for epoch in MILESTONES)
    optimizer.warmup_steps = 500
    optimizer.warmup_learning_rate = optimizer.learning_rate / 1000
    config.eval_every_steps = 10 * STEPS_PER_EPOCH
    config.checkpoint_every_steps = STEPS_PER_EPOCH
    return config


def figures_config() -> ConfigDict:
    """Returns the configuration of a small ClusTR with a narrow head on the embedded figures."""
    config = default_config("pose")
    config.model = "clustr_t"
    config.model_overrides = {
        "dims": (24, 48, 96, 128), "num_heads": (1, 2, 4, 4), "depths": (1, 1, 2, 1),
        "mlp_ratios": (4, 4, 4, 4), "drop_path": 0.0,
    }  # fmt: skip
    config.head_overrides = {"channels": 64, "num_heads": 2, "mlp_ratio": 2}

    config.dataset = "figures"
    config.image_size = (128, 96)
    config.batch_size = 16
    config.data.eval_batch_size = 40
    # A pixel of the heat maps, half as wide and high as usual, is several pixels of an image.
    config.pose.sigma = 1.5
    config.pose.unbiased = True
    config.inference.refinement = "dark"
    config.augment.flip = 0.5
    config.augment.shift = 0.05
    config.augment.scale = 0.2
    config.augment.rotation = 15.0

    config.num_steps = 1000
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.log_every_steps = 50
    config.eval_every_steps = 1000
    config.checkpoint_every_steps = 500
    return config
