"""Pascal Context with its 59 most frequent classes, sorted, and background.

References:
  Mottaghi et al., "The Role of Context for Object Detection and Semantic Segmentation in the
  Wild" (2014).
"""

from pathlib import Path

from ml_collections import ConfigDict

from tokenvit_jax.data.datasets import label_map_files
from tokenvit_jax.data.datasets.label_map_files import LabelMapSource, Layout, parse_names
from tokenvit_jax.data.record import DatasetInfo

CLASSES = parse_names(
    """
    background, aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle,
    building, bus, cabinet, car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog,
    door, fence, floor, flower, food, grass, ground, horse, keyboard, light, motorbike, mountain,
    mouse, person, plate, platform, pottedplant, road, rock, sheep, shelves, sidewalk, sign, sky,
    snow, sofa, table, track, train, tree, truck, tvmonitor, wall, water, window, wood
    """
)

INFO = DatasetInfo(
    name="pascal_context",
    splits={"train": 4998, "validation": 5105},
    train_split="train",
    eval_split="validation",
    fields=frozenset({"image", "label_map"}),
    num_classes=len(CLASSES),
    classes=CLASSES,
)

LAYOUT = Layout(
    images=dict.fromkeys(("train", "validation"), "VOCdevkit/VOC2010/JPEGImages/*.jpg"),
    lists={
        "train": "VOCdevkit/VOC2010/ImageSets/SegmentationContext/train.txt",
        "validation": "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt",
    },
    replace=(("JPEGImages/", "SegmentationClassContext/"), (".jpg", ".png")),
    # All 60 values are classes.
    labels={label: label for label in range(len(CLASSES))},
    how_to_get=(
        "unpack VOCtrainval_03-May-2010.tar of PASCAL VOC 2010 there, and write the label maps "
        "and lists from trainval_merged.json with MMSegmentation's "
        "tools/dataset_converters/pascal_context.py"
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
