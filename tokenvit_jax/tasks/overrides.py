"""Makes the modules that a configuration names; messages name the entries of the configuration."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.models import create_model, model_settings
from tokenvit_jax.models.backbone import Backbone
from tokenvit_jax.valid import shown

# Fields of models and heads that the task or Flax sets.
_SET_ELSEWHERE = ("num_classes", "dtype", "axis_name", "parent", "name")


def make_backbone(config: ConfigDict, **given: Any) -> Backbone:
    """Returns the model that `model` names, with the settings in `model_overrides`.

    Args:
      config: configuration.
      **given: settings that the task sets.

    Raises:
      UserError: there is no such model, or an override is unknown or not valid.
    """
    make = functools.partial(create_model, config.model)
    return _make(make, model_settings(config.model), config, "model_overrides", given)


def make_head(cls: type[nn.Module], config: ConfigDict, **given: Any) -> nn.Module:
    """Returns a head with the settings in `head_overrides`.

    Args:
      cls: class of the head.
      config: configuration.
      **given: settings that the task sets.

    Raises:
      UserError: an override is unknown or not valid.
    """
    return _make(cls, cls, config, "head_overrides", given)


def _make(
    make: Callable[..., Any], owner: Any, config: ConfigDict, group: str, given: Mapping[str, Any]
) -> Any:
    overrides = config[group].to_dict()
    valid = [field.name for field in dataclasses.fields(owner) if field.name not in _SET_ELSEWHERE]
    for name in overrides:
        if name not in valid:
            hint = did_you_mean(name, valid)
            raise UserError(
                f"config.{group}={shown(overrides)} has no valid setting {name!r}{hint}; valid: "
                f"{', '.join(valid)}"
            )
    try:
        return make(**given, **overrides)
    except UserError as error:
        raise UserError(f"config.{group}: {error}") from error
