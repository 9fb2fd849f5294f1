"""Settings of a part of a model that come as a dataclass or, from a configuration, by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tokenvit_jax.errors import UserError


def read_settings(cls: type, name: str, settings: Any, depth: int) -> Any:
    """Returns settings as an instance of ``cls``, checked; None for None, or no settings.

    Args:
      cls: a dataclass with a method ``check(depth)``.
      name: of the attribute of the model, for messages.
      settings: an instance, or its attributes by name.
      depth: number of blocks of the model.

    Raises:
      UserError: an unknown or missing attribute, or a value that is not valid.
    """
    if not settings:
        return None
    if isinstance(settings, Mapping):
        fields = dataclasses.fields(cls)
        valid = [field.name for field in fields]
        for key in settings:
            if key not in valid:
                raise UserError(f"{name} has no {key!r}; valid: {', '.join(valid)}")
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in settings:
                raise UserError(f"{name}.{field.name} is missing")
        settings = cls(**dict(settings))
    settings.check(depth)
    return settings
