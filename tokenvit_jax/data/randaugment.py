"""RandAugment with timm's operations: the policy `rand-m{magnitude}-mstd{magnitude_std}-inc1`.

Every operation grows stronger with its level, from 0 to 10. Levels and pixels equal timm 1.0's
(`timm.data.auto_augment`).

References:
  Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space"
  (2019), Section 4.
"""

import math
from collections.abc import Callable

import numpy as np

from tokenvit_jax.data.pixel_ops import (
    auto_contrast,
    brightness,
    change_colors,
    color,
    contrast,
    equalize,
    map_levels,
    sharpness,
    warp,
)

Fill = tuple[int, ...]
Operation = Callable[[np.ndarray, float, int, Fill], np.ndarray]

_MAX_LEVEL = 10.0
_APPLY_PROBABILITY = 0.5  # probability of each drawn operation
_LEVELS = np.arange(256)  # values of pixels


def randaugment(
    pixels: np.ndarray,
    rng: np.random.Generator,
    *,
    num_ops: int,
    magnitude: float,
    magnitude_std: float,
    fill: Fill,
) -> np.ndarray:
    """Draws `num_ops` operations with replacement and applies each with probability 1/2.

    Args:
      pixels: grey or RGB image, with or without alpha, uint8 (H, W, C).
      rng: source of the random numbers.
      num_ops: number of operations to draw.
      magnitude: mean level of an operation, 0 to 10.
      magnitude_std: standard deviation of the level, which is clipped to [0, 10].
      fill: colour of pixels that come from outside the image.

    Returns:
      uint8 (H, W, C).
    """
    names = list(OPERATIONS)
    for number in rng.integers(len(names), size=num_ops):
        if rng.random() < _APPLY_PROBABILITY:
            level = min(max(rng.normal(magnitude, magnitude_std), 0.0), _MAX_LEVEL)
            sign = 1 if rng.integers(2) else -1
            pixels = apply_operation(pixels, names[number], level, sign, fill)
    return pixels


def apply_operation(
    pixels: np.ndarray, name: str, level: float, sign: int, fill: Fill
) -> np.ndarray:
    """Applies one operation.

    Args:
      pixels: grey or RGB image, with or without alpha, uint8 (H, W, C).
      name: a key of `OPERATIONS`.
      level: strength, 0 to 10.
      sign: 1 or -1, the direction of operations that have one.
      fill: colour of pixels that come from outside the image.

    Returns:
      uint8 (H, W, C). Changes of colours leave alpha as it is.
    """
    part = level / _MAX_LEVEL
    if name in _MOVES:
        return OPERATIONS[name](pixels, part, sign, fill)
    return change_colors(lambda colors: OPERATIONS[name](colors, part, sign, fill), pixels)


def _rotate(pixels: np.ndarray, part: float, sign: int, fill: Fill) -> np.ndarray:
    # The matrix of Image.rotate, rounded like there.
    angle = -math.radians(sign * part * 30.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    height, width, _ = pixels.shape
    x, y = width / 2, height / 2
    matrix = (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)
    return warp(pixels, matrix, fill)


def _shear_x(pixels: np.ndarray, part: float, sign: int, fill: Fill) -> np.ndarray:
    return warp(pixels, (1, sign * part * 0.3, 0, 0, 1, 0), fill)


def _shear_y(pixels: np.ndarray, part: float, sign: int, fill: Fill) -> np.ndarray:
    return warp(pixels, (1, 0, 0, sign * part * 0.3, 1, 0), fill)


def _translate_x(pixels: np.ndarray, part: float, sign: int, fill: Fill) -> np.ndarray:
    return warp(pixels, (1, 0, sign * part * 0.45 * pixels.shape[1], 0, 1, 0), fill)


def _translate_y(pixels: np.ndarray, part: float, sign: int, fill: Fill) -> np.ndarray:
    return warp(pixels, (1, 0, 0, 0, 1, sign * part * 0.45 * pixels.shape[0]), fill)


def _invert(pixels: np.ndarray, part: float, sign: int, fill: Fill) -> np.ndarray:
    return map_levels(pixels, 255 - _LEVELS)


def _posterize(pixels: np.ndarray, part: float, sign: int, fill: Fill) -> np.ndarray:
    bits = 4 - int(part * 4)  # 0 bits give black
    return map_levels(pixels, _LEVELS & (256 - 2 ** (8 - bits)))


def _solarize(pixels: np.ndarray, part: float, sign: int, fill: Fill) -> np.ndarray:
    return map_levels(pixels, np.where(256 - int(part * 256) > _LEVELS, _LEVELS, 255 - _LEVELS))


def _solarize_add(pixels: np.ndarray, part: float, sign: int, fill: Fill) -> np.ndarray:
    lighter = (_LEVELS + int(part * 110)).clip(max=255)
    return map_levels(pixels, np.where(_LEVELS < 128, lighter, _LEVELS))


def _enhance(change: Callable[[np.ndarray, float], np.ndarray]) -> Operation:
    def operation(pixels: np.ndarray, part: float, sign: int, fill: Fill) -> np.ndarray:
        return change(pixels, max(0.1, 1.0 + sign * (part * 0.9)))

    return operation


_MOVES = frozenset({"rotate", "shear_x", "shear_y", "translate_x", "translate_y"})
# Each takes the image, the level divided by the highest level, the sign and the fill colour.
OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda pixels, part, sign, fill: auto_contrast(pixels),
    "equalize": lambda pixels, part, sign, fill: equalize(pixels),
    "invert": _invert,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance(color),
    "contrast": _enhance(contrast),
    "brightness": _enhance(brightness),
    "sharpness": _enhance(sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
