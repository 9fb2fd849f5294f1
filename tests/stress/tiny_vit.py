"""Configuration of a run that saves and evaluates often: a tiny ViT on the digits."""

from ml_collections import ConfigDict

from tokenvit_jax.tasks import default_config


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = default_config("classification")
    config.model = "deit_ti"
    config.model_overrides = ConfigDict(
        {
            "dim": 32,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 8,
            "position_size": (32, 32),
            "drop_path": 0.1,
        }
    )
    config.image_size = 32
    config.batch_size = 16
    config.data.eval_batch_size = 24
    config.augment.rotation = 10.0
    config.augment.translation = 0.05
    config.mix.mixup = 0.5
    config.ema_decay = 0.9
    config.num_steps = 60
    config.optimizer.warmup_steps = 4
    config.log_every_steps = 1
    config.eval_every_steps = 10
    config.checkpoint_every_steps = 4
    return config.lock()
