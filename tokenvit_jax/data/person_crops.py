"""Crops of persons for top-down pose estimation: frames around boxes, pixels and keypoints.

Places are those of pixel centres: (0, 0) is the centre of the top left pixel.

References:
  Xiao et al. 2018, "Simple Baselines for Human Pose Estimation and Tracking", the frame; Wang et
  al. 2018, "Mscoco keypoints challenge", the crops of half a body; Huang et al. 2020, "The Devil is
  in the Details: Delving into Unbiased Data Processing for Human Pose Estimation" (UDP).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data.record import Person, Skeleton

_SHIFT_PROBABILITY = 0.3
_ROTATION_PROBABILITY = 0.6
_MIN_VISIBLE = 8  # more keypoints than these are seen where half of the body is cropped
_HALF_BODY_PADDING = 1.5


class Frame(NamedTuple):
    """The rectangle of an image that a crop shows.

    Attributes:
      center: (2,) x, y [pixels].
      size: (2,) width, height [pixels].
      rotation: turns the content of the crop counterclockwise [degrees].
    """

    center: np.ndarray
    size: np.ndarray
    rotation: float = 0.0


def frame_of_box(box: np.ndarray, input_size: Sequence[int], padding: float = 1.25) -> Frame:
    """Returns the frame around a box: its shorter side is widened to the shape of the input.

    Args:
      box: (4,) x1 y1 x2 y2 [pixels].
      input_size: height and width of the network's input [pixels].
      padding: factor of both sides.

    Raises:
      ValueError: the box has no area.
    """
    low, high = np.asarray(box, np.float64).reshape(2, 2)
    if not (high > low).all():  # nor for nan
        raise ValueError(f"box={np.asarray(box).tolist()} has no area; valid: x1 < x2 and y1 < y2")
    return Frame((low + high) / 2, _widened(high - low, input_size[1] / input_size[0]) * padding)


def _widened(size: np.ndarray, aspect: float) -> np.ndarray:
    """Returns the smallest size (width, height) with an aspect that holds a size."""
    width, height = size
    return np.array([max(width, height * aspect), max(height, width / aspect)])


def crop_matrix(frame: Frame, input_size: Sequence[int], *, unbiased: bool = False) -> np.ndarray:
    """Returns the affine map from places in the image to places in the crop.

    Args:
      frame: the frame.
      input_size: height and width of the crop [pixels].
      unbiased: whether the frame has as many unit steps as the crop, one less than pixels (UDP);
        otherwise as many as the crop has pixels.

    Returns:
      (2, 3) float64: `matrix @ (x, y, 1)`.
    """
    steps = np.array(input_size[::-1], np.float64) - unbiased
    angle = np.deg2rad(frame.rotation)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = (steps / frame.size)[:, None] * np.array([[cos, sin], [-sin, cos]])
    return np.column_stack([turn, steps / 2 - turn @ frame.center])


def inverse_matrix(matrix: np.ndarray) -> np.ndarray:
    """Returns the inverse (2, 3) of an affine map (2, 3)."""
    turn = np.linalg.inv(matrix[:, :2])
    return np.column_stack([turn, -turn @ matrix[:, 2]])


def transform_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Maps places; further columns, such as visibility or score, stay.

    Args:
      points: (..., 2 or more) x, y, ...
      matrix: (2, 3).

    Returns:
      The same shape and type.
    """
    places = points[..., :2] @ matrix[:, :2].T + matrix[:, 2]
    return np.concatenate([places, points[..., 2:]], -1).astype(points.dtype)


