"""Cityscapes with the 19 classes that its benchmark evaluates.

References:
  Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding" (2016).
"""

from pathlib import Path

from ml_collections import ConfigDict

from tokenvit_jax.data.datasets import label_map_files
from tokenvit_jax.data.datasets.label_map_files import LabelMapSource, Layout, parse_names
from tokenvit_jax.data.record import IGNORED, DatasetInfo

CLASSES = parse_names(
    """
    road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain,
    sky, person, rider, car, truck, bus, train, motorcycle, bicycle
    """
)

INFO = DatasetInfo(
    name="cityscapes",
    splits={"train": 2975, "validation": 500},
    train_split="train",
    eval_split="validation",
    fields=frozenset({"image", "label_map"}),
    num_classes=len(CLASSES),
    classes=CLASSES,
)

# The values of the evaluated classes, among the 34 values of a label map, in the order of CLASSES.
_VALUES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

LAYOUT = Layout(
    images={
        "train": "leftImg8bit/train/*/*_leftImg8bit.png",
        "validation": "leftImg8bit/val/*/*_leftImg8bit.png",
    },
    lists=None,
    replace=(("leftImg8bit/", "gtFine/"), ("_leftImg8bit.png", "_gtFine_labelIds.png")),
    labels=dict.fromkeys(range(34), IGNORED)
    | {value: label for label, value in enumerate(_VALUES)},
    how_to_get=(
        "register at https://www.cityscapes-dataset.com, download leftImg8bit_trainvaltest.zip "
        "and gtFine_trainvaltest.zip and unpack both there"
    ),
)


def open_split(config: ConfigDict, split: str) -> LabelMapSource:
    """Opens a split for reading.

    Raises:
      UserError: the dataset has not been prepared in `config.data.data_dir`.
    """
    return LabelMapSource(INFO, split, config.data.data_dir)


def prepare(manual_dir: Path, data_dir: Path) -> Path:
    """See :func:`tokenvit_jax.data.datasets.label_map_files.prepare`."""
    return label_map_files.prepare(INFO.name, LAYOUT, manual_dir, data_dir)
