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
from PIL import Image, ImageEnhance, ImageOps

from tokenvit_jax.data.jpeg_regions import warp

Fill = tuple[int, ...]

_MAX_LEVEL = 10.0
_APPLY_PROBABILITY = 0.5  # probability of each drawn operation


def randaugment(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    num_ops: int,
    magnitude: float,
    magnitude_std: float,
    fill: Fill,
) -> Image.Image:
    """Draws `num_ops` operations with replacement and applies each with probability 1/2.

    Args:
      image: grey or RGB image, with or without alpha.
      rng: source of the random numbers.
      num_ops: number of operations to draw.
      magnitude: mean level of an operation, 0 to 10.
      magnitude_std: standard deviation of the level, which is clipped to [0, 10].
      fill: colour of pixels that come from outside the image.

    Returns:
      An image of the same size and mode.
    """
    for name in rng.choice(list(OPERATIONS), num_ops):
        if rng.random() < _APPLY_PROBABILITY:
            level = np.clip(rng.normal(magnitude, magnitude_std), 0.0, _MAX_LEVEL)
            sign = rng.choice((-1, 1))
            image = apply_operation(image, name, float(level), int(sign), fill)
    return image


def apply_operation(
    image: Image.Image, name: str, level: float, sign: int, fill: Fill
) -> Image.Image:
    """Applies one operation.

    Args:
      image: grey or RGB image, with or without alpha.
      name: a key of `OPERATIONS`.
      level: strength, 0 to 10.
      sign: 1 or -1, the direction of operations that have one.
      fill: colour of pixels that come from outside the image.

    Returns:
      An image of the same size and mode. Changes of colours leave alpha as it is.
    """
    colors = image.convert("RGB") if image.mode == "RGBA" and name not in _MOVES else image
    changed = OPERATIONS[name](colors, level / _MAX_LEVEL, sign, fill)
    if colors is not image:
        changed.putalpha(image.getchannel("A"))
    return changed


def _rotate(image: Image.Image, part: float, sign: int, fill: Fill) -> Image.Image:
    # The matrix of Image.rotate, rounded like there.
    angle = -math.radians(sign * part * 30.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = image.width / 2, image.height / 2
    matrix = (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)
    return warp(image, matrix, fill)


def _shear_x(image: Image.Image, part: float, sign: int, fill: Fill) -> Image.Image:
    return warp(image, (1, sign * part * 0.3, 0, 0, 1, 0), fill)


def _shear_y(image: Image.Image, part: float, sign: int, fill: Fill) -> Image.Image:
    return warp(image, (1, 0, 0, sign * part * 0.3, 1, 0), fill)


def _translate_x(image: Image.Image, part: float, sign: int, fill: Fill) -> Image.Image:
    return warp(image, (1, 0, sign * part * 0.45 * image.width, 0, 1, 0), fill)


def _translate_y(image: Image.Image, part: float, sign: int, fill: Fill) -> Image.Image:
    return warp(image, (1, 0, 0, 0, 1, sign * part * 0.45 * image.height), fill)


def _posterize(image: Image.Image, part: float, sign: int, fill: Fill) -> Image.Image:
    # Not ImageOps.posterize: from Pillow 13 on it refuses to keep 0 bits, which gives black.
    bits = 4 - int(part * 4)
    mask = 256 - 2 ** (8 - bits)
    return image.point([value & mask for value in range(256)] * len(image.getbands()))


def _solarize(image: Image.Image, part: float, sign: int, fill: Fill) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(part * 256))


def _solarize_add(image: Image.Image, part: float, sign: int, fill: Fill) -> Image.Image:
    add = int(part * 110)
    table = [min(255, value + add) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _enhance(enhancer: type) -> Callable[[Image.Image, float, int, Fill], Image.Image]:
    def operation(image: Image.Image, part: float, sign: int, fill: Fill) -> Image.Image:
        return enhancer(image).enhance(max(0.1, 1.0 + sign * (part * 0.9)))

    return operation


_MOVES = frozenset({"rotate", "shear_x", "shear_y", "translate_x", "translate_y"})
# Each takes the image, the level divided by the highest level, the sign and the fill colour.
OPERATIONS = {
    "auto_contrast": lambda image, part, sign, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, part, sign, fill: ImageOps.equalize(image),
    "invert": lambda image, part, sign, fill: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
