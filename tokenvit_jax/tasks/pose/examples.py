"""Turns records into examples for pose estimation: crops of persons, with their keypoints."""

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.config import input_shape
from tokenvit_jax.data.images import with_channels
from tokenvit_jax.data.person_crops import (
    crop_image,
    crop_matrix,
    draw_frame,
    frame_of_box,
    inverse_matrix,
    mirror,
    transform_points,
)
from tokenvit_jax.data.record import Person, Record, Skeleton, Spec
from tokenvit_jax.errors import UserError

Example = dict[str, np.ndarray]


class PoseExamples:
    """Crops around the boxes of persons.

    An example holds the crop, `image` (H, W, C) uint8. In training, also the keypoints, `keypoints`
    (K, 3) float32: x and y [pixels of the crop] and visibility, 0 for points without a label. In
    evaluation, also the affine map from places in the crop to places in the image, `to_image`
    (2, 3) float32, the score of the box, `score` () float32, and the area of the frame around
    it, `area` () float32 [pixels of the image].

    Args:
      config: provides `image_size`, `in_channels` and `pose.unbiased`; in training also `augment`.
      skeleton: the keypoints.
      train: whether the examples are for training.
    """

    def __init__(self, config: ConfigDict, skeleton: Skeleton, *, train: bool):
        self._train, self._skeleton, self._augment = train, skeleton, config.augment
        self._unbiased = config.pose.unbiased
        *self._size, self._channels = input_shape(config)
        self.specs = {"image": Spec((*self._size, self._channels), np.uint8)}
        if train:
            self.specs["keypoints"] = Spec((len(skeleton.names), 3), np.float32)
        else:
            self.specs["to_image"] = Spec((2, 3), np.float32)
            self.specs |= {name: Spec((), np.float32) for name in ("score", "area")}

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """See :class:`tokenvit_jax.data.record.Examples`."""
        image, person = with_channels(record["image"], self._channels), record["person"]
        if not self._train:
            return self.eval_example(image, person.box, person.score)
        return self._train_example(image, person, rng)

    def empty(self) -> Example:
        """See :class:`tokenvit_jax.data.record.Examples`."""
        return {name: np.zeros(*spec) for name, spec in self.specs.items()}

    def eval_example(self, image: Image.Image, box: np.ndarray, score: float = 1.0) -> Example:
        """Returns the example of a box.

        Args:
          image: the image, with the channels of the examples.
          box: (4,) x1 y1 x2 y2 [pixels].
          score: score of the box.

        Raises:
          UserError: the box has no area.
        """
        frame = self._frame(box)
        matrix = crop_matrix(frame, self._size, unbiased=self._unbiased)
        return {
            "image": crop_image(image, matrix, self._size),
            "to_image": inverse_matrix(matrix).astype(np.float32),
            "score": np.float32(score),
            "area": np.float32(frame.size.prod()),
        }

    def _frame(self, box):
        try:
            return frame_of_box(box, self._size)
        except ValueError as error:
            raise UserError(str(error)) from error

    def _train_example(self, image: Image.Image, person: Person, rng) -> Example:
        frame = self._frame(person.box)
        frame = draw_frame(rng, person, frame, self._skeleton, self._augment)
        matrix = crop_matrix(frame, self._size, unbiased=self._unbiased)
        crop = crop_image(image, matrix, self._size)
        keypoints = transform_points(person.keypoints, matrix)
        if rng.random() < self._augment.flip:
            crop, keypoints = mirror(crop, keypoints, self._skeleton)
        return {"image": crop, "keypoints": keypoints}
