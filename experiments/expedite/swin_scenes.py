"""Configuration of a small Swin Transformer with a linear head on the embedded scenes.

    python -m tokenvit_jax.train --config=experiments/expedite/swin_scenes.py --workdir=RUN_SWIN

The third stage has six blocks; its map of 8 x 8 tokens is one window.
"""

from ml_collections import ConfigDict

from tokenvit_jax.recipes.upernet import scenes_config


def get_config(arg: str = "") -> ConfigDict:
    """Returns the configuration; there are no arguments."""
    del arg
    return scenes_config("linear", {})
