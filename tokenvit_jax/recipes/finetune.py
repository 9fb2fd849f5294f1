"""Recipes that fine-tune a trained classifier on another dataset or at another image size."""

import dataclasses
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

    def make_config(self, model: str, model_overrides: Mapping[str, Any], images: int):
        """Returns the configuration of a model.

        Args:
          model: name of the model.
          model_overrides: settings of the training, such as drop path. Those that describe the
            network come from the run that training starts from.
          images: number of training images, from which the number of steps follows.
        """
        config = self.base.make_config(model, model_overrides)
        config.initial.workdir = f"runs/{model}"
        batches = images / config.batch_size  # per epoch
        config.num_steps = max(round(self.base.epochs * batches), 1)
        warmup = round(self.base.warmup_epochs * batches)
        config.optimizer.warmup_steps = min(warmup, config.num_steps - 1)
        config.eval_every_steps = max(round(batches), _MIN_EVAL_STEPS)
        config.checkpoint_every_steps = config.eval_every_steps
        config.optimizer.layer_decay = self.layer_decay
        config.optimizer.warmup_learning_rate = self.warmup_learning_rate
        config.optimizer.end_learning_rate = self.end_learning_rate
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
    """Returns the configuration for an argument "MODEL" or "MODEL,IMAGES".

    Args:
      arg: name of the model, and the number of training images if the dataset is not ImageNet-1K.

    Raises:
      UserError: the model has no recipe, or the number is not valid.
    """
    model, comma, text = arg.partition(",")
    if comma and not (text.isdecimal() and int(text)):
        raise UserError(f"config argument {arg!r}: {text!r} is no number of images; valid: from 1")
    images = int(text) if comma else IMAGENET_IMAGES
    overrides = {"drop_path": 0.1, "remat": False}  # of all three
    return choose_config(
        model,
        {
            name: lambda name=name, recipe=recipe: recipe.make_config(name, overrides, images)
            for name, recipe in _MODELS.items()
        },
    )
