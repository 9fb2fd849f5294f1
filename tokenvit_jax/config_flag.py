"""The flag --config: configurations by file or by name, and overrides.

``--config=FILE.py[:ARGUMENT]`` reads a file; ``--config=NAME[:ARGUMENT]`` reads a file of
`configs/`, which is part of the package. ``--config.key=value`` overrides an entry, or a setting of
the model or the head that the configuration leaves at its published value.
"""

import ast
import contextlib
import functools
import importlib.util
import inspect
import itertools
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from tokenvit_jax.config import read_entry
from tokenvit_jax.config_keys import (
    Setting,
    has_key,
    idle_entries,
    list_settings,
    rule_of,
    unknown_key,
)
from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.valid import LONGEST, Group, Rule, shown


class ConfigFlags(flags.FlagValues):
    """The flags of a command that takes a configuration, with --config and its overrides.

    Overrides may stand anywhere on the command line.

    Args:
      of_run: whether the command also takes a run, whose configuration the overrides change if
        there is no --config; see :meth:`changed`.
    """

    def __init__(self, of_run: bool = False):
        super().__init__()
        vars(self).update(_of_run=of_run, _overrides=[])  # attributes that are set are flags
        flags.DEFINE_string(
            "config",
            None,
            "configuration: FILE.py or the name of a config (tokenvit list configs), both with an "
            "optional :ARGUMENT; --config.key=value changes an entry",
            flag_values=self,
        )

    def __call__(self, argv: Sequence[str], known_only: bool = False) -> list[str]:
        """Parses a command line: the value of the flag "config" becomes a `ConfigDict`, or None.

        Args:
          argv: name of the program and arguments.
          known_only: as in absl.

        Returns:
          The name of the program and the arguments that are no flags.

        Raises:
          UserError: the configuration or an override is wrong.
          absl.flags.Error: another flag is wrong.
        """
        overrides, others = _split(argv)
        flag = self["config"]
        flag.unparse()
        files = [argument for argument in others if re.match("--?config=", argument)]
        if len(set(files)) > 1:
            raise UserError(f"{' '.join(files)} contradict each other; valid: one --config")
        rest = super().__call__(others, known_only)
        vars(self).update(_overrides=overrides)
        if flag.value is not None:
            flag.value = _override(_load(flag.value), overrides)
        elif overrides and not self._of_run:
            raise UserError(f"{overrides[0].flag} needs --config=FILE.py or --config=NAME")
        return rest

    def changed(self, config: ConfigDict) -> ConfigDict:
        """Changes the configuration of a run by the overrides of the command line, and returns it.

        Raises:
          UserError: an override is wrong.
        """
        return _override(config, self._overrides)


def config_files() -> dict[str, Path]:
    """Returns the shipped configs: name -> file."""
    package = Path(__file__).parent
    # A wheel has them inside the package, the repository beside it.
    folder = next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def title_of(file: Path) -> str:
    """Returns the first line of a Python file's docstring, without running the file."""
    return (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0]


# ------------------------------------------------------------------------------------------------
# Configurations
# ------------------------------------------------------------------------------------------------


def _load(text: str) -> ConfigDict:
    """Returns the configuration that the value of --config names.

    Raises:
      UserError: there is no such configuration, or its file fails.
    """
    name, _, argument = text.partition(":")
    file = _find(name)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the results of a command go to stdout
            config = _get_config(file, argument)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the file is the user's code
        raise UserError(f"--config={text}: {_describe(error, file)}") from error
    if not isinstance(config, ConfigDict) or "task" not in config:
        raise UserError(
            f"--config={text}: get_config() returns {shown(config)}; valid: a configuration that "
            "starts from tokenvit_jax.tasks.default_config"
        )
    return config.lock()


