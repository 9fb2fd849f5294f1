"""Recipes that fine-tune a trained classifier on another dataset or at another image size."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError
from tokenvit_jax.recipes import choose_config
from tokenvit_jax.recipes.imagenet import ImageNetRecipe

IMAGENET_IMAGES = 1_281_167
# Evaluations are at least so many steps apart, although an epoch of a small dataset is shorter.
_MIN_EVAL_STEPS = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneRecipe:
    """Training that starts from a trained model.

    Attributes:
      base: values that it shares with training from scratch.
      layer_decay: factor of the learning rate from a layer to the one below it.
      warmup_learning_rate: learning rate at the first step.
      end_learning_rate: learning rate at the last step.
    """

    base: ImageNetRecipe
    layer_decay: float
    warmup_learning_rate: float
    end_learning_rate: float

    def make_config(
        self, model: str, model_overrides: Mapping[str, Any], images: int, batch_size: int
    ) -> ConfigDict:
        """Returns the configuration of a model.

        Args:
          model: name of the model.
          model_overrides: settings of the training, such as drop path. Those that describe the
            network come from the run that training starts from.
          images: number of training images, from which the number of steps follows.
          batch_size: images per step; the learning rates are proportional to it.
        """
        config = self.base.make_config(model, model_overrides)
        config.initial.workdir = f"runs/{model}"
        config.batch_size = batch_size
        batches = images / batch_size  # per epoch
        config.num_steps = max(round(self.base.epochs * batches), 1)
        warmup = round(self.base.warmup_epochs * batches)
        config.eval_every_steps = max(round(batches), _MIN_EVAL_STEPS)
        config.checkpoint_every_steps = config.eval_every_steps
        optimizer, scale = config.optimizer, batch_size / self.base.batch_size
        optimizer.warmup_steps = min(warmup, config.num_steps - 1)
        optimizer.layer_decay = self.layer_decay
        optimizer.learning_rate = self.base.learning_rate * scale
        if optimizer.warmup_steps:
            optimizer.warmup_learning_rate = self.warmup_learning_rate * scale
        optimizer.end_learning_rate = self.end_learning_rate * scale
        return config


_AUGMENTATIONS = ("crop", "flip", "randaugment", "erasing", "mixup", "cutmix")

# He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", Table 9, with the values of
# github.com/facebookresearch/mae, FINETUNE.md, for ViT-B.
MAE = FinetuneRecipe(
    base=ImageNetRecipe(
        image_size=224, batch_size=1024, epochs=100, warmup_epochs=5,
        learning_rate=2e-3,  # 5e-4 x batch size / 256
        weight_decay=0.05, clip_norm=0.0, augmentations=_AUGMENTATIONS,
    ),
    layer_decay=0.65, warmup_learning_rate=0.0, end_learning_rate=1e-6,
)  # fmt: skip
# github.com/microsoft/Swin-Transformer, swin_tiny_patch4_window7_224_22kto1k_finetune.yaml.
SWIN = FinetuneRecipe(
    base=ImageNetRecipe(
        image_size=224, batch_size=1024, epochs=30, warmup_epochs=5,
        learning_rate=4e-5,  # 2e-5 x batch size / 512, like the other two learning rates
        weight_decay=1e-8, clip_norm=5.0, augmentations=_AUGMENTATIONS,
    ),
    layer_decay=1.0, warmup_learning_rate=4e-8, end_learning_rate=4e-7,
)  # fmt: skip
_MODELS = {"vit_b": MAE, "swin_t": SWIN, "clustr_s": SWIN}


def finetune_config(arg: str) -> ConfigDict:
    """Returns the configuration for an argument "MODEL[,IMAGES[,BATCH_SIZE]]".

    Args:
      arg: name of the model; the number of training images, unless it is ImageNet-1K's; and the
        number of images per step, unless it is the recipe's.

    Raises:
      UserError: the model has no recipe, or a number is not valid.
    """
    model, *numbers = arg.split(",")
    if len(numbers) > 2 or not all(map(_is_positive, numbers)):
        raise UserError(
            f"config argument {arg!r} is not valid; valid: MODEL, or MODEL,IMAGES,BATCH_SIZE with "
            "numbers from 1, such as 'vit_b,3680,128'"
        )
    counts = {"images": IMAGENET_IMAGES, "batch_size": 1024}
    counts |= zip(counts, map(int, numbers), strict=False)
    overrides = {"drop_path": 0.1, "remat": False}  # of all three
    configs = {
        name: functools.partial(recipe.make_config, name, overrides, **counts)
        for name, recipe in _MODELS.items()
    }
    return choose_config(model, configs)


def _is_positive(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text) > 0
