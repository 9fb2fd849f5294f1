"""Recipes of RetinaNet, Mask R-CNN and HTC on COCO, and on the embedded scenes."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tokenvit_jax.config import AUTO
from tokenvit_jax.data.datasets.scene_instances import NUM_STUFF
from tokenvit_jax.recipes import choose_config
from tokenvit_jax.recipes.dgt import COMMON as DGT
from tokenvit_jax.recipes.upernet import SMALL_SWIN
from tokenvit_jax.tasks import default_config

BATCH_SIZE = 16
STEPS_PER_EPOCH = 7330  # 117,266 images with objects
EPOCHS = {"1x": (12, (8, 11)), "3x": (36, (27, 33))}  # length, and where the rate falls
MULTI_SCALE = tuple(range(480, 801, 32))  # shorter sides [pixels]
# As many keys relative to the image as 98 at 224 x 224, as the papers' costs imply.
DGT_KEYS = {"top_k": 392, **DGT}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training of a detector on COCO.

    Attributes:
      model: name of the backbone.
      model_overrides: its settings that differ from training on ImageNet-1K.
      learning_rate: after the warm-up.
      weight_decay: weight decay.
      decay: parameters with weight decay, as `optimizer.decay`.
      schedule: a key of `EPOCHS`.
      multi_scale: whether sizes and crops are drawn, as for DETR.
    """

    model: str
    model_overrides: Mapping[str, Any]
    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    decay: str = "matrices"
    schedule: str = "1x"
    multi_scale: bool = False


def _swin(model: str, drop_path: float, **changes: Any) -> Recipe:
    return Recipe(model=model, model_overrides={"drop_path": drop_path}, **changes)


def _three_times(recipe: Recipe, drop_path: float) -> Recipe:
    """Returns the recipe of Swin's code for three times the epochs."""
    overrides = {**recipe.model_overrides, "drop_path": drop_path}
    return dataclasses.replace(recipe, model_overrides=overrides, schedule="3x", multi_scale=True)


# ClusTR: Table A4, and PVT v2, which it follows. Pale: its appendix. DGT: its supplement, which
# has its settings, is not available; these are Swin's values with the drop path of its training on
# ImageNet-1K. Swin: its code for detection; one scale as in the tables of the other papers.
CLUSTR_S = Recipe(
    model="clustr_s", model_overrides={"drop_path": 0.1}, learning_rate=2e-4, weight_decay=1e-4,
    decay="all",
)  # fmt: skip
MASK_RCNN = {
    "clustr_s": CLUSTR_S,
    "dgt_t": Recipe(model="dgt_t", model_overrides={"drop_path": 0.1, **DGT_KEYS}),
    "dgt_s": Recipe(model="dgt_s", model_overrides={"drop_path": 0.3, **DGT_KEYS}),
    "dgt_b": Recipe(model="dgt_b", model_overrides={"drop_path": 0.5, **DGT_KEYS}),
    "pale_t": Recipe(model="pale_t", model_overrides={"drop_path": 0.2}, weight_decay=0.001),
    "pale_s": Recipe(model="pale_s", model_overrides={"drop_path": 0.3}, weight_decay=0.001),
    "pale_b": Recipe(model="pale_b", model_overrides={"drop_path": 0.5}),
    "swin_t": _swin("swin_t", 0.1),
    "swin_s": _swin("swin_s", 0.2),
    "swin_b": _swin("swin_b", 0.3),
}
MASK_RCNN |= {
    f"{name}_3x": _three_times(MASK_RCNN[name], drop_path)
    for name, drop_path in {"swin_t": 0.2, "swin_s": 0.2, "swin_b": 0.3}.items()
}
RETINANET = {
    "clustr_s": dataclasses.replace(CLUSTR_S, learning_rate=1e-4),
    **{name: MASK_RCNN[name] for name in ("dgt_t", "pale_t", "swin_t")},
}


def mask_rcnn_config(arg: str) -> ConfigDict:
    """Returns the configuration of Mask R-CNN.

    Args:
      arg: a key of `MASK_RCNN`: on COCO; "scenes": a small model on the embedded scenes.
    """
    return _choose("mask_rcnn", arg, MASK_RCNN)


def retinanet_config(arg: str) -> ConfigDict:
    """Returns the configuration of RetinaNet.

    Args:
      arg: a key of `RETINANET`: on COCO; "scenes": a small model on the embedded scenes.
    """
    return _choose("retinanet", arg, RETINANET)


