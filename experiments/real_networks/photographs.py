"""Reads the photographs that scikit-image, scikit-learn and matplotlib carry, and crops them."""

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from tokenvit_jax.errors import UserError

# Package -> folder of its photographs, and their files. The textures (brick, grass, gravel), the
# moon and the galaxies are photographs, too; drawings, microscopy and scans are left out, and so
# are second views of the same scene.
FILES = {
    "skimage": (
        "data",
        "astronaut.png brick.png camera.png chelsea.png clock_motion.png coffee.png coins.png "
        "grass.png gravel.png hubble_deep_field.jpg moon.png motorcycle_left.png rocket.jpg",
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
    "matplotlib": ("mpl-data/sample_data", "grace_hopper.jpg"),
}
NUM_CROPS = 3  # see :func:`crop`
NUM_PHOTOGRAPHS = sum(len(names.split()) for _, names in FILES.values())


def read_photographs() -> dict[str, Image.Image]:
    """Returns the photographs in RGB by name.

    Raises:
      UserError: a package is missing.
    """
    found = {}
    for package, (folder, names) in FILES.items():
        spec = importlib.util.find_spec(package)  # without importing it
        if spec is None:
            raise UserError(f"{package} is missing: pip install --no-deps scikit-image")
        for name in names.split():
            path = Path(spec.submodule_search_locations[0]) / folder / name
            found[Path(name).stem] = Image.open(path).convert("RGB")
    return found


def crop(image: Image.Image, number: int, side: int) -> np.ndarray:
    """Returns a square crop (side, side, 3) uint8, resized bicubically.

    Args:
      image: the photograph.
      number: 0: the largest square in the middle; 1 and 2: squares of 0.6 of the shorter side, at
        the top left and at the bottom right.
      side: side of the result [pixels].
    """
    width, height = image.size
    square = min(width, height) if number == 0 else round(0.6 * min(width, height))
    share = (0.5, 0.0, 1.0)[number]
    left, top = round(share * (width - square)), round(share * (height - square))
    box = (left, top, left + square, top + square)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box))
