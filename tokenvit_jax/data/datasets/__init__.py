"""The datasets: one module each.

A module has `INFO`, the facts about its dataset; `open_split(split, data_dir)`, which returns a
source; and `prepare(manual_dir, data_dir)`, which converts the original files into files that
`open_split` reads. The embedded datasets have no `prepare`: they come with an installed package. A
module is imported only when its dataset is needed.
"""

import importlib
from pathlib import Path
from types import ModuleType

from tokenvit_jax.data.record import DatasetInfo, Source
from tokenvit_jax.errors import UserError, did_you_mean

NAMES = (
    "ade20k",
    "cityscapes",
    "digits",
    "imagenet2012",
    "pascal_context",
    "scenes",
)


def list_datasets() -> list[str]:
    """Returns the names that `config.dataset` can have."""
    return sorted(NAMES)


def dataset_info(name: str) -> DatasetInfo:
    """Returns the facts about a dataset, without reading it.

    Args:
      name: one of :func:`list_datasets`.

    Raises:
      UserError: there is no such dataset.
    """
    return _module(name).INFO


def open_split(name: str, split: str, data_dir: str) -> Source:
    """Opens a split for reading.

    Args:
      name: one of :func:`list_datasets`.
      split: one of `dataset_info(name).splits`.
      data_dir: the folder that `prepare` wrote into; the embedded datasets do not use it.

    Raises:
      UserError: there is no such dataset, or it has not been prepared in `data_dir`.
    """
    return _module(name).open_split(split, data_dir)


def prepare(name: str, manual_dir: Path | None, data_dir: Path) -> Path | None:
    """Turns the original files of a dataset into ArrayRecord files; does nothing if they exist.

    Args:
      name: one of :func:`list_datasets`.
      manual_dir: folder with the original files; None: `data_dir/downloads/manual`.
      data_dir: the folder of all prepared datasets.

    Returns:
      The folder with the files; None for an embedded dataset, which has no files.

    Raises:
      UserError: there is no such dataset, an original file is missing or damaged, or a folder
        cannot be read or written.
    """
    module = _module(name)
    if not hasattr(module, "prepare"):
        return None
    try:
        return module.prepare(manual_dir or data_dir / "downloads" / "manual", data_dir)
    except OSError as error:
        raise UserError(f"cannot prepare {name} in --data_dir={data_dir}: {error}") from error


def _module(name: str) -> ModuleType:
    if name not in NAMES:
        hint = did_you_mean(name, NAMES)
        raise UserError(f"no dataset {name!r}{hint}; valid: {', '.join(list_datasets())}")
    return importlib.import_module(f"{__name__}.{name}")
