"""Recipes of DPT (Ranftl et al. 2021) for KITTI, NYU Depth v2 and the embedded scenes."""

import dataclasses

from ml_collections import ConfigDict

from tokenvit_jax.config import AUTO
from tokenvit_jax.data import builtin_info
from tokenvit_jax.recipes import choose_config
from tokenvit_jax.tasks import default_config

MODEL = "vit_b_r50"  # the backbone of DPT-hybrid
EPOCHS, BATCH_SIZE = 24, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class DptRecipe:
    """Training and evaluation on one dataset.

    Attributes:
      dataset: name of the dataset.
      crop: height and width of the crops in training [pixels].
      train_frame: part of the images that crops are from.
      eval_frame: part of the images that is evaluated.
      eval_size: its height and width [pixels].
      depth_size: height and width of the largest depth map [pixels].
      scale: factor of the decoder's output, which then is the inverse depth without its shift.
      shift: added to it [1 / m].
      max_depth: largest depth that is compared [m].
      eval_crop: part of the depth maps that is compared.
      brightness: range of the random factor of the pixels.
    """

    dataset: str
    crop: tuple[int, int]
    train_frame: str
    eval_frame: str
    eval_size: tuple[int, int]
    depth_size: tuple[int, int]
    scale: float
    shift: float
    max_depth: float
    eval_crop: str
    brightness: tuple[float, float]


# Scale and shift are those of the published networks; crops and augmentation are those of public
# recipes for these datasets (BTS).
KITTI = DptRecipe(
    dataset="kitti_depth", crop=(352, 704), train_frame="kitti", eval_frame="kitti",
    eval_size=(352, 1216), depth_size=(376, 1242), scale=0.00006016, shift=0.00579, max_depth=80.0,
    eval_crop="garg", brightness=(0.9, 1.1),
)  # fmt: skip
NYU = DptRecipe(
    dataset="nyu_depth_v2", crop=(416, 544), train_frame="nyu", eval_frame="whole",
    eval_size=(480, 640), depth_size=(480, 640), scale=0.000305, shift=0.1378, max_depth=10.0,
    eval_crop="eigen_nyu", brightness=(0.75, 1.25),
)  # fmt: skip


def dpt_config(arg: str) -> ConfigDict:
    """Returns the configuration of DPT.

    Args:
      arg: "kitti", "nyu", or "scenes": a small model on the embedded scenes.
    """
    configs = {
        "kitti": lambda: _fine_tuning(KITTI),
        "nyu": lambda: _fine_tuning(NYU),
        "scenes": _scenes,
    }
    return choose_config(arg, configs)


def _fine_tuning(recipe: DptRecipe) -> ConfigDict:
    config = default_config("depth")
    config.model = MODEL
    config.model_overrides = {"remat": False}
    config.dtype = "bfloat16"
    config.depth.scale, config.depth.shift = recipe.scale, recipe.shift
    config.depth.limits = (1e-3, recipe.max_depth)
    config.depth.crop = recipe.eval_crop

    config.dataset = recipe.dataset
    config.image_size = recipe.crop
    config.batch_size = BATCH_SIZE
    config.data.workers = AUTO
    config.data.normalization = "inception"
    config.data.frame = recipe.eval_frame
    config.data.eval_size, config.data.depth_size = recipe.eval_size, recipe.depth_size
    config.data.eval_batch_size = 8
    config.augment.frame = recipe.train_frame
    config.augment.rotation = 2.5
    config.augment.flip = 0.5
    config.augment.gamma_range = config.augment.color_range = (0.9, 1.1)
    config.augment.brightness_range = recipe.brightness

    images = builtin_info(recipe.dataset).splits["train"]
    epoch = images // BATCH_SIZE
    config.num_steps = EPOCHS * images // BATCH_SIZE
    config.optimizer.learning_rate = 1e-4
    config.optimizer.backbone_factor = 0.1
    config.optimizer.weight_decay = 0.0
    config.optimizer.end_learning_rate = 1e-6
    config.eval_every_steps = config.checkpoint_every_steps = epoch
    return config


def _scenes() -> ConfigDict:
    """Returns the configuration of a small DPT on a plain host, with 256 patches."""
    config = default_config("depth")
    config.model = "vit_ti"
    config.model_overrides = {
        "dim": 96, "depth": 4, "num_heads": 4, "patch_size": 8, "position_size": (128, 128),
        "drop_path": 0.0, "remat": False, "init_std": 0.1,
    }  # fmt: skip
    config.head_overrides = {"channels": 32, "level_channels": (24, 48, 96, 96)}
    config.depth.shift = 0.05  # inverse depth of 20 m, more than that of any pixel
    config.depth.limits = (1e-3, 20.0)

    config.dataset = "depth_scenes"
    config.image_size = 128
    config.batch_size = 16
    config.data.eval_batch_size = 20
    config.augment.flip = 0.5

    config.num_steps = 300
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.log_every_steps = 25
    config.eval_every_steps = config.checkpoint_every_steps = 100
    return config
