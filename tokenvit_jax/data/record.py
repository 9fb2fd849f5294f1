"""Types that datasets, tasks and the pipeline share.

A source gives records, :class:`Examples` turn each record into the arrays of one example, and the
pipeline stacks the examples into batches.
"""

import dataclasses
import itertools
import re
from typing import NamedTuple, Protocol, TypedDict

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import DTypeLike
from PIL import Image

from tokenvit_jax.errors import UserError

IGNORED = 255  # label of pixels that do not count


class Instances(NamedTuple):
    """Objects in an image, with one box and one mask each.

    Attributes:
      boxes: (n, 4) float32, x1 y1 x2 y2 [pixels].
      classes: (n,) int32.
      crowd: (n,) bool, whether an entry is a group of objects, which evaluation ignores.
      masks: n run-length encodings, decoded when they are needed.
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    masks: list[str]


class Segments(NamedTuple):
    """A panoptic label map: every pixel belongs to one of n segments, or to none.

    Attributes:
      ids: (H, W) int32, the identifier of the segment of every pixel; 0: none (void).
      numbers: (n,) int32, the identifiers of the segments, from 1 on, each once. A segment may have
        no pixels, where others lie over it.
      classes: (n,) int32.
      crowd: (n,) bool, whether a segment is a group of objects, which evaluation ignores.
      areas: (n,) int64, areas for the evaluation [pixels], which some datasets count before
        segments are pasted over others.
    """

    ids: np.ndarray
    numbers: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray


class Person(NamedTuple):
    """One person in an image.

    Attributes:
      box: (4,) float32, x1 y1 x2 y2 [pixels].
      keypoints: (K, 3) float32, x, y [pixels] and visibility: 0 for a point without a label, whose
        place means nothing, otherwise above 0, also fractions. A box of a detector has no labels.
      score: score of the box; 1 for an annotated one.
    """

    box: np.ndarray
    keypoints: np.ndarray
    score: float = 1.0


class Skeleton(NamedTuple):
    """The keypoints that a dataset marks on a person.

    Attributes:
      names: one per keypoint.
      flip_pairs: keypoints that a horizontal flip exchanges.
      sigmas: falloff of the similarity of each keypoint, relative to the person's size.
      limbs: pairs of keypoints between which pictures draw a line.
      upper_body: keypoints of the upper half of the body, for crops of one half.
      parts: name of a part that evaluation looks at alone -> its keypoints; the first one is the
        body, whose points tell the size of a predicted person.
    """

    names: tuple[str, ...]
    flip_pairs: tuple[tuple[int, int], ...]
    sigmas: tuple[float, ...]
    limbs: tuple[tuple[int, int], ...]
    upper_body: tuple[int, ...]
    parts: dict[str, range]


def check_skeleton(skeleton: Skeleton) -> None:
    """Raises UserError if the parts of a skeleton do not fit together.

    Every keypoint has a sigma above 0, limbs, upper body and parts name keypoints, and no keypoint
    is in two flip pairs. A keypoint with "left" in its name is exchanged with the one that has
    "right" in this place.
    """
    names, count = skeleton.names, len(skeleton.names)
    if len(skeleton.sigmas) != count or not all(sigma > 0 for sigma in skeleton.sigmas):
        raise UserError(
            f"the skeleton has {len(skeleton.sigmas)} sigmas for {count} keypoints; valid: one "
            "above 0 for each"
        )
    for field, groups in {
        "flip_pairs": skeleton.flip_pairs,
        "limbs": skeleton.limbs,
        "upper_body": (skeleton.upper_body,),
        "parts": skeleton.parts.values(),
    }.items():
        for point in itertools.chain(*groups):
            if not 0 <= point < count:
                raise UserError(
                    f"{field} of the skeleton have the keypoint {point}; valid: 0 to {count - 1}"
                )
    partners: dict[int, int] = {}
    for pair in skeleton.flip_pairs:
        if len({*pair}) != 2 or partners.keys() & {*pair}:
            raise UserError(
                f"flip_pairs of the skeleton have {pair}; valid: two different keypoints that are "
                "in no other pair"
            )
        partners |= {pair[0]: pair[1], pair[1]: pair[0]}
    for point, name in enumerate(names):
        wanted = _other_side(name)
        found = names[partners[point]] if point in partners else "no keypoint"
        if wanted != name and found != wanted:
            raise UserError(
                f"flip_pairs of the skeleton exchange {name!r} with {found!r}; valid: {wanted!r}"
            )


def _other_side(name: str) -> str:
    """Returns a name of a keypoint with left and right exchanged."""
    sides = {"left": "right", "right": "left"}
    return "".join(sides.get(part, part) for part in re.split("(left|right)", name))


class Record(TypedDict, total=False):
    """One record of a source; holds only the fields that its dataset has.

    Attributes:
      id: the dataset's own identifier if its evaluation code needs one, else the record's index; in
        datasets of persons that of the image.
      image: RGB image, or RGBA where the dataset has alpha.
      label: class of the image.
      label_map: (H, W) uint8, class of every pixel, or IGNORED for pixels that do not count.
      instances: objects.
      segments: panoptic label map.
      stuff_map: (H, W) uint8, the class of a thing or of stuff of every pixel of an image with
        objects, or IGNORED. These classes are not those of the objects.
      depth: (H, W) float32 [metres], 0 where unknown.
      person: a person in the image.
    """

    id: int | str
    image: Image.Image
    label: int
    label_map: np.ndarray
    instances: Instances
    segments: Segments
    stuff_map: np.ndarray
    depth: np.ndarray
    person: Person


def label_field(config: ConfigDict) -> str:
    """Returns the field that the records of a task hold besides the image.

    Most datasets have one kind of ground truth; folders and tensorflow_datasets may have several.

    Args:
      config: reads `task` and `dataset`.

    Raises:
      UserError: such datasets have nothing for the task.
    """
    task = config.get("task", "classification")
    fields = {"classification": "label", "segmentation": "label_map", "masks": "label_map"}
    if task not in fields:
        raise UserError(
            f"config.dataset={config.dataset!r} has nothing for config.task={task!r}; valid for "
            f"this dataset: {', '.join(fields)}"
        )
    return fields[task]


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Facts about a dataset.

    Attributes:
      name: name of the dataset in configs.
      splits: number of records in each split.
      train_split: the split to train on.
      eval_split: the split to evaluate on.
      fields: names of the fields of its records, besides "id".
      num_classes: classes are 0 to num_classes - 1.
      classes: names of the classes in this order; None if the dataset gives none.
      things: the classes that are things (countable), the others being stuff; None if that is not
        known, or means nothing.
      skeleton: the keypoints; None if the dataset has none.
      center_crop: whether evaluation of a classifier crops the centre; False where the subject
        fills the image.
    """

    name: str
    splits: dict[str, int]
    train_split: str
    eval_split: str
    fields: frozenset[str]
    num_classes: int
    classes: tuple[str, ...] | None
    things: frozenset[int] | None = None
    skeleton: Skeleton | None = None
    center_crop: bool = False

    def same_classes(self, other: "DatasetInfo") -> bool:
        """Returns whether two datasets have as many classes, with the same names if both name them.

        The names "class 0", "class 1" and so on stand for unnamed classes.
        """
        if self.num_classes != other.num_classes:
            return False
        unnamed = tuple(f"class {label}" for label in range(self.num_classes))
        names = {tuple(info.classes) for info in (self, other) if info.classes} - {unnamed}
        return len(names) <= 1


