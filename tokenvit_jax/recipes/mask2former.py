"""Recipes of Mask2Former on COCO and ADE20K, and on the embedded scenes."""

import functools
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tokenvit_jax.config import AUTO
from tokenvit_jax.recipes import choose_config
from tokenvit_jax.recipes.dgt import COMMON as DGT
from tokenvit_jax.recipes.upernet import SMALL_SWIN
from tokenvit_jax.tasks import default_config

ADE20K_SIDES = tuple(range(320, 1281, 64))  # shorter sides [pixels]


class Recipe(NamedTuple):
    """A dataset and a kind of segments.

    Attributes:
      dataset: name of the dataset.
      kind: `inference.kind`.
      num_queries: queries of Swin-L; the smaller models of the released code have 100.
    """

    dataset: str
    kind: str
    num_queries: int


# Mask2Former's released configurations. The paper's supplement gives 200 queries for all models
# with Swin-L; the released one for semantic segmentation has 100.
TASKS = {
    "coco_panoptic": Recipe("coco_panoptic", "panoptic", 200),
    "coco_instance": Recipe("coco", "instance", 200),
    "ade20k_panoptic": Recipe("ade20k_panoptic", "panoptic", 200),
    "ade20k_semantic": Recipe("ade20k", "semantic", 100),
}
# Backbones: settings that differ from training on ImageNet-1K. DGT, ClusTR and Pale have no
# published Mask2Former: they have Swin's recipe, and DGT as many keys as in UperNet.
SWIN_L = "swin_l"
MODELS: dict[str, dict[str, Any]] = {
    "swin_t": {"drop_path": 0.3},
    "swin_s": {"drop_path": 0.3},
    "swin_b": {"drop_path": 0.3, "window_size": 12},
    SWIN_L: {"drop_path": 0.3, "window_size": 12},
    "clustr_s": {"drop_path": 0.3},
    "dgt_t": {"drop_path": 0.3, "top_k": 512, **DGT},
    "pale_t": {"drop_path": 0.3},
}


def mask2former_config(arg: str) -> ConfigDict:
    """Returns the configuration of Mask2Former.

    Args:
      arg: TASK_MODEL with a key of `TASKS` and one of `MODELS`, such as "coco_panoptic_swin_l";
        "scenes", "scenes_instance" or "scenes_semantic": a small model on the embedded scenes.
    """
    configs = {
        f"{task}_{model}": functools.partial(_published, TASKS[task], model)
        for task in TASKS
        for model in MODELS
    }
    scenes = {
        "scenes": functools.partial(scenes_config, "panoptic"),
        "scenes_instance": functools.partial(scenes_config, "instance"),
        "scenes_semantic": functools.partial(scenes_config, "semantic"),
    }
    return choose_config(arg, configs | scenes)


def _published(recipe: Recipe, model: str) -> ConfigDict:
    config = default_config("masks")
    config.model = model
    config.model_overrides = {"remat": False, **MODELS[model]}
    config.dataset = recipe.dataset
    config.inference.kind = recipe.kind
    queries = recipe.num_queries if model == SWIN_L else 100
    config.head_overrides = {"num_queries": queries}
    config.data.max_segments = 100
    config.dtype = "bfloat16"
    config.batch_size = 16
    config.data.workers = AUTO
    config.data.eval_batch_size = 8
    config.augment.flip = 0.5
    optimizer = config.optimizer
    optimizer.learning_rate = 1e-4
    optimizer.weight_decay = 0.05
    optimizer.backbone_factor = 0.1
    optimizer.warmup_steps = 0
    config.clip_norm = 0.01
    (_coco if recipe.dataset.startswith("coco") else _ade20k)(config)
    config.eval_every_steps = 5000
    config.checkpoint_every_steps = 5000
    return config


def _coco(config):
    """Sets large-scale jitter and 100 epochs."""
    config.image_size = 1024
    config.augment.jitter = (0.1, 2.0)
    config.data.eval_size = (800, 1344)
    config.data.long_side = 1333
    config.data.result_size = (640, 640)  # the largest images of COCO
    config.num_steps = 737_500
    config.optimizer.schedule = "step"
    config.optimizer.milestones = (655_556, 710_184)  # a tenth of the rate each


def _ade20k(config):
    """Sets crops of images whose shorter side is drawn, and 160,000 steps."""
    config.image_size = 640
    config.augment.short_sides = ADE20K_SIDES
    config.augment.long_side = 2560
    config.augment.photometric = True
    # In the released code, images have a shorter side of 640 and no padding to speak of. Those
    # whose longer side would be above 1024 are smaller here; a wider canvas would mostly be empty.
    config.data.eval_size = (640, 1024)
    config.data.result_size = (2100, 2100)
    config.num_steps = 160_000
    config.optimizer.schedule = "polynomial"
    config.optimizer.power = 0.9
    config.optimizer.end_learning_rate = 0.0


def scenes_config(kind: str) -> ConfigDict:
    """Returns the configuration of a small Swin Transformer with a narrow Mask2Former.

    Args:
      kind: `inference.kind`.
    """
    config = default_config("masks")
    config.model = "swin_t"
    config.model_overrides = SMALL_SWIN
    config.head_overrides = {
        "num_queries": 12, "channels": 64, "num_heads": 2, "encoder_depth": 1,
        "encoder_hidden": 128, "depth": 6, "hidden": 128,
    }  # fmt: skip
    config.dataset = "scene_instances" if kind == "instance" else "scene_segments"
    config.inference.kind = kind
    config.masks.num_points = 512
    config.image_size = 128
    config.batch_size = 8
    config.data.eval_batch_size = 20
    config.data.max_segments = 6
    config.augment.jitter = (0.8, 1.25)

    config.num_steps = 2400
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.clip_norm = 1.0
    config.log_every_steps = 100
    config.eval_every_steps = 1200
    config.checkpoint_every_steps = 600
    return config
