"""The configuration that a workdir belongs to, in `config.json`."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tokenvit_jax.config import default_config
from tokenvit_jax.errors import UserError

CONFIG_FILE = "config.json"

# What a checkpoint means depends on these: the parameters, and which images were seen.
_FIXED_KEYS = ("model", "model_overrides", "dataset", "seed", "batch_size")


def read_config(workdir: Path) -> ConfigDict:
    """Returns the configuration that a workdir was written with.

    Raises:
      UserError: there is none.
    """
    config = default_config()
    with config.unlocked():
        config.update(_with_tuples(_read_json(workdir)))
    return config.lock()


def for_inference(config: ConfigDict, data_dir: str | None) -> ConfigDict:
    """Returns the configuration of a run for whatever devices there are now, changed in place.

    Args:
      config: of :func:`read_config`.
      data_dir: where the dataset is; None: where it was.
    """
    config.update({"parallel": "jit", "mesh": {"fsdp": 1}})
    if data_dir is not None:
        config.data.data_dir = data_dir
    return config


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Writes the configuration into the workdir, which is made if there is none."""
    workdir.mkdir(parents=True, exist_ok=True)
    replace_file(workdir / CONFIG_FILE, json.dumps(_plain(config), indent=2) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Writes a file in one step: a process that is killed leaves the old text or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def check_same_run(workdir: Path, config: ConfigDict) -> None:
    """Compares the configuration of a resumed run with that of its workdir.

    Warns of other entries that changed.

    Args:
      workdir: folder of the run.
      config: the configuration now.

    Raises:
      UserError: an entry changed that a checkpoint depends on.
    """
    if not (workdir / CONFIG_FILE).exists():
        return
    before, now = _flat(_read_json(workdir)), _flat(_plain(config))
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key.split(".")[0] in _FIXED_KEYS:
            raise UserError(
                f"{workdir} holds a run with config.{key}={old!r}, now it is {new!r}; use another "
                "--workdir, or the old value to go on with that run"
            )
        logging.warning("config.%s changes from %r to %r in the resumed run", key, old, new)


def _read_json(workdir: Path) -> dict[str, Any]:
    path = workdir / CONFIG_FILE
    if not path.exists():
        raise UserError(f"--workdir={workdir} holds no {CONFIG_FILE}: no run was started there")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not readable: {error}") from error


def _plain(config: ConfigDict) -> dict[str, Any]:
    """The configuration as it is read back from JSON: tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))


def _with_tuples(value: Any) -> Any:
    """Undoes what JSON does to tuples; configurations have no lists."""
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        inner = (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
        flat.update(inner)
    return flat
