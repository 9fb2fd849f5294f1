"""Configuration of a network for poses that trains in seconds; the argument is its head."""

from ml_collections import ConfigDict

from tokenvit_jax.tasks import default_config


def get_config(head: str = "mta") -> ConfigDict:
    """Returns the configuration."""
    config = default_config("pose")
    config.dataset, config.image_size = "tests.large_figures", (64, 32)
    config.model = "swin_t"
    config.model_overrides = ConfigDict({
        "dims": (4, 4, 8, 8), "num_heads": (1, 1, 1, 1), "depths": (0, 0, 1, 0), "mlp_ratio": 1,
        "window_size": 2,
    })  # fmt: skip
    config.head = head
    config.head_overrides = ConfigDict({"channels": 4, "init_std": 0.1})
    if head == "mta":
        config.head_overrides.update({"num_heads": 2, "mlp_ratio": 1})
    config.data.workers = 0
    config.batch_size, config.data.eval_batch_size = 16, 40
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.01
    config.optimizer.warmup_steps = 0
    config.log_every_steps = 1
    return config