# Swin v2's appendix A2.1; its drop path is not stated. The windows of the pretraining at 192 x 192
# are 12, and 6 in the last stage.
HTC_WINDOWS = {"swinv2_l": 32, "swinv2_l_48": 48}
HTC_SWIN = {
    "drop_path": 0.2, "pretrained_window_sizes": (12, 12, 12, 6)
}  # fmt: skip
HTC_BATCH, HTC_STEPS_PER_EPOCH = 64, 1833


def htc_config(arg: str) -> ConfigDict:
    """Returns the configuration of the hybrid task cascade.

    Args:
      arg: a key of `HTC_WINDOWS`: HTC++ on COCO; "scenes": a small model on the embedded scenes.
    """
    configs = {
        name: functools.partial(htc_coco_config, window) for name, window in HTC_WINDOWS.items()
    }
    return choose_config(arg, configs | {"scenes": functools.partial(scenes_config, "htc")})


def htc_coco_config(window_size: int) -> ConfigDict:
    """Returns the configuration of HTC++ on COCO with Swin v2-L.

    Args:
      window_size: side of the windows.
    """
    overrides = HTC_SWIN | {"window_size": window_size}
    recipe = Recipe(model="swinv2_l", model_overrides=overrides, learning_rate=4e-4, schedule="3x")
    config = coco_config("htc", recipe, HTC_BATCH, HTC_STEPS_PER_EPOCH)
    config.model_overrides.remat = True  # 1536 x 1536 pixels
    config.image_size = 1536
    config.data.long_side = 1536
    config.data.eval_short_side = 1100
    config.augment.jitter = (0.1, 2.0)
    config.optimizer.backbone_factor = 0.1
    return config


def _choose(head: str, arg: str, recipes: Mapping[str, Recipe]) -> ConfigDict:
    configs = {name: functools.partial(coco_config, head, recipes[name]) for name in recipes}
    return choose_config(arg, configs | {"scenes": functools.partial(scenes_config, head)})


def coco_config(
    head: str,
    recipe: Recipe,
    batch_size: int = BATCH_SIZE,
    steps_per_epoch: int = STEPS_PER_EPOCH,
) -> ConfigDict:
    """Returns the configuration of a recipe on COCO.

    Args:
      head: name of the head.
      recipe: the recipe.
      batch_size: images of a step.
      steps_per_epoch: steps in which all images are seen once.
    """
    config = default_config("detection")
    config.model = recipe.model
    config.model_overrides = {"remat": False, **recipe.model_overrides}
    config.head = head
    config.dtype = "bfloat16"

    config.dataset = "coco"
    config.image_size = (800, 1344)
    config.batch_size = batch_size
    config.data.workers = AUTO
    config.data.long_side = 1333
    config.data.eval_batch_size = 8
    config.augment.flip = 0.5
    if recipe.multi_scale:
        config.augment.short_sides = MULTI_SCALE
        config.augment.detr_crop = True

    epochs, milestones = EPOCHS[recipe.schedule]
    config.num_steps = epochs * steps_per_epoch
    optimizer = config.optimizer
    optimizer.learning_rate = recipe.learning_rate
    optimizer.weight_decay = recipe.weight_decay
    optimizer.decay = recipe.decay
    optimizer.schedule = "step"
    optimizer.milestones = tuple(epoch * steps_per_epoch for epoch in milestones)
    optimizer.warmup_steps = 500
    optimizer.warmup_learning_rate = recipe.learning_rate / 1000
    config.eval_every_steps = steps_per_epoch
    config.checkpoint_every_steps = steps_per_epoch // 5
    return config


def scenes_config(head: str) -> ConfigDict:
    """Returns the configuration of a small Swin Transformer with a narrow head on the scenes.

    Args:
      head: name of the head.
    """
    config = default_config("detection")
    config.model = "swin_t"
    config.model_overrides = SMALL_SWIN
    config.head = head
    narrow = {"channels": 32, "max_detections": 20, "num_candidates": 100}
    two_stage = {"hidden": 128, "num_proposals": 100, "num_anchors": 128, "num_rois": 64}
    own = {
        "mask_rcnn": two_stage,
        "retinanet": {"num_convs": 2},
        "htc": two_stage | {"num_box_convs": 2, "num_mask_convs": 2, "num_stuff": NUM_STUFF},
    }
    config.head_overrides = narrow | own[head]

    config.dataset = "scene_instances"
    config.image_size = 128
    config.batch_size = 16
    config.data.eval_batch_size = 20
    config.data.max_objects = 4

    steps = 240 if head == "htc" else 600  # of HTC, which take twice as long each
    config.num_steps = config.eval_every_steps = steps
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = steps // 10
    config.log_every_steps = 50
    config.checkpoint_every_steps = steps // 2
    return config