def crop_image(image: Image.Image, matrix: np.ndarray, input_size: Sequence[int]) -> np.ndarray:
    """Returns a crop, bilinear, with zeros around the image.

    Args:
      image: the image.
      matrix: (2, 3), result of :func:`crop_matrix`.
      input_size: height and width of the crop [pixels].

    Returns:
      (H, W, C) uint8.
    """
    height, width = input_size
    inverse = inverse_matrix(matrix)
    corners = np.array([[x, y] for x in (0, width - 1) for y in (0, height - 1)], np.float64)
    places = transform_points(corners, inverse)
    # The part of the image that the crop shows, with a border of zeros where the image ends, which
    # Pillow would otherwise not mix with its outermost pixels.
    limit = np.array(image.size) + 1
    low = np.floor(places.min(0)).astype(int).clip(-1, limit)
    high = (np.ceil(places.max(0)).astype(int) + 1).clip(-1, limit)
    if (high <= low).any():
        return np.zeros((height, width, len(image.getbands())), np.uint8)
    part = image.crop((*low.tolist(), *high.tolist()))
    # Pillow counts from the corner of the top left pixel, half a pixel before its centre.
    offset = inverse[:, 2] - low + 0.5 - inverse[:, :2].sum(1) / 2
    coefficients = np.column_stack([inverse[:, :2], offset]).ravel().tolist()
    crop = part.transform(
        (width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    return np.asarray(crop).reshape(height, width, -1)


def partners_of(skeleton: Skeleton) -> np.ndarray:
    """Returns the keypoint on the other side of the body, for every keypoint (K,).

    Keypoints in no pair are their own partners.
    """
    partners = np.arange(len(skeleton.names))
    for left, right in skeleton.flip_pairs:
        partners[[left, right]] = right, left
    return partners


def mirror(
    crop: np.ndarray, keypoints: np.ndarray, skeleton: Skeleton
) -> tuple[np.ndarray, np.ndarray]:
    """Flips a crop and its keypoints horizontally; the keypoints of a pair change places.

    Args:
      crop: (H, W, C).
      keypoints: (K, 3) in the crop [pixels].
      skeleton: provides the pairs.
    """
    keypoints = keypoints[partners_of(skeleton)]
    keypoints[:, 0] = crop.shape[1] - 1 - keypoints[:, 0]
    return np.ascontiguousarray(crop[:, ::-1]), keypoints


def draw_frame(
    rng: np.random.Generator,
    person: Person,
    frame: Frame,
    skeleton: Skeleton,
    augment: ConfigDict,
) -> Frame:
    """Returns a random frame for training: shifts, half bodies, scales and rotations.

    Args:
      rng: source of all random numbers.
      person: the person.
      frame: the frame of its box.
      skeleton: provides the upper body.
      augment: `config.augment`: `shift`, the largest shift relative to the frame, of 30 % of the
        crops; `half_body`, the probability of a crop of half the body; `scale`, standard deviation
        and largest change of the factor of the frame's sides; `rotation`, standard deviation and
        half the largest rotation, of 60 % of the crops [degrees]. 0: off.
    """
    if rng.random() < _SHIFT_PROBABILITY:
        shift = rng.uniform(-augment.shift, augment.shift, 2)
        frame = frame._replace(center=frame.center + shift * frame.size)
    seen = person.keypoints[:, 2] > 0
    if seen.sum() > _MIN_VISIBLE and rng.random() < augment.half_body:
        frame = _half_body(rng, person.keypoints, frame, skeleton)
    scale = np.clip(rng.normal(1, augment.scale), 1 - augment.scale, 1 + augment.scale)
    rotation = 0.0
    if rng.random() < _ROTATION_PROBABILITY:
        rotation = augment.rotation * float(np.clip(rng.normal(), -2, 2))
    return Frame(frame.center, frame.size * scale, rotation)


def _half_body(
    rng: np.random.Generator, keypoints: np.ndarray, frame: Frame, skeleton: Skeleton
) -> Frame:
    """Returns the frame of the upper or the lower half of a person.

    Its centre is the mean of the keypoints. More than two are needed, otherwise it is the other
    half; a half without extent leaves the frame as it is.
    """
    upper = np.isin(np.arange(len(keypoints)), skeleton.upper_body)
    seen = keypoints[:, 2] > 0
    halves = keypoints[seen & upper, :2], keypoints[seen & ~upper, :2]
    # The published training compares a normal number with a half: the upper one has 69 %.
    first = int(rng.normal() >= 0.5)
    points = halves[first] if len(halves[first]) > 2 else halves[1 - first]
    extent = np.ptp(points, axis=0)
    if not extent.any():
        return frame
    size = _widened(extent, frame.size[0] / frame.size[1])
    return frame._replace(center=points.mean(0), size=size * _HALF_BODY_PADDING)