def _find(name: str) -> Path:
    if name.startswith("--"):
        raise UserError(f"--config has no value: {name} follows it; write --config=NAME")
    if not name.strip():
        raise UserError(f"--config={name} is empty; `tokenvit list configs` prints the names")
    file, shipped = Path(os.path.expanduser(name)), config_files()
    if file.is_file():
        return file
    parts = Path(name).parts
    known = name in shipped or (parts[:-1] == ("configs",) and file.suffix == ".py")
    if known and file.stem in shipped:
        return shipped[file.stem]
    if file.exists():
        raise UserError(f"--config={name} is a folder; valid: FILE.py or the name of a config")
    hint = did_you_mean(file.stem, shipped)
    raise UserError(
        f"--config={name}: no such file, and no config has this name{hint}; `tokenvit list "
        "configs` prints the names"
    )


def _get_config(file: Path, argument: str) -> Any:
    """Runs a file and returns the result of its function `get_config`."""
    spec = importlib.util.spec_from_file_location("config_file", file)
    if spec is None:
        raise UserError(f"--config={file} is no Python file; valid: a file with the suffix .py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, "get_config", None)
    if not callable(function):
        raise UserError(f"--config={file}: the file has no function get_config()")
    arguments = (argument,) if argument else ()
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        form = "no :ARGUMENT" if argument else f"--config={file}:ARGUMENT"
        raise UserError(
            f"--config={file}{':' * bool(argument)}{argument} is not valid: get_config() has "
            f"{'no' if argument else 'an'} argument; valid: {form}"
        ) from error
    return function(*arguments)


def _describe(error: BaseException, file: Path) -> str:
    """Returns an error of a configuration file, with the line of the file."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"{type(error).__name__}: {error.msg} (line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    place = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


# ------------------------------------------------------------------------------------------------
# Overrides
# ------------------------------------------------------------------------------------------------


class _Override(NamedTuple):
    """An override on the command line.

    Attributes:
      flag: the argument, such as "--config.seed=1".
      key: key of an entry or a setting, such as "seed".
      text: the value; None: there is none, as for --config.augment.photometric.
      negated: whether the flag begins with "no", as in --noconfig.augment.photometric.
    """

    flag: str
    key: str
    text: str | None
    negated: bool


def _split(argv: Sequence[str]) -> tuple[list[_Override], list[str]]:
    """Separates overrides from the other arguments; "--" ends the flags."""
    overrides, others, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        match = re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", argument, re.DOTALL)
        if argument == "--":
            others += [argument, *rest]
            break
        if not match:
            others.append(argument)
            continue
        negated, key, text = match.groups()
        if text is None and not negated and rest and re.match(r"(?!-)|-[.\d]", rest[0]):
            text = rest.pop(0)  # --config.key value
            argument = f"{argument}={text}"
        overrides.append(_Override(argument, key, text, bool(negated)))
    return overrides, others


def _override(config: ConfigDict, overrides: Sequence[_Override]) -> ConfigDict:
    """Changes entries and settings of a configuration, and returns it.

    Entries that then change nothing, such as the learning rate of a warmup that is switched off,
    get their defaults unless they are overridden: nobody asked for them.

    Raises:
      UserError: a key is unknown, a value cannot be read, or an override replaces another one.
    """
    last = {override.key: place for place, override in enumerate(overrides)}
    overrides = [overrides[place] for place in sorted(last.values())]
    _check_overrides(overrides)
    kept = {*idle_entries(config), *(override.key for override in overrides)}
    with config.unlocked():
        # Entries first: they may choose another model, which has other settings.
        for override in overrides:
            if not _is_setting(override.key):
                _set_entry(config, override)
        settings = None
        for override in overrides:
            if _is_setting(override.key):
                settings = settings or list_settings(config)
                _set_setting(config, override, settings)
        idle = {key: value for key, value in idle_entries(config).items() if key not in kept}
        config.update_from_flattened_dict(idle)
    return config.lock()


def _check_overrides(overrides: Sequence[_Override]) -> None:
    for override, other in itertools.combinations(reversed(overrides), 2):
        if other.key.startswith(f"{override.key}."):
            raise UserError(
                f"{_short(override)} replaces {_short(other)}, which stands before it; valid: the "
                "other order"
            )


def _set_entry(config: ConfigDict, override: _Override) -> None:
    """Changes an entry, which the configuration must have."""
    key = override.key
    if not has_key(config, key):
        raise UserError(unknown_key(config, key, ()))
    *groups, name = key.split(".")
    group = read_entry(config, ".".join(groups)) if groups else config
    if isinstance(group[name], ConfigDict):
        raise UserError(
            f"{_short(override)} is not valid: {key} is a group of entries; valid: "
            f"--config.{key}.NAME=VALUE with one of the names {', '.join(group[name])}"
        )
    kind = group.get_type(name)
    group[name] = _read(override, kind, functools.partial(rule_of, config, key))


def _set_setting(config: ConfigDict, override: _Override, settings: Mapping[str, Setting]) -> None:
    """Changes a setting of the model or the head, or replaces all of them by a dictionary."""
    key = override.key
    if "." not in key and has_key(config, key):
        value = _literal(override.text or "")
        if not Group().accepts(value):
            raise UserError(
                f"{_short(override)} is not valid; valid: --config.{key}.NAME=VALUE, or values by "
                "name in braces"
            )
        config[key] = ConfigDict(value)
        return
    if key not in settings:
        raise UserError(unknown_key(config, key, settings))
    setting = settings[key]
    *groups, name = key.split(".")
    group = config
    for part in groups:
        if not isinstance(group.get(part), ConfigDict):
            group[part] = ConfigDict()
        group = group[part]
    value = _read(override, setting.type, lambda: setting.valid)
    if isinstance(value, dict) and not Group().accepts(value):
        raise UserError(f"{_short(override)} is not valid; valid: values by name in braces")
    if name in group:  # whose value may have the type of another one that is valid, too
        del group[name]
    group[name] = value


def _is_setting(key: str) -> bool:
    return key.split(".")[0].endswith("_overrides")


# What the text of a value must be, if the entry has no rule.
_FORMS = {bool: "True, False", int: "whole numbers", float: "numbers", tuple: "values in brackets"}


def _read(override: _Override, kind: type, find_rule: Callable[[], Rule | None]) -> Any:
    """Returns the value that an override gives to an entry or a setting.

    The text must have the right form; whether the value is valid is checked with the whole
    configuration.

    Args:
      override: the override.
      kind: type of the value; any other than bool, int, float, str and tuple: a literal or a text.
      find_rule: returns the rule for the value, for the message.

    Raises:
      UserError: the text has another form.
    """
    flag, text = override.flag, override.text
    switches = kind in _READERS and kind is not bool
    if override.negated and (switches or text is not None):
        name = override.key
        raise UserError(f"{_short(override)} is not valid; valid: --config.{name}=VALUE")
    if text is None and switches:
        raise UserError(f"{flag} has no value; valid: {_valid(kind, find_rule())}")
    if text is None:
        return not override.negated
    try:
        return _READERS.get(kind, _literal)(text)
    except ValueError as error:
        valid = _valid(kind, find_rule())
        raise UserError(f"{_short(override)} is not valid; valid: {valid}") from error


def _valid(kind: type, rule: Rule | None) -> str:
    return str(rule) if rule is not None else _FORMS.get(kind, "a text")


def _literal(text: str) -> Any:
    """Returns the value of a Python literal, or the text itself if it is none."""
    if text in ("true", "false"):
        return text == "true"
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _read_tuple(text: str) -> tuple[Any, ...]:
    value = _literal(text)
    if not isinstance(value, tuple | list):
        raise ValueError("no values in brackets")
    return tuple(value)


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "1", "false", "0"):
        raise ValueError("neither True nor False")
    return text.lower() in ("true", "1")


_READERS = {bool: _read_bool, int: int, float: float, str: str, tuple: _read_tuple}


def _short(override: _Override) -> str:
    """Returns an override for a message, shortened if it is long."""
    return override.flag if len(override.flag) <= LONGEST else f"{override.flag[:LONGEST]}..."
