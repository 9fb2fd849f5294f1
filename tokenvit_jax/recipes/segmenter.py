"""Recipes of Segmenter (Strudel et al. 2021) for three datasets and the embedded scenes."""

import dataclasses
import functools

from ml_collections import ConfigDict

from tokenvit_jax.data import builtin_info
from tokenvit_jax.recipes import choose_config
from tokenvit_jax.recipes.segmentation import train_on_scenes, use_mmseg_images
from tokenvit_jax.tasks import default_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmenterRecipe:
    """Training and evaluation on one dataset.

    Attributes:
      dataset: name of the dataset.
      epochs: length of the training.
      eval_epochs: epochs between two evaluations.
      batch_size: images per step, over all devices.
      learning_rate: learning rate at the first step, followed by polynomial decay per step.
      short_side: shorter side of the resized images [pixels].
      crop: side of the crops and the windows [pixels].
      stride: stride of the windows [pixels].
      decoder_depth: number of blocks of the mask transformer.
      eval_size: height and width of the buffer for resized images [pixels]; larger images are
        shrunk to fit.
      label_size: height and width of the buffer for label maps [pixels].
    """

    dataset: str
    epochs: int
    eval_epochs: int
    batch_size: int
    learning_rate: float
    short_side: int
    crop: int
    stride: int
    decoder_depth: int
    eval_size: tuple[int, int]
    label_size: tuple[int, int]


# The values are from github.com/rstrudel/segmenter, segm/config.yml. The buffers of ADE20K and
# Pascal-Context hold images whose longer side is at most twice the shorter side: nearly all images.
ADE20K = SegmenterRecipe(
    dataset="ade20k", epochs=64, eval_epochs=2, batch_size=8, learning_rate=1e-3,
    short_side=512, crop=512, stride=512, decoder_depth=2,
    eval_size=(1024, 1024), label_size=(2100, 2100),
)  # fmt: skip
ADE20K_640 = dataclasses.replace(
    ADE20K, short_side=640, crop=640, stride=640, eval_size=(1280, 1280)
)
PASCAL_CONTEXT = SegmenterRecipe(
    dataset="pascal_context", epochs=256, eval_epochs=8, batch_size=16, learning_rate=1e-3,
    short_side=520, crop=480, stride=320, decoder_depth=2,
    eval_size=(1120, 1120), label_size=(500, 500),
)  # fmt: skip
CITYSCAPES = SegmenterRecipe(
    dataset="cityscapes", epochs=216, eval_epochs=4, batch_size=8, learning_rate=1e-2,
    short_side=1024, crop=768, stride=512, decoder_depth=1,
    eval_size=(1024, 2048), label_size=(1024, 2048),
)  # fmt: skip


def segmenter_config(
    model: str, arg: str, *, drop_path: float, recipes: tuple[SegmenterRecipe, ...]
) -> ConfigDict:
    """Returns the configuration of a Segmenter.

    Args:
      model: name of the backbone.
      arg: "": the first recipe; the dataset of another recipe; "scenes": a small model on the
        embedded scenes.
      drop_path: rate of stochastic depth of the backbone, except on the scenes.
      recipes: training on each dataset.
    """
    names = ("", *(recipe.dataset for recipe in recipes[1:]))
    configs = {
        name: functools.partial(_segmenter, model, drop_path, recipe)
        for name, recipe in zip(names, recipes, strict=True)
    }
    return choose_config(arg, configs | {"scenes": lambda: segmenter_scenes_config(model)})


def _segmenter(model: str, drop_path: float, recipe: SegmenterRecipe) -> ConfigDict:
    """Returns the published recipe (Section 4.1 and the authors' code), without decoder dropout."""
    config = default_config("segmentation")
    config.model = model
    config.model_overrides = {
        "drop_path": drop_path, "remat": False, "norm_epsilon": 1e-5,
        # The size of the position embeddings of the weights that training starts from.
        "position_size": (384, 384), "position_resize": "bilinear",
    }  # fmt: skip
    config.head = "mask_transformer"
    config.head_overrides = {"depth": recipe.decoder_depth}
    config.dtype = "bfloat16"

    config.dataset = recipe.dataset
    config.batch_size = recipe.batch_size
    config.data.normalization = "inception"
    use_mmseg_images(config, crop=recipe.crop, short_side=recipe.short_side)
    config.data.eval_size = recipe.eval_size
    config.data.label_size = recipe.label_size
    config.inference.stride = recipe.stride

    images = builtin_info(recipe.dataset).splits["train"]
    steps_per_epoch = images // recipe.batch_size
    config.num_steps = recipe.epochs * images // recipe.batch_size
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = recipe.learning_rate
    config.optimizer.weight_decay = 0.0
    config.optimizer.schedule = "polynomial"
    config.optimizer.power = 0.9
    config.eval_every_steps = recipe.eval_epochs * steps_per_epoch
    config.checkpoint_every_steps = steps_per_epoch
    return config


def segmenter_scenes_config(model: str) -> ConfigDict:
    """Returns the configuration of a small Segmenter on the embedded scenes, with 256 patches."""
    config = default_config("segmentation")
    config.model = model
    config.model_overrides = {
        "dim": 96, "depth": 8, "num_heads": 4, "patch_size": 8, "position_size": (128, 128),
        "drop_path": 0.0, "remat": False, "init_std": 0.1,
    }  # fmt: skip
    config.head = "mask_transformer"
    config.head_overrides = {"depth": 1, "head_dim": 24}

    train_on_scenes(config, 3000)
    return config
