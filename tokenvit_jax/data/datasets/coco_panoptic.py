"""COCO 2017 with its panoptic annotations: 80 classes of things and 53 of stuff."""

from pathlib import Path

from ml_collections import ConfigDict

from tokenvit_jax.data.datasets import coco, panoptic_files
from tokenvit_jax.data.datasets.label_map_files import parse_names
from tokenvit_jax.data.datasets.panoptic_files import Layout, PanopticSource
from tokenvit_jax.data.record import DatasetInfo

STUFF = parse_names("""
    banner, blanket, bridge, cardboard, counter, curtain, door-stuff, floor-wood, flower, fruit,
    gravel, house, light, mirror-stuff, net, pillow, platform, playingfield, railroad, river, road,
    roof, sand, sea, shelf, snow, stairs, tent, towel, wall-brick, wall-stone, wall-tile, wall-wood,
    water-other, window-blind, window-other, tree-merged, fence-merged, ceiling-merged,
    sky-other-merged, cabinet-merged, table-merged, floor-other-merged, pavement-merged,
    mountain-merged, grass-merged, dirt-merged, paper-merged, food-other-merged,
    building-other-merged, rock-merged, wall-other-merged, rug-merged
""")
LAYOUT = Layout(
    images=coco.LAYOUT.images,
    annotations={
        "train": "annotations/panoptic_train2017.json",
        "val": "annotations/panoptic_val2017.json",
    },
    segments={
        "train": ("annotations/panoptic_train2017", "panoptic_train2017"),
        "val": ("annotations/panoptic_val2017", "panoptic_val2017"),
    },
    how_to_get="valid: the folder with the unpacked train2017.zip, val2017.zip and "
    "panoptic_annotations_trainval2017.zip of COCO, and the archives inside the last one, unpacked",
)
INFO = DatasetInfo(
    name="coco_panoptic",
    splits={"train": 118_287, "val": 5000},
    train_split="train",
    eval_split="val",
    fields=frozenset({"image", "segments"}),
    num_classes=len(coco.INFO.classes) + len(STUFF),
    classes=coco.INFO.classes + STUFF,
    things=frozenset(range(len(coco.INFO.classes))),
)


def open_split(config: ConfigDict, split: str) -> PanopticSource:
    """Opens a split for reading."""
    return PanopticSource(INFO, split, config.data.data_dir)


def prepare(manual_dir: Path, data_dir: Path) -> Path:
    """See :func:`tokenvit_jax.data.datasets.panoptic_files.prepare`."""
    return panoptic_files.prepare(INFO, LAYOUT, manual_dir, data_dir)
