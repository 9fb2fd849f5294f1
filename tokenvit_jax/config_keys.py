"""All keys of a configuration: its entries, and the settings of the model and the head.

The entries are the task's; the settings are those that `model_overrides` and `head_overrides` can
replace.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tokenvit_jax.config import (
    ENTRIES,
    NEEDS,
    SET_ELSEWHERE,
    base_config,
    read_entry,
    with_valid,
)
from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.valid import LONGEST, Rule


def has_key(config: ConfigDict, key: str) -> bool:
    """Returns whether a configuration has an entry, a group or a setting."""
    for part in key.split("."):
        if not isinstance(config, ConfigDict) or part not in config:
            return False
        config = config[part]
    return True


def idle_entries(config: ConfigDict) -> dict[str, Any]:
    """Returns the entries that change nothing, with their defaults.

    Args:
      config: a configuration; none are found if an entry is missing or a value is not valid.
    """
    from tokenvit_jax.tasks import TASKS, check_values, default_config, entries_of  # imports jax

    try:
        if not all(has_key(config, key) for key in entries_of(config.task)):
            return {}
        check_values(config)
    except UserError:
        return {}
    defaults, needs = default_config(config.task), (*NEEDS, *TASKS[config.task].needs)
    keys = (key for need in needs if not need.holds(config) for key in need.keys)
    return {key: read_entry(defaults, key) for key in keys}


# ------------------------------------------------------------------------------------------------
# Settings of models and heads
# ------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A setting of a model or a head.

    Attributes:
      type: type of its value, as `ml_collections` knows it; object: any literal.
      value: the published value, or the default.
      meaning: its description.
      valid: rule for its value; None: it has none.
    """

    type: type
    value: Any
    meaning: str
    valid: Rule | None = None


def list_settings(config: ConfigDict) -> dict[str, Setting]:
    """Returns all settings that the overrides of a configuration can replace, by key."""
    from tokenvit_jax.tasks import TASKS, entries_of  # imports jax

    entries_of(config.task)  # refuses an unknown task
    owners = TASKS[config.task].overridable(config)
    return {
        key: setting for group, owner in owners.items() for key, setting in _fields(group, owner)
    }


def _fields(prefix: str, owner: Any) -> Iterator[tuple[str, Setting]]:
    from tokenvit_jax.models.settings import rules_of  # imports jax

    cls = owner if isinstance(owner, type) else type(owner)
    meanings, parts, rules = attribute_meanings(cls), getattr(cls, "parts", {}), rules_of(cls)
    for field in dataclasses.fields(cls):
        if field.name not in SET_ELSEWHERE:
            key, kind = f"{prefix}.{field.name}", typing.get_origin(field.type) or field.type
            kind = kind if kind in (bool, int, float, str, tuple) else object
            value = getattr(owner, field.name, None)
            yield key, Setting(kind, value, meanings.get(field.name, ""), rules.get(field.name))
            if field.name in parts:
                yield from _fields(key, parts[field.name])


def attribute_meanings(cls: type) -> dict[str, str]:
    """Returns the descriptions of the attributes in the docstrings of a class and its bases."""
    found = {}
    for base in reversed(cls.__mro__):
        docstring = inspect.cleandoc(base.__doc__ or "")
        section = re.search(r"^Attributes:\n((?:  .*\n?|\n)*)", docstring, re.MULTILINE)
        for name, text in re.findall(
            r"^  (\w+): (.*(?:\n    .*)*)", section[1] if section else "", re.MULTILINE
        ):
            text = re.sub(r":\w+:`(.*?)`", r"\1", " ".join(text.split()))
            found[name] = text.removesuffix(".")
    return found


def unknown_key(config: ConfigDict, key: str, settings: Iterable[str]) -> str:
    """Returns the message for a key that a configuration does not have.

    Args:
      config: the configuration.
      key: the key.
      settings: keys of the settings that the configuration leaves out.
    """
    from tokenvit_jax.tasks import tasks_with

    names = [name for name in (key, key.split(".")[0]) if not has_key(config, name)]
    if of_tasks := [name for name in names if tasks_with(name)]:
        tasks = ", ".join(tasks_with(of_tasks[0]))
        hint = f"config.{of_tasks[0]} is an entry of the tasks: {tasks}"
    else:
        near = did_you_mean(key, [*_values(config), *settings])
        hint = near.strip(" ()").rstrip("?") + "?" if near else "--help lists all keys"
    key = key if len(key) <= LONGEST else f"{key[:LONGEST]}..."
    return f"--config.{key} is not a key of the configuration; {hint}"


def _values(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns the values of a configuration by key, such as "data.workers"."""
    found = {}
    for name, value in config.items():
        inner = isinstance(value, ConfigDict) and len(value)
        empty = {} if isinstance(value, ConfigDict) else value
        found |= _values(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": empty}
    return found


def rule_of(config: ConfigDict, key: str) -> Rule | None:
    """Returns the rule of an entry; None: it is an entry of the configuration file's own."""
    if key not in ENTRIES:
        from tokenvit_jax.tasks import entries_of  # imports jax

        return getattr(entries_of(config.task).get(key), "valid", None)
    return ENTRIES[key].valid


# ------------------------------------------------------------------------------------------------
# The list of the entries
# ------------------------------------------------------------------------------------------------


def list_entries(config: ConfigDict | None) -> list[tuple[str, Any, str]]:
    """Returns the entries of a configuration: keys, values, and meanings with the valid values.

    Args:
      config: a configuration, whose settings of the model and the head are included; None: the
        entries that all tasks have, with their defaults.
    """
    if config is None:
        values = _values(base_config())
        return [(key, values[key], entry.text) for key, entry in ENTRIES.items()]
    from tokenvit_jax.tasks import entries_of

    found, values, settings = [], _values(config), list_settings(config)
    for key, entry in entries_of(config.task).items():
        inner = [name for name in settings if name.startswith(f"{key}.")]
        if not inner:
            found.append((key, values.get(key, entry.default), entry.text))
        for name in inner:
            setting = settings[name]
            parent = name.rpartition(".")[0]
            if parent == key or has_key(config, parent):  # attributes of absent parts have no value
                meaning = with_valid(setting.meaning, setting.valid)
                found.append((name, values.get(name, setting.value), meaning))
    return found
