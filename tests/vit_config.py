"""Configuration of a run that compiles in seconds: a tiny ViT on the digits.

The configuration of tests/tiny_config.py, with a model that takes a third of its time.
"""

import tiny_config
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = tiny_config.get_config().unlock()
    config.model = "vit_ti"
    config.model_overrides = ConfigDict(
        {
            "dim": 16,
            "depth": 1,
            "num_heads": 2,
            "patch_size": 8,
            "position_size": (32, 32),
            "drop_path": 0.1,
            "init_std": 0.2,
        }
    )
    config.optimizer.learning_rate = 5e-3
    config.num_steps = 60  # so that no run ends before a signal reaches it
    return config.lock()
