"""Configuration of a small Swin Transformer with a linear head on the embedded scenes.

    python -m tokenvit_jax.train --config=experiments/expedite/swin_scenes.py --workdir=RUN_SWIN

The third stage has six blocks; its map of 8 x 8 tokens is one window.
"""

from ml_collections import ConfigDict

from tokenvit_jax.recipes.segmenter import segmenter_scenes_config


def get_config(arg: str = "") -> ConfigDict:
    """Returns the configuration; there are no arguments."""
    del arg
    config = segmenter_scenes_config("swin_t")
    with config.unlocked():
        config.model_overrides = {
            "dims": (24, 48, 96, 96), "num_heads": (1, 2, 4, 4), "depths": (1, 1, 6, 1),
            "window_size": 8, "drop_path": 0.0, "remat": False,
        }  # fmt: skip
        config.head, config.head_overrides = "linear", {}
    config.num_steps = 1000
    return config.lock()
