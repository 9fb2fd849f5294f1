"""The flag --config: configurations by file or by name, overrides, and the list of the entries.

``--config=FILE.py[:ARGUMENT]`` reads a file; ``--config=NAME[:ARGUMENT]`` reads a file of
`configs/`, which is part of the package. ``--config.key=value`` overrides an entry, or a setting of
the model or the head that the configuration leaves at its published value.
"""

import ast
import dataclasses
import importlib.util
import inspect
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from tokenvit_jax.config import ENTRIES, base_config
from tokenvit_jax.errors import did_you_mean

# Fields of models and heads that the task or Flax sets.
_SET_ELSEWHERE = ("num_classes", "dtype", "axis_name", "parent", "name")


def define(flag_values: flags.FlagValues) -> None:
    """Defines the flag."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "configuration: FILE.py or the name of a config (tokenvit list configs), both with an "
        "optional :ARGUMENT; --config.key=value changes an entry",
        flag_values,
    )
    flag_values["config"].parser = _ConfigParser()


def config_files() -> dict[str, Path]:
    """Returns the shipped configs: name -> file."""
    package = Path(__file__).parent
    # A wheel has them inside the package, the repository beside it.
    folder = next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def title_of(file: Path) -> str:
    """Returns the first line of a Python file's docstring, without running the file."""
    return (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0]


class _ConfigParser(flags.ArgumentParser):
    """Reads the value of --config, and adds the settings that the command line overrides."""

    def parse(self, text: str) -> ConfigDict:
        name, _, argument = text.partition(":")
        config = _get_config(_find(name), argument)
        if not isinstance(config, ConfigDict):
            raise flags.Error(f"--config={text}: get_config() returned no ConfigDict")
        given = _overrides()
        with config.unlocked():
            for key in given:
                if not _has(config, key):
                    _add(config, key, given)
        return config.lock()


def _find(name: str) -> Path:
    file, shipped = Path(os.path.expanduser(name)), config_files()
    if file.is_file():
        return file
    parts = Path(name).parts
    known = name in shipped or (parts[:-1] == ("configs",) and file.suffix == ".py")
    if known and file.stem in shipped:
        return shipped[file.stem]
    hint = did_you_mean(file.stem, shipped)
    raise flags.Error(
        f"--config={name}: no such file, and no config has this name{hint}; `tokenvit list "
        "configs` prints the names"
    )


def _get_config(file: Path, argument: str) -> Any:
    spec = importlib.util.spec_from_file_location("config_file", file)
    if spec is None:
        raise flags.Error(f"--config={file} is no Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def _overrides() -> dict[str, str]:
    """Returns the text of every flag --config.key=text of the command line by key."""
    found = (re.fullmatch(r"--?(?:no)?config\.([\w.]+)(?:=(.*))?", arg, re.S) for arg in sys.argv)
    return {match[1]: match[2] or "" for match in found if match}


def _has(config: ConfigDict, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(config, ConfigDict) or part not in config:
            return False
        config = config[part]
    return True


# ------------------------------------------------------------------------------------------------
# Settings of models and heads
# ------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A setting of a model or a head.

    Attributes:
      type: type of its value, as `ml_collections` knows it; object: any literal.
      value: the published value, or the default.
      meaning: its description.
    """

    type: type
    value: Any
    meaning: str


def list_settings(config: ConfigDict, given: Mapping[str, str]) -> dict[str, Setting]:
    """Returns all settings that the overrides of a configuration can replace, by key."""
    from tokenvit_jax.tasks import TASKS, entries_of  # imports jax

    chosen = config.copy_and_resolve_references()
    with chosen.unlocked():  # the command line may name another model
        chosen.update({key: given[key] for key in ("task", "model", "head") if key in given})
    entries_of(chosen.task)  # refuses an unknown task
    owners = TASKS[chosen.task].overridable(chosen)
    return {
        key: setting for group, owner in owners.items() for key, setting in _fields(group, owner)
    }


def _fields(prefix: str, owner: Any) -> Iterator[tuple[str, Setting]]:
    cls = owner if isinstance(owner, type) else type(owner)
    meanings, parts = attribute_meanings(cls), getattr(cls, "parts", {})
    for field in dataclasses.fields(cls):
        if field.name not in _SET_ELSEWHERE:
            key, kind = f"{prefix}.{field.name}", typing.get_origin(field.type) or field.type
            kind = kind if kind in (bool, int, float, str, tuple) else object
            value = getattr(owner, field.name, None)
            yield key, Setting(kind, value, meanings.get(field.name, ""))
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


def _add(config: ConfigDict, key: str, given: Mapping[str, str]) -> None:
    """Adds an entry without a value for a setting that the command line overrides.

    Raises:
      flags.Error: the model or head has no such setting.
    """
    settings = list_settings(config, given) if key.split(".")[0].endswith("_overrides") else {}
    if key not in settings:
        raise flags.Error(_unknown(config, key, settings))
    *groups, name = key.split(".")
    group = config
    for part in groups:
        if not isinstance(group.get(part), ConfigDict):
            group[part] = ConfigDict()
        group = group[part]
    # A reference, because None alone would not say which values fit.
    group[name] = FieldReference(None, field_type=settings[key].type)


def _unknown(config: ConfigDict, key: str, settings: Iterable[str]) -> str:
    from tokenvit_jax.tasks import tasks_with

    if tasks := tasks_with(key):
        hint = f"config.{key} is an entry of the tasks: {', '.join(tasks)}"
    else:
        near = did_you_mean(key, [*_values(config), *settings])
        hint = near.strip(" ()").rstrip("?") + "?" if near else "--help lists all keys"
    return f"--config.{key} is not a key of the configuration; {hint}"


def _values(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns the values of a configuration by key, such as "data.workers"."""
    found = {}
    for name, value in config.items():
        inner = isinstance(value, ConfigDict) and len(value)
        empty = {} if isinstance(value, ConfigDict) else value
        found |= _values(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": empty}
    return found


# ------------------------------------------------------------------------------------------------
# The list of the entries
# ------------------------------------------------------------------------------------------------


def list_entries(config: ConfigDict | None) -> list[tuple[str, Any, str]]:
    """Returns the entries of a configuration: keys, values and meanings.

    Args:
      config: a configuration, whose settings of the model and the head are included; None: the
        entries that all tasks have, with their defaults.
    """
    if config is None:
        values = _values(base_config())
        return [(key, values[key], entry.meaning) for key, entry in ENTRIES.items()]
    from tokenvit_jax.tasks import entries_of

    found, values, settings = [], _values(config), list_settings(config, {})
    for key, entry in entries_of(config.task).items():
        inner = [name for name in settings if name.startswith(f"{key}.")]
        if not inner:
            found.append((key, values.get(key, entry.default), entry.meaning))
        for name in inner:
            _, value, meaning = settings[name]
            parent = name.rpartition(".")[0]
            if parent == key or _has(config, parent):  # attributes of absent parts have no value
                found.append((name, values.get(name, value), meaning))
    return found
