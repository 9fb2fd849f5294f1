"""Writes small datasets with label maps in the layouts of the original archives."""

from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 48, 40

# Paths of an image and its label map: two training images, one validation image.
PAIRS = {
    "ade20k": [
        (
            f"ADEChallengeData2016/images/{split}/{stem}.jpg",
            f"ADEChallengeData2016/annotations/{split}/{stem}.png",
        )
        for split, stem in (
            ("training", "ADE_train_00000001"),
            ("training", "ADE_train_00000002"),
            ("validation", "ADE_val_00000001"),
        )
    ],
    "cityscapes": [
        (f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelIds.png")
        for stem in (
            "train/aachen/aachen_000000_000019",
            "train/bochum/bochum_000000_000313",
            "val/lindau/lindau_000000_000019",
        )
    ],
    "pascal_context": [
        (
            f"VOCdevkit/VOC2010/JPEGImages/{stem}.jpg",
            f"VOCdevkit/VOC2010/SegmentationClassContext/{stem}.png",
        )
        for stem in ("2008_000002", "2008_000003", "2008_000004")
    ],
}
NUM_VALUES = {"ade20k": 151, "cityscapes": 34, "pascal_context": 60}


def values(name: str, number: int) -> np.ndarray:
    """Returns a label map with all values of the dataset, uint8 (HEIGHT, WIDTH)."""
    places = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    return ((places + number) % NUM_VALUES[name]).astype(np.uint8)


def write_dataset(name: str, folder: Path) -> None:
    """Writes all files of a dataset."""
    for number, (image, label) in enumerate(PAIRS[name]):
        for path in (image, label):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / image)
        Image.fromarray(values(name, number)).save(folder / label)
    if name == "pascal_context":
        lists = folder / "VOCdevkit/VOC2010/ImageSets/SegmentationContext"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("2008_000002\n2008_000003\n")
        (lists / "val.txt").write_text("2008_000004\n")