class Source(Protocol):
    """Gives random access to the records of one split; can be sent to another process."""

    def __len__(self) -> int:
        """Returns the number of records."""

    def read(self, index: int) -> Record:
        """Returns a record.

        Raises:
          UserError: the record cannot be read; the message names dataset, split, index and file.
        """

    def name(self, index: int) -> str:
        """Returns the name of a record in messages: dataset, split, index and file."""

    def portrait(self) -> np.ndarray:
        """Returns which images are higher than wide, (n,) bool, without reading the images.

        Only examples with two canvases need it.
        """


class Spec(NamedTuple):
    """Shape and type of one array of an example."""

    shape: tuple[int, ...]
    dtype: DTypeLike


class Examples(Protocol):
    """Turns records into examples, using only numpy; is sent to the worker processes.

    Attributes:
      specs: name of an array -> its shape and type; equal for all examples, but for canvases.
      canvases: height and width of the images of training examples that are not higher than wide,
        and of the others; (), or no such attribute: all have one size. A batch holds images of one
        canvas. Both have as many pixels; `specs` has the first one.
    """

    specs: dict[str, Spec]
    canvases: tuple[tuple[int, int], ...]

    def __call__(self, record: Record, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """Returns the example of a record.

        Args:
          record: the record, with the fields that the task reads.
          rng: source of all random numbers in training; None in evaluation.

        Raises:
          UserError: the record does not fit; the caller adds the record's name.
        """

    def empty(self) -> dict[str, np.ndarray]:
        """Returns an example that stands for no record: it fills the last batch of a pass."""
