"""What recipes of semantic segmentation share."""

from ml_collections import ConfigDict

from tokenvit_jax.config import AUTO


def use_mmseg_images(config: ConfigDict, *, crop: int, short_side: int) -> None:
    """Sets the augmentation of mmsegmentation, and the size of images in evaluation.

    Args:
      config: changed in place.
      crop: side of the crops [pixels].
      short_side: shorter side of the resized images, before the random factor [pixels].
    """
    config.image_size = crop
    config.data.workers = AUTO
    config.augment.short_side = short_side
    config.augment.scale_range = (0.5, 2.0)
    config.augment.max_class_share = 0.75
    config.augment.flip = 0.5
    config.augment.photometric = True
    config.data.eval_batch_size = 8
    config.data.eval_short_side = short_side


def train_on_scenes(config: ConfigDict, num_steps: int) -> None:
    """Sets training on the embedded scenes, digits pasted on photographs.

    There are 2,000 training and 200 test images of 128 x 128 pixels.

    Args:
      config: changed in place.
      num_steps: length of the training.
    """
    config.dataset = "scenes"
    config.image_size = 128
    config.batch_size = 16
    config.data.eval_batch_size = 20

    config.num_steps = num_steps
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.log_every_steps = 50
    config.eval_every_steps = 500
    config.checkpoint_every_steps = 500
