"""The skeleton of 133 keypoints, and messages for skeletons that do not fit together."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from tokenvit_jax.data.record import Skeleton, check_skeleton
from tokenvit_jax.data.whole_body import WHOLE_BODY
from tokenvit_jax.errors import UserError

FACTS = np.load(Path(__file__).parent / "golden" / "wholebody_facts.npz")


def test_names_sigmas_and_upper_body_are_those_of_the_reference():
    assert WHOLE_BODY.names == tuple(FACTS["names"].tolist())
    assert WHOLE_BODY.sigmas == tuple(FACTS["sigmas"].tolist())
    assert WHOLE_BODY.upper_body == tuple(np.flatnonzero(FACTS["upper_body"]).tolist())


def test_parts_are_those_of_the_reference():
    cuts = FACTS["part_starts"].tolist()
    found = [(part.start, part.stop) for part in WHOLE_BODY.parts.values()]
    assert found == list(itertools.pairwise(cuts))


def test_pairs_are_those_of_the_reference():
    order = np.arange(133)
    for left, right in WHOLE_BODY.flip_pairs:
        order[[left, right]] = right, left
    np.testing.assert_array_equal(order, FACTS["flip_index"])


def test_limbs_are_mirrored_and_join_all_points():
    other = dict(enumerate(FACTS["flip_index"].tolist()))
    limbs = {frozenset(limb) for limb in WHOLE_BODY.limbs}
    assert len(limbs) == len(WHOLE_BODY.limbs)
    assert {frozenset(map(other.get, limb)) for limb in limbs} == limbs
    assert set().union(*limbs) == set(range(133))


def test_the_skeleton_fits_together():
    check_skeleton(WHOLE_BODY)


FEW = Skeleton(
    names=("nose", "left_eye", "right_eye", "left_ear", "right_ear"),
    flip_pairs=((1, 2), (3, 4)),
    sigmas=(0.1,) * 5,
    limbs=((0, 1),),
    upper_body=(0, 1),
    parts={"body": range(5)},
)
BAD = {
    "sigmas": (
        {"sigmas": (0.1,) * 4},
        "the skeleton has 4 sigmas for 5 keypoints; valid: one above 0 for each",
    ),
    "zero": (
        {"sigmas": (0.1, 0.1, 0.0, 0.1, 0.1)},
        "the skeleton has 5 sigmas for 5 keypoints; valid: one above 0 for each",
    ),
    "limbs": ({"limbs": ((0, 5),)}, "limbs of the skeleton have the keypoint 5; valid: 0 to 4"),
    "upper": (
        {"upper_body": (-1,)},
        "upper_body of the skeleton have the keypoint -1; valid: 0 to 4",
    ),
    "parts": (
        {"parts": {"body": range(6)}},
        "parts of the skeleton have the keypoint 5; valid: 0 to 4",
    ),
    "range": (
        {"flip_pairs": ((1, 2), (3, 7))},
        "flip_pairs of the skeleton have the keypoint 7; valid: 0 to 4",
    ),
    "twice": (
        {"flip_pairs": ((1, 2), (2, 4))},
        "flip_pairs of the skeleton have (2, 4); valid: two different keypoints that are in no",
    ),
    "itself": (
        {"flip_pairs": ((1, 1),)},
        "flip_pairs of the skeleton have (1, 1); valid: two different keypoints that are in no",
    ),
    "crossed": (
        {"flip_pairs": ((1, 4), (2, 3))},
        "flip_pairs of the skeleton exchange 'left_eye' with 'right_ear'; valid: 'right_eye'",
    ),
    "missing": (
        {"flip_pairs": ((1, 2),)},
        "flip_pairs of the skeleton exchange 'left_ear' with 'no keypoint'; valid: 'right_ear'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_skeleton_that_does_not_fit_is_named(name):
    check_skeleton(FEW)
    changes, message = BAD[name]
    with pytest.raises(UserError) as error:
        check_skeleton(FEW._replace(**changes))
    assert message in str(error.value) and "\n" not in str(error.value)
