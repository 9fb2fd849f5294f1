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
from tokenvit_jax.tasks import default_config

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
      UserError: the workdir has no configuration, or another version of this package wrote it.
    """
    return restore_config(_read_json(workdir), workdir / CONFIG_FILE)


def restore_config(stored: dict[str, Any], path: Path) -> ConfigDict:
    """Returns the configuration that :func:`plain_config` turned into plain values.

    Args:
      stored: the plain values.
      path: file that held them, for the message.

    Raises:
      UserError: another version of this package wrote them.
    """
    stored = _with_tuples(stored)
    config = default_config(stored["task"])
    known = flatten_dict(config.to_dict(), sep=".")
    unknown = [
        key
        for key in flatten_dict(stored, sep=".")
        if key not in known and not key.split(".")[0].endswith("_overrides")
    ]
    if unknown:
        raise UserError(
            f"{path} has entries that config.task={config.task!r} does not have, such as "
            f"{unknown[0]!r}: another version of tokenvit_jax wrote this run"
        )
    with config.unlocked():
        config.update(stored)
    return config


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
    """Writes the configuration into the workdir, which is created if necessary."""
    workdir.mkdir(parents=True, exist_ok=True)
    replace_file(workdir / CONFIG_FILE, json.dumps(plain_config(config), indent=2) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Replaces a file atomically: a killed process leaves either the old text or the new text."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def has_config(workdir: Path) -> bool:
    """Returns whether a workdir holds the configuration of a run."""
    return (workdir / CONFIG_FILE).exists()


def check_version(workdir: Path) -> None:
    """Raises UserError if an earlier version of this package wrote the run in a workdir."""
    if has_config(workdir):
        _read_json(workdir)


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
        should have, or an earlier version of this package wrote it.
    """
    if not has_config(workdir):
        return
    stored = _read_json(workdir)
    before, now, default = (
        flatten_dict(tree, sep=".")
        for tree in (stored, plain_config(config), plain_config(default_config(stored["task"])))
    )
    before = {key: before.get(key, default.get(key)) for key in before.keys() | now.keys()}
    changed = [(key, before[key], now.get(key)) for key in sorted(before)]
    changed = [(key, old, new) for key, old, new in changed if old != new]
    for key, old, new in changed:
        if key == "data.classes":
            raise UserError(
                f"the classes differ from the run in {workdir}: {different_names(old, new)}; use "
                "another --workdir, or the old classes to go on with that run"
            )
        averages = key == "ema_decay" and bool(old) != bool(new)
        if averages or key in _FIXED_KEYS or key.split(".")[0] in _FIXED_KEYS:
            raise UserError(
                f"{workdir} holds a run with config.{key}={old!r}, now it is {new!r}; use another "
                "--workdir, or the old value to go on with that run"
            )
    if config.num_steps < steps_done:
        raise UserError(
            f"config.num_steps={config.num_steps} is below the {steps_done} steps that the run in "
            f"{workdir} has done; valid: from {steps_done}, or another --workdir"
        )
    for key, old, new in changed:
        logging.warning("config.%s changes from %r to %r in the resumed run", key, old, new)


def _read_json(workdir: Path) -> dict[str, Any]:
    path = workdir / CONFIG_FILE
    if not path.exists():
        raise UserError(f"--workdir={workdir} holds no {CONFIG_FILE}: no run was started there")
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not readable: {error}") from error
    if "task" not in stored:
        raise UserError(
            f"{path} has no entry 'task': an earlier version of tokenvit_jax wrote this run; use "
            "that version, or train anew in another folder"
        )
    return stored


def plain_config(config: ConfigDict) -> dict[str, Any]:
    """Returns the configuration in the form that JSON gives back: tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))


def _with_tuples(value: Any) -> Any:
    """Turns lists back into tuples, which JSON cannot hold; configurations have no lists."""
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
