"""The embedded scenes: images with label maps, drawn when they are read.

A scene shows one to four handwritten digits, enlarged, rotated and coloured, on a crop of a
photograph. Digits and photographs come with scikit-learn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data.datasets.digits import DigitsSource, installed_file
from tokenvit_jax.data.record import DatasetInfo, Record

DIGITS = 4  # 0 to 3: few classes are learnt in minutes
PHOTOGRAPHS = "china", "flower"
SIDE = 128  # height and width of a scene [pixels]

INFO = DatasetInfo(
    name="scenes",
    splits={"train": 2000, "test": 200},
    train_split="train",
    eval_split="test",
    fields=frozenset({"image", "label_map"}),
    num_classes=DIGITS + 1,
    classes=("background", *map(str, range(DIGITS))),
)

_HEIGHTS = 32, 72  # height of a digit [pixels]
_MAX_TURN = 15.0  # largest rotation of a digit [degrees]
_MAX_SHIFT = 12  # largest distance from the centre of the quarter to the digit's [pixels]
_BACKGROUND_SIDES = 96, 160  # sides of the square cut from a photograph [pixels]
_BRIGHTNESS = 0.25, 0.6  # brightness of the background
_COLORS = 128, 256  # colour levels of a digit
_BICUBIC = Image.Resampling.BICUBIC


def open_split(config: ConfigDict, split: str) -> "ScenesSource":
    """Opens a split for reading; `config` is not used."""
    del config
    return ScenesSource(split)


def open_photographs(split: str) -> list[Image.Image]:
    """Returns the parts of the photographs that a split shows: "test" has the right quarters."""
    parts = []
    for name in PHOTOGRAPHS:
        pixels = np.asarray(Image.open(installed_file(f"images/{name}.jpg")))  # (427, 640, 3)
        border = pixels.shape[1] * 3 // 4
        part = pixels[:, border:] if split == "test" else pixels[:, :border]
        parts.append(Image.fromarray(part))
    return parts


def draw_background(
    photographs: Sequence[Image.Image], rng: np.random.Generator, side: int
) -> tuple[Image.Image, int]:
    """Cuts a square from a photograph, darkens it and mirrors every second one.

    Args:
      photographs: result of :func:`open_photographs`.
      rng: source of all random numbers.
      side: height and width of the result [pixels].

    Returns:
      The square, and the place of the photograph in PHOTOGRAPHS.
    """
    number = int(rng.integers(len(photographs)))
    photograph = photographs[number]
    cut = int(rng.integers(*_BACKGROUND_SIDES, endpoint=True))
    left, top = (int(rng.integers(length - cut + 1)) for length in photograph.size)
    image = photograph.resize((side, side), _BICUBIC, (left, top, left + cut, top + cut))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    brightness = rng.uniform(*_BRIGHTNESS)
    return image.point(lambda level: level * brightness), number


class Drawing(NamedTuple):
    """A scene.

    Attributes:
      image: the image.
      digits: its digits with their strokes (H, W) bool; later ones lie on top.
      photograph: place of the photograph behind them in PHOTOGRAPHS.
    """

    image: Image.Image
    digits: list[tuple[int, np.ndarray]]
    photograph: int


class ScenesSource:
    """Scenes of 128 x 128 pixels; the same index gives the same scene.

    The strokes of a digit have the label digit + 1, everything else has the label 0. Test scenes
    show digits of the test split of "digits" on the right quarters of the photographs, which
    training scenes do not show.
    """

    def __init__(self, split: str):
        self._split = split
        digits = DigitsSource(split)
        records = [digits.read(index) for index in range(len(digits))]
        self._digits = [
            (record["image"].convert("L"), record["label"])
            for record in records
            if record["label"] < DIGITS
        ]
        self._photographs = open_photographs(split)

    def __len__(self) -> int:
        return INFO.splits[self._split]

    def name(self, index: int) -> str:
        """See :class:`tokenvit_jax.data.record.Source`."""
        return f"scenes split {self._split!r}, record {index}"

    def read(self, index: int) -> Record:
        """See :class:`tokenvit_jax.data.record.Source`."""
        image, digits, _ = self.draw(index)
        label = np.zeros(image.size[::-1], np.uint8)
        for digit, strokes in digits:
            label[strokes] = digit + 1
        return Record(id=index, image=image, label_map=label)

    def draw(self, index: int) -> Drawing:
        """Returns a scene."""
        rng = np.random.default_rng((list(INFO.splits).index(self._split), index))
        image, photograph = draw_background(self._photographs, rng, SIDE)
        digits = []
        quarters = rng.permutation(4)[: rng.integers(1, 5)]  # digits overlap little
        for row, column in zip(*divmod(quarters, 2), strict=True):
            coverage, digit = self._draw_digit(rng)
            centre = SIDE * (np.array([column, row]) / 2 + 1 / 4)
            shift = rng.integers(-_MAX_SHIFT, _MAX_SHIFT, 2, endpoint=True)
            space = SIDE - np.array(coverage.size)
            place = (centre + shift - np.array(coverage.size) / 2).astype(int).clip(0, space)
            left, top = place.tolist()
            image.paste(tuple(rng.integers(*_COLORS, 3).tolist()), (left, top), coverage)
            strokes = np.zeros(image.size[::-1], bool)
            drawn = np.asarray(coverage) >= 128
            strokes[top : top + drawn.shape[0], left : left + drawn.shape[1]] = drawn
            digits.append((digit, strokes))
        return Drawing(image, digits, photograph)

    def _draw_digit(self, rng: np.random.Generator) -> tuple[Image.Image, int]:
        """Returns the coverage of the pixels by a random digit, 0 to 255, and the digit."""
        image, digit = self._digits[rng.integers(len(self._digits))]
        height = int(rng.integers(*_HEIGHTS, endpoint=True))
        image = image.resize((height, height), _BICUBIC)
        image = image.rotate(rng.uniform(-_MAX_TURN, _MAX_TURN), _BICUBIC, expand=True)
        # The original is eight pixels high: this sharpens its edges and thickens its strokes.
        return image.point(lambda level: (level - 60) * 3), digit
