"""COCO 2017: objects of 80 classes with boxes and masks in photographs."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tokenvit_jax.data.datasets import coco_files
from tokenvit_jax.data.datasets.coco_files import CocoSource, Layout
from tokenvit_jax.data.datasets.label_map_files import parse_names
from tokenvit_jax.data.record import DatasetInfo

LAYOUT = Layout(
    images={"train": "train2017", "val": "val2017"},
    annotations={
        "train": "annotations/instances_train2017.json",
        "val": "annotations/instances_val2017.json",
    },
    how_to_get="valid: the folder with the unpacked train2017.zip, val2017.zip and "
    "annotations_trainval2017.zip of COCO",
    stuff={"train": "stuffthingmaps/train2017", "val": "stuffthingmaps/val2017"},
    num_stuff=183,
)
INFO = DatasetInfo(
    name="coco",
    splits={"train": 117_266, "val": 5000},
    train_split="train",
    eval_split="val",
    fields=frozenset({"image", "instances", "stuff_map"}),  # the last one if it was prepared
    num_classes=80,
    classes=parse_names("""
        person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
        hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
        bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis,
        snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
        racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich,
        orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed,
        dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven,
        toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
        toothbrush
    """),
)


def open_split(config: ConfigDict, split: str) -> CocoSource:
    """Opens a split for reading."""
    return CocoSource(INFO, split, config.data.data_dir)


def annotations(config: ConfigDict, split: str) -> dict[str, Any]:
    """Returns all objects of the evaluation split in COCO's format."""
    return coco_files.read_annotations(INFO.name, config.data.data_dir, split)


def prepare(manual_dir: Path, data_dir: Path) -> Path:
    """See :func:`tokenvit_jax.data.datasets.coco_files.prepare`."""
    return coco_files.prepare(INFO, LAYOUT, manual_dir, data_dir)
