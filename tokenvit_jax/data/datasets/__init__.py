"""The datasets: one module each.

A module has `INFO`, the facts about its dataset; `open_split(config, split)`, which returns a
source; and `prepare(manual_dir, data_dir)`, which converts the original files into files that
`open_split` reads. The embedded datasets have no `prepare`: they come with an installed package.

A module whose records have "instances" or "person" also has `annotations(config, split)`, the
objects or persons of all images of a split in COCO's format.

A module whose facts depend on the configuration, such as the classes of a folder of images, has
`read_info(config)` in place of `INFO`, or beside it where some facts are in the prepared files.

`config.dataset` is the name of one of these modules, `tfds:NAME`, or the full name of a module
outside this package, such as "my_package.my_dataset". A module is imported only when its dataset is
needed.
"""

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from tokenvit_jax.config import ENTRIES, check_entries
from tokenvit_jax.data.record import DatasetInfo, Source, check_skeleton
from tokenvit_jax.errors import UserError, did_you_mean

NAMES = (
    "ade20k",
    "ade20k_instances",
    "ade20k_panoptic",
    "cityscapes",
    "coco",
    "coco_panoptic",
    "coco_wholebody",
    "depth_scenes",
    "digits",
    "fashion_mnist",
    "figures",
    "imagenet2012",
    "kitti_depth",
    "motorcycle",
    "nyu_depth_v2",
    "pascal_context",
    "scene_instances",
    "scene_segments",
    "scenes",
)
# Entries of the configuration from which the facts about a dataset follow.
_READ = ("dataset", "data.data_dir", "data.classes", "data.split")
# Names of modules with `read_info`, and how they are written in `config.dataset`.
_READERS = {"folder": "folder", "none": "none", "tfds": "tfds:NAME"}
_READ_FIELDS = frozenset({"image", "label", "label_map"})  # of folder and tfds:NAME


def list_datasets() -> list[str]:
    """Returns the names of the built-in datasets."""
    return sorted(NAMES)


def datasets_with(fields: frozenset[str]) -> list[str]:
    """Returns the values of `config.dataset` whose records have all these fields."""
    fitting = [name for name in list_datasets() if fields <= builtin_info(name).fields]
    readers = _READERS.values() if fields <= _READ_FIELDS else ()
    return fitting + sorted(form for form in readers if form != "none")


def builtin_info(name: str) -> DatasetInfo:
    """Returns the facts about a built-in dataset, without reading it.

    Args:
      name: one of :func:`list_datasets`.

    Raises:
      UserError: there is no such dataset.
    """
    if name not in NAMES:
        raise _unknown(name)
    return _module(name).INFO


def dataset_info(config: ConfigDict) -> DatasetInfo:
    """Returns the facts about the dataset of a configuration.

    Args:
      config: reads `dataset` and `data.classes`, names that replace the dataset's own; for a
        dataset that is not built in also `data.data_dir` and `data.split`.

    Raises:
      UserError: an entry is not valid, there is no such dataset, it cannot be read, it has another
        number of classes, or objects that cannot be evaluated.
    """
    check_entries(config, {key: ENTRIES[key] for key in _READ})
    module = _module(config.dataset)
    info = _read_info(module, config)
    if "." in config.dataset and not config.dataset.startswith("tfds:"):  # as in `_module`
        _check_own(config.dataset, module, info)
    return info


def _check_own(name: str, module: ModuleType, info: DatasetInfo) -> None:
    """Raises UserError if a module outside this package lacks what evaluation needs."""
    for field in sorted({"instances", "person"} & info.fields):
        if not hasattr(module, "annotations"):
            raise UserError(
                f"config.dataset={name!r}: records of this module have {field!r}, but it has no "
                "annotations(config, split), which their evaluation needs"
            )
    if "person" not in info.fields:
        return
    if info.skeleton is None:
        raise UserError(
            f"config.dataset={name!r}: records of this module have 'person', but its INFO has no "
            "skeleton"
        )
    try:
        check_skeleton(info.skeleton)
    except UserError as error:
        raise UserError(f"config.dataset={name!r}: {error}") from error


def _read_info(module: ModuleType, config: ConfigDict) -> DatasetInfo:
    classes = tuple(config.data.classes)
    if not hasattr(module, "INFO"):
        return module.read_info(config)
    if config.data.split:
        raise UserError(
            f"config.data.split={config.data.split} is for folders and tfds:NAME; "
            f"config.dataset={config.dataset!r} has splits of its own"
        )
    info = module.read_info(config) if hasattr(module, "read_info") else module.INFO
    if not classes:
        return info
    if _are_things(info, classes):
        things = frozenset(range(info.num_classes))
        return dataclasses.replace(info, classes=classes, num_classes=len(classes), things=things)
    if len(classes) != info.num_classes:
        raise UserError(
            f"config.data.classes has {len(classes)} names; valid: one for each of the "
            f"{info.num_classes} classes of config.dataset={config.dataset!r}, or ()"
        )
    return dataclasses.replace(info, classes=classes)


def _are_things(info: DatasetInfo, classes: tuple[str, ...]) -> bool:
    """Returns whether a dataset of objects has the first ones of these classes, and not all."""
    return "instances" in info.fields and classes[: info.num_classes] == info.classes != classes


