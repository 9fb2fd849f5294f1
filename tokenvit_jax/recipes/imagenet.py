"""The recipe for ImageNet-1K that DeiT, Swin, CMT and their successors share.

A config lists the values that differ between families or sizes; the other values are here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tokenvit_jax.config import AUTO
from tokenvit_jax.data import builtin_info
from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.tasks import default_config

# Name -> entries of the configuration. The values are from Touvron et al. 2021 (DeiT), Table 9,
# except for the crop and the strength of the colour jitter (timm's and PVTv2's code).
AUGMENTATIONS = {
    "crop": {"augment.crop_scale": (0.08, 1.0)},
    "flip": {"augment.flip": 0.5},
    "color_jitter": {"augment.color_jitter": 0.4},
    "randaugment": {
        "augment.randaugment.num_ops": 2,
        "augment.randaugment.magnitude": 9.0,
        "augment.randaugment.magnitude_std": 0.5,
    },
    "erasing": {"augment.erasing": 0.25},
    "mixup": {"mix.mixup": 0.8},
    "cutmix": {"mix.cutmix": 1.0},
    "repeated": {"data.repeats": 3},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageNetRecipe:
    """The values of the recipe that a config states.

    Attributes:
      image_size: height and width [pixels].
      batch_size: images per step, over all devices.
      epochs: length of the training.
      warmup_epochs: length of the linear warm-up, part of `epochs`.
      learning_rate: peak learning rate, followed by cosine decay per step.
      weight_decay: weight decay of AdamW.
      clip_norm: largest global norm of the gradient; 0: no clipping.
      augmentations: keys of AUGMENTATIONS.
    """

    image_size: int
    batch_size: int
    epochs: int
    warmup_epochs: int
    learning_rate: float
    weight_decay: float
    clip_norm: float
    augmentations: tuple[str, ...]

    def __post_init__(self):
        for name in self.augmentations:
            if name not in AUGMENTATIONS:
                hint = did_you_mean(name, AUGMENTATIONS)
                raise UserError(
                    f"augmentation {name!r} is not valid{hint}; valid: {', '.join(AUGMENTATIONS)}"
                )

    def make_config(self, model: str, model_overrides: Mapping[str, Any]) -> ConfigDict:
        """Returns the configuration of a model that is trained with this recipe."""
        config = default_config("classification")
        config.model = model
        config.model_overrides = dict(model_overrides)
        config.dtype = "bfloat16"

        config.dataset = "imagenet2012"
        config.image_size = self.image_size
        config.batch_size = self.batch_size
        config.data.workers = AUTO
        config.data.eval_batch_size = 1024
        for name in self.augmentations:
            config.update_from_flattened_dict(AUGMENTATIONS[name])
        config.label_smoothing = 0.1  # DeiT, Table 9

        steps_per_epoch = builtin_info(config.dataset).splits["train"] // self.batch_size
        config.num_steps = self.epochs * steps_per_epoch
        config.clip_norm = self.clip_norm
        config.optimizer.name = "adamw"
        config.optimizer.learning_rate = self.learning_rate
        config.optimizer.weight_decay = self.weight_decay
        config.optimizer.schedule = "cosine"
        config.optimizer.warmup_steps = self.warmup_epochs * steps_per_epoch
        config.optimizer.warmup_learning_rate = 1e-6  # DeiT's and PVTv2's code, like the next one
        config.optimizer.end_learning_rate = 1e-5
        config.eval_every_steps = steps_per_epoch
        config.checkpoint_every_steps = steps_per_epoch
        return config
