"""Reads and writes the configuration of a run, `config.json` in its workdir."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from tokenvit_jax.data import different_names
from tokenvit_jax.errors import UserError
from tokenvit_jax.output import write_file
from tokenvit_jax.tasks import check_values, default_config
from tokenvit_jax.training.digests import DIGEST, json_digest, sealed

CONFIG_FILE = "config.json"

# A checkpoint depends on these: they determine its parameters, the images it has seen and the
# state of the optimizer.
_FIXED_KEYS = (
    "task", "model", "model_overrides", "dataset", "seed", "batch_size", "data.split",
    "optimizer.name", "optimizer.freeze",
)  # fmt: skip


def read_config(workdir: Path) -> ConfigDict:
    """Returns the configuration that a workdir was written with.

    Raises:
      UserError: the workdir has no configuration, it is damaged, or another version of this package
        wrote it.
    """
    path = workdir / CONFIG_FILE
    if not os.path.lexists(path):
        raise UserError(f"--workdir={workdir} holds no {CONFIG_FILE}: no run was started there")
    try:
        return restore_config(json.loads(read_file(path)), path)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        raise UserError(f"{path} is not readable: {error}") from error


def restore_config(stored: Any, path: Path) -> ConfigDict:
    """Returns the configuration that :func:`plain_config` or :func:`write_config` wrote.

    Args:
      stored: the plain values, with or without a digest.
      path: file that held them, for messages.

    Raises:
      UserError: the values were changed, or another version of this package wrote them.
    """
    if not isinstance(stored, dict):
        raise UserError(f"{path} holds {_brief(stored)}; valid: the entries of a configuration")
    values = {key: value for key, value in stored.items() if key != DIGEST}
    changed = DIGEST in stored and stored[DIGEST] != json_digest(values)
    if "task" not in values and not changed:
        raise UserError(
            f"{path} has no entry 'task': an earlier version of tokenvit_jax wrote this run; use "
            "that version, or train anew in another folder"
        )
    try:
        config = default_config(str(values.get("task")))
        with config.unlocked():
            _fill(config, values)
        check_values(config)
    except UserError as error:
        why = str(error)
    else:
        if not changed:
            return config
        why = "its values do not match its digest"
    if changed:
        raise UserError(
            f"{path} was damaged or edited after it was written: {why}; if the edit is intended, "
            f"remove the entry {DIGEST!r}"
        )
    raise UserError(f"{path}: {why}; another version of tokenvit_jax wrote it, or it was edited")


def _fill(config: ConfigDict, stored: dict[str, Any], group: str = "") -> None:
    """Sets entries of a configuration, or of a group of it, to stored values.

    Raises:
      UserError: an entry is unknown or has a value of another type; the message names it.
    """
    for key, value in stored.items():
        name = f"{group}{key}"
        if key not in config:
            raise UserError(f"it has an unknown entry {name!r}")
        default = config[key]
        is_group = isinstance(default, ConfigDict)
        try:
            if is_group and name.endswith("_overrides"):
                default.update(_with_tuples(dict(value)))
            elif is_group:
                _fill(default, dict(value), f"{name}.")
            elif value is None:  # ConfigDict accepts it for any type
                raise TypeError
            else:
                config[key] = _with_tuples(value)
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            valid = "entries by name" if is_group else f"such as {default!r}"
            raise UserError(f"entry {name!r} is {_brief(value)}; valid: {valid}") from error


def for_inference(config: ConfigDict, data_dir: str | None = None) -> ConfigDict:
    """Changes a run's configuration in place to suit the present devices, and returns it.

    Args:
      config: result of :func:`read_config`.
      data_dir: folder of the prepared dataset; None: the folder used in training.
    """
    config.update({"parallel": "jit", "mesh": {"fsdp": 1}})
    if data_dir is not None:
        config.data.data_dir = data_dir
    return config


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Writes the configuration into the workdir, which is created if necessary.

    The last entry is a digest, by which :func:`read_config` notices that the file was changed.

    Raises:
      UserError: the file cannot be written.
    """
    values = sealed(plain_config(config))
    write_file(workdir / CONFIG_FILE, json.dumps(values, indent=2) + "\n")


def read_file(path: Path) -> bytes:
    """Returns the content of a file.

    Raises:
      UserError: it cannot be read, or is a device or a pipe, which might never end.
    """
    try:
        if not (path.is_file() or path.is_dir()):
            raise OSError("not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def has_config(workdir: Path) -> bool:
    """Returns whether a workdir holds the configuration of a run."""
    return os.path.lexists(workdir / CONFIG_FILE)


def check_version(workdir: Path) -> None:
    """Raises UserError if the run in a workdir is damaged, or of another version."""
    if has_config(workdir):
        read_config(workdir)


def check_same_run(workdir: Path, config: ConfigDict, steps_done: int) -> None:
    """Compares a configuration with the one in the workdir.

    Logs a warning for each entry that changed. An entry that the workdir does not have counts as
    its default: the version that wrote the run had no such entry.

    Args:
      workdir: folder of the run.
      config: present configuration.
      steps_done: step of the latest checkpoint.

    Raises:
      UserError: an entry changed that a checkpoint depends on, the run has more steps than it
        should have, or its configuration cannot be read.
    """
    if not has_config(workdir):
        return
    before, now = (
        flatten_dict(plain_config(tree), sep=".") for tree in (read_config(workdir), config)
    )
    changed = [(key, before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys())]
    changed = [(key, old, new) for key, old, new in changed if old != new]
    for key, old, new in changed:
        if key == "data.classes" and old:
            raise UserError(
                f"the classes differ from the run in {workdir}: {different_names(old, new)}; use "
                "another --workdir, or the old classes to go on with that run"
            )
        averages = key == "ema_decay" and bool(old) != bool(new)
        if averages or key in _FIXED_KEYS or key.split(".")[0] in _FIXED_KEYS:
            has = f"without config.{key}" if old is None else f"with config.{key}={old!r}"
            now = "not set" if new is None else repr(new)
            raise UserError(
                f"{workdir} holds a run {has}, now it is {now}; use another --workdir, or the old "
                "value to go on with that run"
            )
    if config.num_steps < steps_done:
        raise UserError(
            f"config.num_steps={config.num_steps} is below the {steps_done} steps that the run in "
            f"{workdir} has done; valid: from {steps_done}, or another --workdir"
        )
    for key, old, new in changed:
        logging.warning("config.%s changes from %r to %r in the resumed run", key, old, new)


def plain_config(config: ConfigDict) -> dict[str, Any]:
    """Returns the configuration in the form that JSON gives back: tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))


def _with_tuples(value: Any) -> Any:
    """Turns lists back into tuples, which JSON cannot hold; configurations have no lists."""
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."
