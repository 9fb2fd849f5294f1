"""ADE20K with the 150 classes of the scene parsing benchmark.

References:
  Zhou et al., "Scene Parsing through ADE20K Dataset" (2017).
"""

from pathlib import Path

from ml_collections import ConfigDict

from tokenvit_jax.data.datasets import label_map_files
from tokenvit_jax.data.datasets.label_map_files import LabelMapSource, Layout, parse_names
from tokenvit_jax.data.record import IGNORED, DatasetInfo

# The short names that MMSegmentation uses.
CLASSES = parse_names(
    """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
    person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa,
    shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp,
    bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter, sand,
    sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
    pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
    book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar,
    arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight,
    booth, television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator,
    ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer,
    plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven,
    ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen,
    blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen,
    plate, monitor, bulletin board, shower, radiator, glass, clock, flag
    """
)

INFO = DatasetInfo(
    name="ade20k",
    splits={"train": 20_210, "validation": 2000},
    train_split="train",
    eval_split="validation",
    fields=frozenset({"image", "label_map"}),
    num_classes=len(CLASSES),
    classes=CLASSES,
)

LAYOUT = Layout(
    images={
        "train": "ADEChallengeData2016/images/training/*.jpg",
        "validation": "ADEChallengeData2016/images/validation/*.jpg",
    },
    lists=None,
    replace=(("images/", "annotations/"), (".jpg", ".png")),
    # The value 0 stands for everything outside the 150 classes.
    labels={0: IGNORED} | {label + 1: label for label in range(len(CLASSES))},
    how_to_get=(
        "download ADEChallengeData2016.zip (scene parsing benchmark, 150 classes) from "
        "http://sceneparsing.csail.mit.edu and unpack it there"
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
