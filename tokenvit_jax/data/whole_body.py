"""The 133 keypoints of COCO-WholeBody: body, feet, face and hands.

References:
  Jin et al. 2020, "Whole-Body Human Pose Estimation in the Wild", which also measured the sigmas.
"""

import itertools
from typing import Any

import numpy as np

from tokenvit_jax.data.record import Skeleton

PARTS = {
    "body": range(17),
    "foot": range(17, 23),
    "face": range(23, 91),
    "left_hand": range(91, 112),
    "right_hand": range(112, 133),
}
# Field of an annotation in COCO-WholeBody's files -> the part whose points it holds.
FIELDS = {
    "keypoints": "body",
    "foot_kpts": "foot",
    "face_kpts": "face",
    "lefthand_kpts": "left_hand",
    "righthand_kpts": "right_hand",
}
_SIDES = "left", "right"
_FINGERS = "thumb", "forefinger", "middle_finger", "ring_finger", "pinky_finger"

_BODY_NAMES = (
    "nose",
    *(
        f"{side}_{joint}"
        for joint in ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
        for side in _SIDES
    ),
)
_FOOT_NAMES = tuple(
    f"{side}_{point}" for side in _SIDES for point in ("big_toe", "small_toe", "heel")
)
_HAND_POINTS = "hand_root", *(f"{finger}{i}" for finger in _FINGERS for i in range(1, 5))

# Thousandths, in the order of the keypoints; the two hands have the same.
_SIGMAS = (
    26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89,
    68, 66, 66, 92, 94, 94,
    42, 43, 44, 43, 40, 35, 31, 25, 20, 23, 29, 32, 37, 38, 43, 41, 45,
    13, 12, 11, 11, 12, 12, 11, 11, 13, 15, 9, 7, 7, 7, 12, 9, 8,
    16, 10, 17, 11, 9, 11, 9, 7, 13, 8, 11, 12,
    10, 34, 8, 8, 9, 8, 8, 7, 10, 8, 9, 9, 9, 7, 7, 8, 11, 8, 8, 8, 10, 8,
)  # fmt: skip
_HAND_SIGMAS = 29, 22, 35, 37, 47, 26, 25, 24, 35, 18, 24, 22, 26, 17, 21, 21, 32, 20, 19, 22, 31

# Keypoints of the face from 0 on. Its curves: the jaw from the right ear to the left one, brows,
# bridge and base of the nose; and its closed curves: eyes, outer and inner edge of the lips.
_FACE_CURVES = range(17), range(17, 22), range(22, 27), range(27, 31), range(31, 36)
_FACE_LOOPS = range(36, 42), range(42, 48), range(48, 60), range(60, 68)
_FACE_PAIRS = (
    *((i, 16 - i) for i in range(8)),
    *((17 + i, 26 - i) for i in range(5)),
    (31, 35), (32, 34),
    (36, 45), (37, 44), (38, 43), (39, 42), (40, 47), (41, 46),
    (48, 54), (49, 53), (50, 52), (55, 59), (56, 58),
    (60, 64), (61, 63), (65, 67),
)  # fmt: skip

_BODY_LIMBS = (
    (0, 1), (0, 2), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6),
    (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12),
    (11, 12), (11, 13), (13, 15), (12, 14), (14, 16),
)  # fmt: skip


def _face_limbs():
    for curve in _FACE_CURVES:
        yield from itertools.pairwise(curve)
    for loop in _FACE_LOOPS:
        yield from zip(loop, (*loop[1:], loop[0]), strict=True)


def _hand_limbs(wrist, root):
    yield wrist, root
    for first in range(root + 1, root + 21, 4):
        yield root, first
        yield from ((first + i, first + i + 1) for i in range(3))


WHOLE_BODY = Skeleton(
    names=(
        *_BODY_NAMES,
        *_FOOT_NAMES,
        *(f"face-{i}" for i in range(len(PARTS["face"]))),
        *(f"{side}_{point}" for side in _SIDES for point in _HAND_POINTS),
    ),
    flip_pairs=(
        *((i, i + 1) for i in PARTS["body"][1::2]),
        *((i, i + 3) for i in PARTS["foot"][:3]),
        *((23 + i, 23 + j) for i, j in _FACE_PAIRS),
        *zip(PARTS["left_hand"], PARTS["right_hand"], strict=True),
    ),
    sigmas=tuple(sigma / 1000 for sigma in (*_SIGMAS, *_HAND_SIGMAS, *_HAND_SIGMAS)),
    limbs=(
        *_BODY_LIMBS,
        *((15, point) for point in PARTS["foot"][:3]),
        *((16, point) for point in PARTS["foot"][3:]),
        *((23 + i, 23 + j) for i, j in _face_limbs()),
        *_hand_limbs(9, 91),
        *_hand_limbs(10, 112),
    ),
    # Without face and hands, which count as the lower half, as in the published training.
    upper_body=tuple(range(11)),
    parts=PARTS,
)


def join_fields(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns an annotation of COCO-WholeBody with all points in "keypoints".

    Args:
      entry: has the FIELDS, each a list of x, y and visibility (or score) of its points.
    """
    points = [number for field in FIELDS for number in entry[field]]
    others = {name: value for name, value in entry.items() if name not in FIELDS}
    return others | {"keypoints": points}


def split_fields(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns an annotation with the points of each part in its own field, as its files have them.

    Annotations of other skeletons stay as they are.

    Args:
      entry: the result of :func:`join_fields`.
    """
    points = np.reshape(entry["keypoints"], (-1, 3))
    if len(points) != len(WHOLE_BODY.names):
        return entry
    return entry | {field: points[PARTS[part]].ravel().tolist() for field, part in FIELDS.items()}
