"""Datasets for semantic segmentation, from the unpacked folders that users have of them.

Image files are stored as they are, label maps as PNG files of the labels that training uses: from
0 on, and 255 for what does not count. Nothing is downloaded, and no TensorFlow is needed.
"""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tokenvit_jax.data import class_names
from tokenvit_jax.data.label_maps import IGNORED, decode_label_map, label_table
from tokenvit_jax.data.sources import SEGMENTATION_FOLDER
from tokenvit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the files of a dataset are in `manual_dir`, and what their values stand for.

    Attributes:
        images: for each split, the pattern of its image files.
        lists: for each split, the file with what its images have for the star of the pattern;
            None: all images that fit the pattern.
        replace: what differs in the path of an image and of its label map.
        labels: values in the label maps, and the labels that training uses for them.
        how_to_get: the instructions.
    """

    images: dict[str, str]
    lists: dict[str, str] | None
    replace: tuple[tuple[str, str], ...]
    labels: dict[int, int]
    how_to_get: str

    def label_path(self, image_path: str) -> str:
        """Returns the path, or the pattern, of the label maps of images."""
        for of_image, of_label in self.replace:
            image_path = image_path.replace(of_image, of_label)
        return image_path


# Of the 34 values of Cityscapes, those that its benchmark evaluates, in the order of the classes.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

LAYOUTS = {
    # Zhou et al., "Scene Parsing through ADE20K Dataset" (2017); 0 is all that is none of the 150.
    "ade20k": Layout(
        images={
            "train": "ADEChallengeData2016/images/training/*.jpg",
            "validation": "ADEChallengeData2016/images/validation/*.jpg",
        },
        lists=None,
        replace=(("images/", "annotations/"), (".jpg", ".png")),
        labels={0: IGNORED} | {label + 1: label for label in range(len(class_names.ADE20K))},
        how_to_get=(
            "download ADEChallengeData2016.zip (scene parsing benchmark, 150 classes) from "
            "http://sceneparsing.csail.mit.edu and unpack it there"
        ),
    ),
    # Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding" (2016).
    "cityscapes": Layout(
        images={
            "train": "leftImg8bit/train/*/*_leftImg8bit.png",
            "validation": "leftImg8bit/val/*/*_leftImg8bit.png",
        },
        lists=None,
        replace=(("leftImg8bit/", "gtFine/"), ("_leftImg8bit.png", "_gtFine_labelIds.png")),
        labels=dict.fromkeys(range(34), IGNORED)
        | {value: label for label, value in enumerate(_CITYSCAPES_IDS)},
        how_to_get=(
            "register at https://www.cityscapes-dataset.com, download leftImg8bit_trainvaltest.zip "
            "and gtFine_trainvaltest.zip and unpack both there"
        ),
    ),
    # Mottaghi et al., "The Role of Context for Object Detection and Semantic Segmentation in the
    # Wild" (2014); all 60 values are classes.
    "pascal_context": Layout(
        images=dict.fromkeys(("train", "validation"), "VOCdevkit/VOC2010/JPEGImages/*.jpg"),
        lists={
            "train": "VOCdevkit/VOC2010/ImageSets/SegmentationContext/train.txt",
            "validation": "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt",
        },
        replace=(("JPEGImages/", "SegmentationClassContext/"), (".jpg", ".png")),
        labels={label: label for label in range(len(class_names.PASCAL_CONTEXT))},
        how_to_get=(
            "unpack VOCtrainval_03-May-2010.tar of PASCAL VOC 2010 there, and write the label maps "
            "and lists from trainval_merged.json with MMSegmentation's "
            "tools/dataset_converters/pascal_context.py"
        ),
    ),
}


# Not registered with tensorflow_datasets: its name is of use to this project only.
class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes the train and validation splits of one of `LAYOUTS`; see :func:`prepare`."""

    name = SEGMENTATION_FOLDER
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in LAYOUTS]  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = "See LAYOUTS of this module."
    url_infos = None  # as in imagenet2012.py

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        layout, manual_dir = LAYOUTS[self.builder_config.name], Path(dl_manager.manual_dir)
        return {
            split: self._generate_examples(
                layout, manual_dir, find_images(layout, manual_dir, split)
            )
            for split in layout.images
        }

    def _generate_examples(self, layout: Layout, manual_dir: Path, images: list[str]) -> Iterator:
        table = label_table(layout.labels)
        for path in images:
            label = _label_map(manual_dir / path, manual_dir / layout.label_path(path), table)
            image = io.BytesIO((manual_dir / path).read_bytes())
            yield path, {"image": image, "label": label, "file_name": path}


def prepare(name: str, manual_dir: Path, data_dir: Path) -> Path:
    """Writes a dataset for segmentation as ArrayRecord files; does nothing if they are there.

    Args:
        name: one of `LAYOUTS`, which also say what must lie in `manual_dir`.
        manual_dir: where the unpacked folders lie.
        data_dir: receives the folder `segmentation/NAME/1.0.0`.

    Returns:
        The folder with the files.

    Raises:
        UserError: if a file is missing, or a label map is not as it should be; names it.
    """
    folder = data_dir / SEGMENTATION_FOLDER / name / str(Builder.VERSION)
    if (folder / "dataset_info.json").is_file():
        return folder
    for split in LAYOUTS[name].images:  # before anything is written
        find_images(LAYOUTS[name], manual_dir, split)
    builder = Builder(config=name, data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=str(manual_dir))
    )
    return folder


def find_images(layout: Layout, manual_dir: Path, split: str) -> list[str]:
    """Returns the paths of the images of a split, from `manual_dir` on, sorted.

    Raises:
        UserError: if there are none, or one of an image and its label map is missing.
    """
    pattern = layout.images[split]
    found, labels = _glob(manual_dir, pattern), _glob(manual_dir, layout.label_path(pattern))
    if layout.lists is None:
        where, images = pattern, found
        others = labels - set(map(layout.label_path, images))
        _check_none(others, "is a label map without an image", manual_dir)
    else:
        where, images = layout.lists[split], _listed(manual_dir / layout.lists[split], pattern)
        _check_none(images - found, f"is missing, but listed in {where}", manual_dir)
    if not images:
        raise UserError(f"{where} not found in --manual_dir={manual_dir}; {layout.how_to_get}")
    without = {image for image in images if layout.label_path(image) not in labels}
    _check_none(without, "is an image without a label map", manual_dir)
    return sorted(images)


def _glob(folder: Path, pattern: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.glob(pattern)}


def _listed(file: Path, pattern: str) -> set[str]:
    stems = file.read_text().split() if file.is_file() else ()
    return {pattern.replace("*", stem) for stem in stems}


def _check_none(paths: set[str], what: str, folder: Path) -> None:
    if paths:
        more = f" (the first of {len(paths)})" if len(paths) > 1 else ""
        raise UserError(f"{folder / min(paths)} {what}{more}")


def _label_map(image: Path, label: Path, table: np.ndarray) -> io.BytesIO:
    """Returns the PNG file of the labels of an image."""
    try:
        with Image.open(image) as opened:
            size = opened.size
    except OSError as error:
        raise UserError(f"{image} cannot be read as an image: {error}") from error
    try:
        labels = decode_label_map(label.read_bytes(), table, size)
    except UserError as error:
        raise UserError(f"{label}: {error}") from error
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "PNG")
    buffer.seek(0)
    return buffer
