"""Recipes of UperNet on ADE20K, and what Semantic FPN shares with them."""

import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tokenvit_jax.recipes import choose_config
from tokenvit_jax.recipes.dgt import COMMON as DGT
from tokenvit_jax.recipes.segmentation import train_on_scenes, use_mmseg_images
from tokenvit_jax.tasks import default_config

# A Swin Transformer for the embedded scenes, with most blocks in its third stage.
SMALL_SWIN: dict[str, Any] = {
    "dims": (24, 48, 96, 96), "num_heads": (1, 2, 4, 4), "depths": (1, 1, 6, 1),
    "window_size": 8, "drop_path": 0.0, "remat": False,
}  # fmt: skip
# Settings that differ from training on ImageNet-1K, for each model. Drop path: Swin's code for Swin
# and DGT-T, whose paper has no training settings at hand; DGT-S and B like Pale, whose appendix has
# its own; ClusTR, Table A3.
MODELS: dict[str, dict[str, Any]] = {
    "clustr_s": {"drop_path": 0.1},
    # As many keys relative to the image as 98 at 224 x 224, as the paper's costs imply.
    "dgt_t": {"drop_path": 0.3, "top_k": 512, **DGT},
    "dgt_s": {"drop_path": 0.3, "top_k": 512, **DGT},
    "dgt_b": {"drop_path": 0.5, "top_k": 512, **DGT},
    "pale_t": {"drop_path": 0.3},
    "pale_s": {"drop_path": 0.3},
    "pale_b": {"drop_path": 0.5},
    "swin_t": {"drop_path": 0.3},
    "swin_s": {"drop_path": 0.3},
    "swin_b": {"drop_path": 0.3},
}


def upernet_config(arg: str) -> ConfigDict:
    """Returns the configuration of UperNet.

    Args:
      arg: a key of `MODELS`: on ADE20K; "scenes": a small model on the embedded scenes.
    """
    configs = {name: functools.partial(_upernet, name, MODELS[name]) for name in MODELS}
    small = functools.partial(narrow_head_config, "upernet", auxiliary_channels=32)
    return choose_config(arg, configs | {"scenes": small})


def _upernet(model: str, model_overrides: Mapping[str, Any]) -> ConfigDict:
    """Returns the recipe of Swin's code, which Pale and ClusTR follow (upernet_swin_*_160k)."""
    config = ade20k_config(model, model_overrides, steps=160_000)
    config.head = "upernet"
    optimizer = config.optimizer
    optimizer.learning_rate = 6e-5
    optimizer.weight_decay = 0.01
    optimizer.warmup_steps = 1500
    optimizer.warmup_learning_rate = 1e-6 * optimizer.learning_rate
    return config


def ade20k_config(model: str, model_overrides: Mapping[str, Any], steps: int) -> ConfigDict:
    """Returns the part of mmsegmentation's recipes for ADE20K that heads on maps share.

    Args:
      model: name of the backbone.
      model_overrides: settings of the backbone.
      steps: length of the training.
    """
    config = default_config("segmentation")
    config.model = model
    config.model_overrides = {"remat": False, **model_overrides}
    config.dtype = "bfloat16"

    config.dataset = "ade20k"
    config.batch_size = 16
    use_mmseg_images(config, crop=512, short_side=512)
    config.data.eval_size = (2048, 2048)  # the longer side of larger images is shrunk to 2048
    config.data.label_size = (2100, 2100)
    config.inference.window = "whole"

    config.num_steps = steps
    config.optimizer.name = "adamw"
    config.optimizer.schedule = "polynomial"
    config.optimizer.end_learning_rate = 0.0
    config.eval_every_steps = 16_000
    config.checkpoint_every_steps = 4_000
    return config


def scenes_config(head: str, head_overrides: Mapping[str, Any]) -> ConfigDict:
    """Returns the configuration of a small Swin Transformer with a head on the embedded scenes.

    Args:
      head: name of the head.
      head_overrides: settings of the head.
    """
    config = default_config("segmentation")
    config.model = "swin_t"
    config.model_overrides = SMALL_SWIN
    config.head = head
    config.head_overrides = dict(head_overrides)

    train_on_scenes(config, 1000)
    return config


def narrow_head_config(head: str, **head_overrides: Any) -> ConfigDict:
    """Returns :func:`scenes_config` with a narrow convolutional head.

    With mmsegmentation's first weights of the classifier, 0.01, such a head learned where digits
    are and then hardly which; experiments/segmentation has the measurements.

    Args:
      head: name of the head, one that reads maps.
      **head_overrides: further settings of the head.
    """
    config = scenes_config(head, {"channels": 32, "init_std": 0.1, **head_overrides})
    config.optimizer.learning_rate = 3e-3  # behind BatchNorm, logits grow slowly at 1e-3
    return config
