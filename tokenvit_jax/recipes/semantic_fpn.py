"""Recipes of Semantic FPN on ADE20K."""

import functools

from ml_collections import ConfigDict

from tokenvit_jax.recipes import choose_config
from tokenvit_jax.recipes.upernet import ade20k_config, narrow_head_config

MODELS = ("clustr_s", "swin_t")


def semantic_fpn_config(arg: str) -> ConfigDict:
    """Returns the configuration of Semantic FPN.

    Args:
      arg: one of `MODELS`: on ADE20K; "scenes": a small model on the embedded scenes.
    """
    configs = {name: functools.partial(_semantic_fpn, name) for name in MODELS}
    small = functools.partial(narrow_head_config, "semantic_fpn", neck_channels=32)
    return choose_config(arg, configs | {"scenes": small})


def _semantic_fpn(model: str) -> ConfigDict:
    """Returns the recipe of ClusTR, Table A3."""
    config = ade20k_config(model, {"drop_path": 0.1}, steps=80_000)
    config.head = "semantic_fpn"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 1e-4
    config.optimizer.power = 0.9
    return config
