"""The embedded figures: drawn ones with the 133 keypoints of COCO-WholeBody, not people.

An image shows one or two figures on a crop of a photograph; photographs come with scikit-learn.
Every figure is a record of its own, with its image.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data.datasets.figure_drawing import (
    NUM_PARTS,
    SCALE,
    Figure,
    Layer,
    draw_figure,
    paint,
)
from tokenvit_jax.data.datasets.scenes import draw_background, open_photographs
from tokenvit_jax.data.instances import mask_box
from tokenvit_jax.data.person_boxes import check_images, read_boxes
from tokenvit_jax.data.record import DatasetInfo, Person, Record
from tokenvit_jax.data.whole_body import PARTS, WHOLE_BODY

SIDE = 224  # height and width of an image [pixels]

INFO = DatasetInfo(
    name="figures",
    splits={"train": 1600, "test": 120},
    train_split="train",
    eval_split="test",
    fields=frozenset({"image", "person"}),
    num_classes=1,
    classes=("figure",),
    skeleton=WHOLE_BODY,
)

# The place of a record in a group of four -> image of the group, and figure of the image.
_GROUP = (0, 0), (1, 0), (2, 0), (2, 1)
_IMAGES = 3  # of a group
# By the number of figures: longer side of the points' box [pixels].
_EXTENTS = {1: (120, 210), 2: (110, 160)}
_OUTSIDE = 0.08  # largest part of this box beyond a side of the image
_SHIFT = 0.06  # largest shift of one of two figures from its third of the image / side


def open_split(config: ConfigDict, split: str) -> "FiguresSource":
    """Opens a split for reading; the test split has the boxes of `data.boxes`, if given."""
    return FiguresSource(split, config.data.get("boxes", "") if split == INFO.eval_split else "")


def annotations(config: ConfigDict, split: str) -> dict[str, Any]:
    """Returns the figures of a split in COCO's format.

    Args:
      config: as in :func:`open_split`.
      split: name of the split.

    Returns:
      "images", "annotations", whose "keypoints" are all 133, "categories", and "records": the
      identifier of the image of every record.
    """
    return _annotations(split) | {"records": open_split(config, split).image_ids()}


@functools.cache
def _annotations(split: str) -> dict[str, Any]:
    source = FiguresSource(split)
    places = [source.place(index) for index in range(len(source))]
    count = num_images(split)
    found = [source.draw(image) for image in range(count)]
    return {
        "images": [
            {"id": image, "height": SIDE, "width": SIDE, "file_name": f"{image}.png"}
            for image in range(count)
        ],
        "annotations": [
            {"id": number, "image_id": image, **_annotation(found[image], place)}
            for number, (image, place) in enumerate(places, 1)
        ],
        "categories": [{"id": 1, "name": INFO.classes[0]}],
    }


def num_images(split: str) -> int:
    """Returns the number of images of a split."""
    return INFO.splits[split] // len(_GROUP) * _IMAGES


def _annotation(drawing: "Drawing", place: int) -> dict[str, Any]:
    person = drawing.persons[place]
    left, top, right, bottom = person.box.tolist()
    return {
        "category_id": 1,
        "bbox": [left, top, right - left, bottom - top],
        "area": drawing.areas[place],
        "iscrowd": 0,
        "num_keypoints": int((person.keypoints[PARTS["body"], 2] > 0).sum()),
        "keypoints": person.keypoints.ravel().tolist(),
    }


class Drawing(NamedTuple):
    """An image of figures.

    Attributes:
      image: the image.
      persons: its figures; later ones lie on top.
      areas: the pixels of every figure that are seen.
    """

    image: Image.Image
    persons: list[Person]
    areas: list[int]


class FiguresSource:
    """Images of 224 x 224 pixels with figures; the same index gives the same image and figure.

    Every third image has two figures. The box of a figure holds its pixels that are seen. Points
    outside of the image have no label (0); covered ones, by another figure or another part of the
    same one, have visibility 1, others 2. Test figures stand before the right quarters of the
    photographs, which training figures do not.

    Args:
      split: "train" or "test".
      boxes: a detector's results in COCO's format, which take the place of the figures; "": none.
    """

    def __init__(self, split: str, boxes: str = ""):
        self._split = split
        self._photographs = open_photographs(split)
        self._boxes = read_boxes(boxes) if boxes else []
        check_images(boxes, self._boxes, range(num_images(split)))

    def __len__(self) -> int:
        return len(self._boxes) or INFO.splits[self._split]

    def name(self, index: int) -> str:
        """See :class:`tokenvit_jax.data.record.Source`."""
        return f"figures split {self._split!r}, record {index}"

    def read(self, index: int) -> Record:
        """See :class:`tokenvit_jax.data.record.Source`."""
        if self._boxes:
            found = self._boxes[index]
            person = found.person(len(WHOLE_BODY.names))
            return Record(id=found.image, image=self.draw(found.image).image, person=person)
        image, place = self.place(index)
        drawing = self.draw(image)
        return Record(id=image, image=drawing.image, person=drawing.persons[place])

    def image_ids(self) -> list[int]:
        """Returns the image of every record."""
        if self._boxes:
            return [found.image for found in self._boxes]
        return [self.place(index)[0] for index in range(len(self))]

    def place(self, index: int) -> tuple[int, int]:
        """Returns the image of a record, and its figure in this image."""
        group, place = divmod(index, len(_GROUP))
        image, figure = _GROUP[place]
        return _IMAGES * group + image, figure

    def draw(self, image: int) -> Drawing:
        """Returns an image with its figures."""
        rng = np.random.default_rng((list(INFO.splits).index(self._split), image))
        background, _ = draw_background(self._photographs, rng, SIDE)
        large = SCALE * SIDE, SCALE * SIDE
        layer = Layer(background.resize(large, Image.Resampling.NEAREST), Image.new("L", large))
        count = [figure for number, figure in _GROUP if number == image % _IMAGES][-1] + 1
        columns = rng.permutation(count)
        figures = [_put(draw_figure(rng), column, count, rng) for column in columns]
        owners = [
            paint(layer, figure, place * NUM_PARTS + 1) for place, figure in enumerate(figures)
        ]
        parts = np.asarray(layer.parts)[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE]
        masks = [(parts > 0) & ((parts - 1) // NUM_PARTS == place) for place in range(count)]
        persons = [
            Person(mask_box(mask), _keypoints(figure, owner, parts))
            for mask, figure, owner in zip(masks, figures, owners, strict=True)
        ]
        return Drawing(layer.image.reduce(SCALE), persons, [int(mask.sum()) for mask in masks])


def _put(figure: Figure, column: int, count: int, rng: np.random.Generator) -> Figure:
    """Enlarges a figure and puts it into the image, or into one of two columns."""
    low, high = figure.points.min(0), figure.points.max(0)
    scale = rng.uniform(*_EXTENTS[count]) / (high - low).max()
    half = scale * (high - low) / 2
    # The centre of the box of the points: a part of the box may be outside of the image.
    space = half * (1 - 2 * _OUTSIDE)
    last = np.maximum(SIDE - space, space)
    centre = rng.uniform(space, last)
    if count == 2:  # side by side
        middle = SIDE * ((1 + column) / 3 + rng.uniform(-_SHIFT, _SHIFT))
        centre[0] = np.clip(middle, space[0], last[0])
    points = (figure.points - (low + high) / 2) * scale + centre
    return figure._replace(points=points, head=scale * figure.head)


def _keypoints(figure: Figure, owner: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Returns the keypoints of a drawn figure, (133, 3) float32.

    Args:
      figure: the figure.
      owner: (133,) number of the part that has each point.
      parts: (H, W) number of the part that is seen at every pixel.
    """
    inside = ((figure.points >= 0) & (figure.points <= SIDE - 1)).all(1)
    x, y = figure.points[inside].round().astype(int).T
    keypoints = np.zeros((133, 3), np.float32)
    keypoints[inside, :2] = figure.points[inside]
    keypoints[inside, 2] = np.where(parts[y, x] > owner[inside], 1, 2)
    return keypoints
