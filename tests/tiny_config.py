"""Configuration of a run that takes seconds: a tiny DGT on the digits."""

from ml_collections import ConfigDict

from tokenvit_jax.tasks import default_config


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = default_config("classification")
    config.model = "dgt_t"
    config.model_overrides = ConfigDict(
        {
            "stem_dim": 8,
            "dims": (8, 16, 16, 32),
            "depths": (1, 0, 0, 0),
            "num_heads": (1, 2, 2, 2),
            "mlp_ratio": 2,
            "num_groups": 4,
            "top_k": 8,
            "head_dim": 32,
            "drop_path": 0.1,
            "centroid_rule": "constant",
        }
    )
    config.image_size = 32
    config.batch_size = 16
    config.data.eval_batch_size = 120
    config.ema_decay = 0.9
    config.num_steps = 40
    config.optimizer.warmup_steps = 4
    config.log_every_steps = 1
    config.eval_every_steps = 10
    config.checkpoint_every_steps = 5
    return config.lock()