def open_split(config: ConfigDict, split: str) -> Source:
    """Opens a split for reading.

    Args:
      config: reads `dataset` and the entries of `data` that its module reads, such as `data_dir`,
        the folder that `prepare` wrote into.
      split: the `train_split` or `eval_split` of :func:`dataset_info`.

    Raises:
      UserError: there is no such dataset, or it has not been prepared in `data_dir`.
    """
    return _module(config.dataset).open_split(config, split)


def open_annotations(config: ConfigDict, split: str) -> dict[str, Any]:
    """Returns the objects of all images of a split in COCO's format, for its evaluation code.

    Args:
      config: as in :func:`open_split`, for a dataset whose records have "instances" or "person".
      split: as in :func:`open_split`.

    Returns:
      "images", in the order of the split, "annotations" and "categories". For persons, each of whom
      is a record, also "records", the identifier of the image of every record; and "keypoints" of
      an annotation has all points of the skeleton.

    Raises:
      UserError: as :func:`open_split`.
    """
    found = _module(config.dataset).annotations(config, split)
    # Classes of stuff that a model has besides are categories without objects.
    known = {entry["id"] for entry in found["categories"]}
    others = enumerate(config.data.classes[len(known) :], max(known) + 1)
    categories = [*found["categories"], *({"id": i, "name": name} for i, name in others)]
    return found | {"categories": categories}


def check_reads_files(config: ConfigDict, data_dir: str | None) -> None:
    """Raises UserError if a folder is named for a dataset that comes with an installed package.

    Args:
      config: reads `dataset`.
      data_dir: value of the flag --data_dir; None: it is not given.
    """
    embedded = config.dataset in NAMES and not hasattr(_module(config.dataset), "prepare")
    if data_dir is not None and embedded:
        raise UserError(
            f"--data_dir={data_dir} has no effect: dataset {config.dataset!r} comes with an "
            "installed package; for images of a folder, also give --dataset=folder to evaluate"
        )


def with_class_names(config: ConfigDict) -> ConfigDict:
    """Returns a configuration that holds the names of the classes of its dataset.

    A run with this configuration can be used where the dataset is not. The classes of a built-in
    dataset are known everywhere and are left out.

    Raises:
      UserError: as :func:`dataset_info`.
    """
    if config.dataset in NAMES:
        return config
    info = dataset_info(config)
    names = info.classes or tuple(f"class {label}" for label in range(info.num_classes))
    config = config.copy_and_resolve_references()
    config.data.classes = names
    return config


def with_dataset(config: ConfigDict, dataset: str) -> ConfigDict:
    """Returns the configuration of a run with another dataset, which has the same classes.

    If the names are the same, the labels follow the names of the run. Otherwise the number of
    classes must be the same, and the names become the dataset's; or the dataset has objects, whose
    classes are the things of the run, the first ones of its classes.

    Raises:
      UserError: there is no such dataset, or it has another number of classes.
    """
    before = dataset_info(config)
    config = config.copy_and_resolve_references()
    config.dataset, config.data.classes, config.data.split = dataset, (), 0.0
    now, names = dataset_info(config), before.classes or ()
    if before.things == frozenset(range(now.num_classes)) and _are_things(now, names):
        config.data.classes = names
        return config
    if now.num_classes != before.num_classes:
        raise UserError(
            f"dataset {dataset!r} has {now.num_classes} classes, the run has {before.num_classes} "
            f"({before.name})"
        )
    if set(now.classes or ()) == set(before.classes or ()) and now.classes != before.classes:
        if hasattr(_module(dataset), "INFO"):
            raise UserError(f"dataset {dataset!r} has the classes of the run in another order")
        config.data.classes = before.classes
    return config


def prepare(name: str, manual_dir: Path | None, data_dir: Path) -> Path | None:
    """Turns the original files of a dataset into ArrayRecord files; does nothing if they exist.

    Args:
      name: a value of `config.dataset`.
      manual_dir: folder with the original files; None: `data_dir/downloads/manual`.
      data_dir: the folder of all prepared datasets.

    Returns:
      The folder with the files; None for a dataset that needs no preparation.

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
    """Imports the module of a dataset."""
    kind = "tfds" if name.startswith("tfds:") else name
    if kind in (*NAMES, *_READERS) and name != "tfds":
        return importlib.import_module(f"{__name__}.{kind}")
    if "." not in name:
        raise _unknown(name)
    try:
        module = importlib.import_module(name)
    except (ImportError, TypeError) as error:  # TypeError: the name begins with a dot
        raise UserError(f"config.dataset={name!r}: cannot import this module: {error}") from error
    if not (hasattr(module, "INFO") or hasattr(module, "read_info")):
        raise UserError(f"config.dataset={name!r}: this module has neither INFO nor read_info")
    return module


def _unknown(name: str) -> UserError:
    hint = did_you_mean(name, (*NAMES, *_READERS))
    forms = ", ".join(_READERS.values())
    return UserError(
        f"no dataset {name!r}{hint}; valid: {', '.join(list_datasets())}, {forms}, or a module "
        "such as my_package.my_dataset"
    )
