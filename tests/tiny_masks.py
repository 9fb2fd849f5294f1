"""Configuration of a Mask2Former that trains in seconds; the argument is the kind of segments."""

from ml_collections import ConfigDict

from tokenvit_jax.tasks import default_config


def get_config(kind: str = "panoptic") -> ConfigDict:
    """Returns the configuration."""
    config = default_config("masks")
    config.dataset, config.image_size, config.inference.kind = "scene_segments", (64, 96), kind
    config.model = "swin_t"
    config.model_overrides = ConfigDict({
        "dims": (4, 4, 8, 8), "num_heads": (1, 1, 1, 1), "depths": (0, 0, 1, 0), "mlp_ratio": 1,
        "window_size": 2,
    })  # fmt: skip
    config.head_overrides = ConfigDict({
        "num_queries": 6, "channels": 32, "num_heads": 2, "num_points": 1, "encoder_depth": 1,
        "encoder_hidden": 8, "depth": 1, "hidden": 8,
    })  # fmt: skip
    config.masks.num_points = 64
    config.data.max_segments, config.data.result_size = 5, (128, 128)
    config.data.workers = 0
    config.batch_size, config.data.eval_batch_size = 16, 40
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.01
    config.optimizer.warmup_steps = 0
    config.log_every_steps = 1
    return config
