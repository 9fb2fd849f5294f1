"""Makes the modules that a configuration names; messages name the entries of the configuration."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flax import linen as nn
from ml_collections import ConfigDict

from tokenvit_jax.config import SET_ELSEWHERE
from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.models import create_model, list_models, model_settings
from tokenvit_jax.models.backbone import Backbone
from tokenvit_jax.valid import shown

Module = TypeVar("Module", bound=nn.Module)


def make_backbone(config: ConfigDict, **given: Any) -> Backbone:
    """Returns the model that `model` names, with the settings in `model_overrides`.

    Args:
      config: configuration.
      **given: settings that the task sets.

    Raises:
      UserError: there is no such model, or an override is unknown or not valid.
    """
    model_settings(config.model)  # raises UserError for an unknown name
    make = functools.partial(create_model, config.model)
    return _make(make, "model_overrides", config, given)


def choose_head(name: str, heads: Mapping[str, type[Module]]) -> type[Module]:
    """Returns the class of the head that `head` names.

    Args:
      name: value of the entry.
      heads: name -> class.

    Raises:
      UserError: there is no such head.
    """
    if name not in heads:
        hint = did_you_mean(name, heads)
        raise UserError(f"config.head={name!r} is not valid{hint}; valid: {', '.join(heads)}")
    return heads[name]


def check_hierarchical(config: ConfigDict, what: str) -> None:
    """Raises UserError if the model has one map only.

    Args:
      config: provides `model`.
      what: begins the reason in the message, such as "detectors read".
    """
    if len(create_model(config.model).strides) == 1:
        valid = [name for name in list_models() if len(create_model(name).strides) > 1]
        raise UserError(
            f"config.model={config.model!r} is not valid: {what} the maps of a hierarchical "
            f"backbone; valid: {', '.join(valid)}"
        )


def make_head(cls: type[nn.Module], config: ConfigDict, **given: Any) -> nn.Module:
    """Returns a head with the settings in `head_overrides`.

    Args:
      cls: class of the head.
      config: configuration.
      **given: settings that the task sets.

    Raises:
      UserError: an override is unknown or not valid.
    """
    valid = [field.name for field in dataclasses.fields(cls) if field.name not in SET_ELSEWHERE]
    for name in config.head_overrides:
        if name not in valid:
            head = config.get("head", cls.__name__)
            raise UserError(
                f"config.head_overrides={shown(config.head_overrides.to_dict())}: the head {head} "
                f"has no setting {name!r}{did_you_mean(name, valid)}; valid: "
                f"{', '.join(valid) or 'none'}"
            )
    return _make(cls, "head_overrides", config, given)


def _make(make: Callable[..., Any], group: str, config: ConfigDict, given: Mapping[str, Any]):
    overrides = config[group].to_dict()
    for name in overrides:
        if name in SET_ELSEWHERE:
            raise UserError(f"config.{group}.{name} is not valid: the task sets {name}")
    try:
        return make(**given, **overrides)
    except UserError as error:
        raise UserError(f"config.{group}: {error}") from error
