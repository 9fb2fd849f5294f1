"""Drawn figures of 133 points: poses by a chain of limbs, and the strokes that show them.

Lengths are in heads: a figure is about four heads high. Figures face the viewer, so that their left
side is on the right. Left limbs are darker than right ones.
"""

import colorsys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from tokenvit_jax.data.whole_body import PARTS, WHOLE_BODY

_POINT = {name: i for i, name in enumerate(WHOLE_BODY.names)}
_FACE = PARTS["face"].start
_HEAD = [_POINT[name] for name in ("nose", "left_eye", "right_eye", "left_ear", "right_ear")]
_SIDES = {"left": 1.0, "right": -1.0}  # side -> sign of x

# Lengths [heads].
_NECK, _TORSO, _SHOULDERS, _HIPS = 0.58, 1.25, 0.5, 0.3  # from the neck up and down, half widths
_UPPER_ARM, _FOREARM, _THIGH, _SHANK = 0.75, 0.7, 0.85, 0.8
_KNUCKLES, _PHALANGES = 0.33, (0.15, 0.13, 0.11)
# Thumb to little finger: angle to the hand's direction [degrees], distance of the first joint.
_FINGERS = (-62, 0.17), (-24, _KNUCKLES), (-6, _KNUCKLES), (12, _KNUCKLES), (30, 0.9 * _KNUCKLES)

# Ranges of the angles [degrees]: of limbs from downwards to outwards, of joints from straight.
_LEAN, _TILT = (-18, 18), (-18, 18)  # torso and head
_SHOULDER, _ELBOW, _WRIST = (-15, 150), (-110, 60), (-25, 25)
_HIP, _KNEE, _ANKLE = (-5, 45), (-60, 10), (55, 95)

NUM_PARTS = 10  # of a figure: two legs, trunk, head, two arms of three parts each
SCALE = 4  # drawn pixels per pixel of the image, in both directions

_OUTLINE = (16, 16, 16)
_LEFT_SHADE = 0.55  # brightness of left limbs / right ones


class Figure(NamedTuple):
    """A figure in an image.

    Attributes:
      points: (133, 2) x, y [pixels].
      head: height of the head [pixels].
      hues: of limbs, torso and skin, from 0 to 1.
      front: the side whose limbs are drawn last.
    """

    points: np.ndarray
    head: float
    hues: tuple[float, float, float]
    front: str


class Layer(NamedTuple):
    """What images are drawn on: colours, and the number of the part that is seen at every pixel."""

    image: Image.Image
    parts: Image.Image


# ------------------------------------------------------------------------------------------------
# Poses
# ------------------------------------------------------------------------------------------------


def draw_figure(rng: np.random.Generator) -> Figure:
    """Returns a random figure with a head of height 1, whose neck is at (0, 0)."""
    points = np.zeros((133, 2))
    for side, sign in _SIDES.items():
        _place_arm(points, side, sign, rng)
        _place_leg(points, side, sign, rng)
    face = _face(rng) @ _turn(rng.uniform(*_TILT)).T - [0, _NECK]
    points[PARTS["face"]] = face[:68]
    points[_HEAD] = face[68:]
    points = points @ _turn(rng.uniform(*_LEAN)).T
    return Figure(points, 1.0, tuple(rng.random(3).tolist()), str(rng.choice([*_SIDES])))


def _turn(degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[cos, -sin], [sin, cos]])


def _step(degrees: float, sign: float) -> np.ndarray:
    """Returns the direction at an angle from downwards to outwards."""
    return np.array([sign * np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))])


def _place_arm(points: np.ndarray, side: str, sign: float, rng: np.random.Generator) -> None:
    upper = rng.uniform(*_SHOULDER)
    lower = upper - rng.uniform(*_ELBOW)
    hand = lower + rng.uniform(*_WRIST)
    shoulder = np.array([sign * _SHOULDERS, 0.08])
    elbow = shoulder + _UPPER_ARM * _step(upper, sign)
    wrist = elbow + _FOREARM * _step(lower, sign)
    root = wrist + 0.08 * _step(hand, sign)
    for name, place in {
        "shoulder": shoulder, "elbow": elbow, "wrist": wrist, "hand_root": root,
    }.items():  # fmt: skip
        points[_POINT[f"{side}_{name}"]] = place
    first, spread = PARTS[f"{side}_hand"].start + 1, rng.uniform(0.8, 1.1)
    for finger, (angle, distance) in enumerate(_FINGERS):
        # The fingers bend towards the middle one, each by its own angle.
        place, angle = root + distance * _step(hand + spread * angle, sign), spread * angle
        bend = rng.uniform(0, 12) * -np.sign(angle)
        for joint, length in enumerate((0.0, *_PHALANGES)):
            place = place + length * _step(hand + angle + joint * bend, sign)
            points[first + 4 * finger + joint] = place


