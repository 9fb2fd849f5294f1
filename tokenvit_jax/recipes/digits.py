"""A recipe for the embedded digits that takes about two minutes on two CPU cores."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tokenvit_jax.tasks import default_config


def digits_config(model: str, model_overrides: Mapping[str, Any]) -> ConfigDict:
    """Returns the configuration of a model, shrunk by its overrides, on the embedded digits.

    The dataset has 1,437 training and 360 test images of handwritten digits (scikit-learn), 8 x 8
    pixels, enlarged to 64 x 64, slightly rotated and shifted.
    """
    config = default_config("classification")
    config.model = model
    config.model_overrides = dict(model_overrides)

    config.dataset = "digits"
    config.image_size = 64
    config.batch_size = 64
    config.data.eval_batch_size = 120
    config.augment.rotation = 10.0
    config.augment.translation = 0.05
    config.label_smoothing = 0.1

    config.num_steps = 400
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 40
    config.log_every_steps = 10
    config.eval_every_steps = 50
    config.checkpoint_every_steps = 100
    return config