def _place_leg(points: np.ndarray, side: str, sign: float, rng: np.random.Generator) -> None:
    upper = rng.uniform(*_HIP)
    lower = upper + rng.uniform(*_KNEE)
    forward, down = _step(lower + rng.uniform(*_ANKLE), sign), _step(lower, sign)
    hip = np.array([sign * _HIPS, _TORSO])
    knee = hip + _THIGH * _step(upper, sign)
    ankle = knee + _SHANK * down
    heel = ankle + 0.17 * down - 0.1 * forward
    for name, place in {
        "hip": hip, "knee": knee, "ankle": ankle, "heel": heel,
        "big_toe": heel + 0.52 * forward - 0.06 * down,
        "small_toe": heel + 0.42 * forward + 0.13 * down,
    }.items():  # fmt: skip
        points[_POINT[f"{side}_{name}"]] = place


def _face(rng: np.random.Generator) -> np.ndarray:
    """Returns the 68 points of a face, nose, eyes and ears, (73, 2), around the head's centre."""
    brow, eye, mouth = rng.uniform(0, 0.06), rng.uniform(0.03, 0.06), rng.uniform(0, 0.07)

    def arc(count, x, y, width, height, first=180.0, last=0.0):
        angles = np.deg2rad(np.linspace(first, last, count))  # from the left over the top
        return np.column_stack([x + width * np.cos(angles), y - height * np.sin(angles)])

    return np.concatenate([
        arc(17, 0, 0, 0.4, 0.5, 180, 360),  # jaw
        *(arc(5, x, -0.2 - brow, 0.12, 0.05) for x in (-0.2, 0.2)),
        np.column_stack([np.zeros(4), np.linspace(-0.12, 0.08, 4)]),  # bridge of the nose
        arc(5, 0, 0.1, 0.09, 0.04, 180, 360),
        *(arc(7, x, -0.08, 0.085, eye, 180, -180)[:6] for x in (-0.19, 0.19)),
        arc(13, 0, 0.28, 0.17, 0.05 + mouth, 180, -180)[:12],  # lips
        arc(9, 0, 0.28, 0.12, 0.02 + 0.8 * mouth, 180, -180)[:8],
        [[0, 0.08], [0.19, -0.08], [-0.19, -0.08], [0.42, -0.02], [-0.42, -0.02]],
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Strokes
# ------------------------------------------------------------------------------------------------


class Stroke(NamedTuple):
    """A line through points, or the area between them.

    Attributes:
      points: (n, 2) [pixels].
      width: of the line, with round ends [pixels].
      color: three levels.
      filled: whether the area between the points is filled, too.
      edge: width of a dark outline [pixels].
    """

    points: np.ndarray
    width: float
    color: tuple[int, int, int]
    filled: bool = False
    edge: float = 0.0


def paint(layer: Layer, figure: Figure, first: int) -> np.ndarray:
    """Draws a figure over an image.

    Args:
      layer: the image, and the parts that are seen at its pixels, `SCALE` times larger; changed.
      figure: the figure.
      first: number of its first part; the others follow in the order in which they are drawn.

    Returns:
      (133,) number of the part that has each point: later parts can hide it.
    """
    owners = np.zeros(133, int)
    pens = [ImageDraw.Draw(image) for image in layer]
    for part, (points, strokes) in enumerate(_parts(figure), first):
        owners[points] = part
        for stroke in strokes:
            if stroke.edge:
                _draw(pens[0], stroke, stroke.width + 2 * stroke.edge, _OUTLINE)
            _draw(pens[0], stroke, stroke.width, stroke.color)
            _draw(pens[1], stroke, stroke.width + 2 * stroke.edge, part)
    return owners


def _draw(pen: ImageDraw.ImageDraw, stroke: Stroke, width: float, color) -> None:
    # Places of pixel centres -> places in the larger image, whole ones: Pillow cuts off fractions.
    places = np.rint((stroke.points + 0.5) * SCALE - 0.5).astype(int)
    corners, radius = [*map(tuple, places.tolist())], round(width * SCALE / 2)
    if stroke.filled:
        pen.polygon(corners, fill=color)
        corners.append(corners[0])
    pen.line(corners, fill=color, width=max(1, 2 * radius))
    for x, y in corners:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _parts(figure: Figure) -> Iterator[tuple[list[int], list[Stroke]]]:
    """Yields the parts of a figure in the order in which they are drawn: points and strokes."""
    sides = sorted(_SIDES, key=lambda side: side == figure.front)
    for side in sides:
        yield _leg(figure, side)
    yield _trunk(figure)
    yield _head(figure)
    for side in sides:
        yield from _arm(figure, side)


def _color(hue: float, saturation: float, brightness: float) -> tuple[int, int, int]:
    return tuple(round(255 * level) for level in colorsys.hsv_to_rgb(hue, saturation, brightness))


def _shade(side: str) -> float:
    return _LEFT_SHADE if side == "left" else 1.0


def _numbers(side: str, names: str) -> list[int]:
    return [_POINT[f"{side}_{name}"] for name in names.split()]


def _limb(figure: Figure, side: str, names: str, width: float, saturation: float = 0.75) -> Stroke:
    return Stroke(
        points=figure.points[_numbers(side, names)],
        width=width * figure.head,
        color=_color(figure.hues[0], saturation, _shade(side)),
        edge=0.02 * figure.head,
    )


def _leg(figure: Figure, side: str) -> tuple[list[int], list[Stroke]]:
    return _numbers(side, "knee ankle heel big_toe small_toe"), [
        _limb(figure, side, "ankle heel", 0.13),
        _limb(figure, side, "heel small_toe", 0.1, 0.3),
        _limb(figure, side, "heel big_toe", 0.13, 0.3),
        _limb(figure, side, "hip knee", 0.26),
        _limb(figure, side, "knee ankle", 0.18),
    ]


def _trunk(figure: Figure) -> tuple[list[int], list[Stroke]]:
    corners = [*_numbers("left", "shoulder hip"), *_numbers("right", "hip shoulder")]
    top, unit = figure.points[corners[::3]].mean(0), figure.head
    chin = figure.points[_FACE + 8]
    color = _color(figure.hues[1], 0.6, 0.8)
    return _numbers("left", "hip") + _numbers("right", "hip"), [
        Stroke(np.stack([top, chin]), 0.2 * unit, _skin(figure, 0.85), edge=0.02 * unit),
        Stroke(figure.points[corners], 0.2 * unit, color, filled=True, edge=0.02 * unit),
    ]


def _skin(figure: Figure, brightness: float) -> tuple[int, int, int]:
    return _color(figure.hues[2], 0.35, brightness)


def _head(figure: Figure) -> tuple[list[int], list[Stroke]]:
    face, unit = figure.points[PARTS["face"]], figure.head
    nose, *eyes, left_ear, right_ear = figure.points[_HEAD]
    light, dark, edge = _skin(figure, 1.0), _skin(figure, 0.75), 0.02 * unit
    # The skull is the upper half of an ellipse over the ends of the jaw.
    middle, across = (face[0] + face[16]) / 2, (face[16] - face[0]) / 2
    up = (middle - face[8]) / np.linalg.norm(middle - face[8])
    angles = np.linspace(0, np.pi, 17)[:, None]
    skull = middle + np.cos(angles) * across + np.sin(angles) * up * 0.5 * unit
    strokes = [
        Stroke(left_ear[None], 0.16 * unit, dark, edge=edge),
        Stroke(right_ear[None], 0.16 * unit, light, edge=edge),
        Stroke(np.concatenate([face[:17], skull]), edge, light, filled=True, edge=edge),
        # Half of the face: its left side is darker, too.
        Stroke(np.concatenate([face[8:17], skull[:9]]), edge / 2, dark, filled=True),
        Stroke(skull, 0.07 * unit, _color(figure.hues[0], 0.5, 0.35)),
    ]
    for brow in (face[17:22], face[22:27]):
        strokes.append(Stroke(brow, 0.045 * unit, _OUTLINE))
    for eye, middle in zip((face[42:48], face[36:42]), eyes, strict=True):
        strokes.append(Stroke(eye, 0.015 * unit, (255, 255, 255), filled=True))
        strokes.append(Stroke(middle[None], 0.065 * unit, (0, 0, 96)))
    strokes += [
        Stroke(face[27:31], 0.03 * unit, _OUTLINE),
        Stroke(face[31:36], 0.03 * unit, _OUTLINE),
        Stroke(nose[None], 0.06 * unit, (224, 96, 64)),
        Stroke(face[48:60], 0.02 * unit, (192, 0, 48), filled=True),
        Stroke(face[60:68], 0.01 * unit, (48, 0, 0), filled=True),
    ]
    return [*PARTS["face"], *_HEAD], strokes


def _arm(figure: Figure, side: str) -> Iterator[tuple[list[int], list[Stroke]]]:
    yield _numbers(side, "shoulder"), [_limb(figure, side, "shoulder elbow", 0.21)]
    yield _numbers(side, "elbow"), [_limb(figure, side, "elbow wrist", 0.15)]
    unit, numbers = figure.head, PARTS[f"{side}_hand"]
    hand = figure.points[numbers]
    wrist = figure.points[_POINT[f"{side}_wrist"]]
    fingers = hand[1:].reshape(5, 4, 2)
    palm = np.concatenate([wrist[None], hand[:1], fingers[:, 0]])
    strokes = [Stroke(palm[1:], 0.06 * unit, _skin(figure, 0.8 * _shade(side)), filled=True,
                      edge=0.02 * unit)]  # fmt: skip
    strokes.append(Stroke(palm[:2], 0.12 * unit, _skin(figure, 0.8 * _shade(side))))
    for i, finger in enumerate(fingers):  # neighbours differ
        color = _skin(figure, (1.0, 0.75)[i % 2] * _shade(side))
        strokes.append(Stroke(finger, 0.065 * unit, color, edge=0.015 * unit))
    yield [_POINT[f"{side}_wrist"], *numbers], strokes
