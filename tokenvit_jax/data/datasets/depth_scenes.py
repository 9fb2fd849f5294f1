"""The embedded scenes with depth: images and depth maps, drawn when they are read.

A scene shows one to four upright boards, 1 m high and wide, each with a handwritten digit, in front
of a slope with a photograph on it. Digits and photographs are those of the scenes for segmentation.
The place of a board tells nothing about its depth; its size in the image does.
"""

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data.datasets.scenes import SIDE, ScenesSource, draw_background
from tokenvit_jax.data.record import DatasetInfo, Record

INFO = DatasetInfo(
    name="depth_scenes",
    splits={"train": 4000, "test": 200},
    train_split="train",
    eval_split="test",
    fields=frozenset({"image", "depth"}),
    num_classes=0,
    classes=None,
)

FOCAL_LENGTH = 128.0  # [pixels]
BOARD = 1.0  # height and width of a board [m]
SLOPE = 16.0, 8.0  # depth of the slope at the upper and the lower border [m]
_SIDES = 18, 64  # smallest and largest side of a board in the image [pixels]: 7.1 to 2 m
_MARGIN = 0.1  # between the border of a board and its digit / side of the board
_DARK, _LIGHT = (0, 96), (160, 256)  # levels of the colours of a board and its digit


def open_split(config: ConfigDict, split: str) -> "DepthScenesSource":
    """Opens a split for reading; `config` is not used."""
    del config
    return DepthScenesSource(split)


class DepthScenesSource(ScenesSource):
    """Scenes of 128 x 128 pixels with the depth of every pixel; an index gives the same scene.

    Test scenes show other digits and other parts of the photographs than training scenes.
    """

    def __len__(self) -> int:
        return INFO.splits[self._split]

    def name(self, index: int) -> str:
        """See :class:`tokenvit_jax.data.record.Source`."""
        return f"depth_scenes split {self._split!r}, record {index}"

    def read(self, index: int) -> Record:
        """See :class:`tokenvit_jax.data.record.Source`."""
        rng = np.random.default_rng((list(INFO.splits).index(self._split), index))
        image, _ = draw_background(self._photographs, rng, SIDE)
        depth = np.repeat(slope_depth()[:, None], SIDE, axis=1)
        sides = rng.integers(*_SIDES, rng.integers(1, 5), endpoint=True)
        for side in sorted(sides.tolist()):  # near boards hide far ones
            left, top = rng.integers(SIDE - side, size=2, endpoint=True).tolist()
            image.paste(self._draw_board(side, rng), (left, top))
            depth[top : top + side, left : left + side] = FOCAL_LENGTH * BOARD / side
        return Record(id=index, image=image, depth=depth)

    def _draw_board(self, side: int, rng: np.random.Generator) -> Image.Image:
        """Returns a board with a random digit in two colours, one dark and one light."""
        digit, _ = self._digits[rng.integers(len(self._digits))]
        dark, light = (tuple(rng.integers(*levels, 3).tolist()) for levels in (_DARK, _LIGHT))
        ground, ink = (dark, light) if rng.random() < 0.5 else (light, dark)
        board, margin = Image.new("RGB", (side, side), ground), round(_MARGIN * side)
        height = side - 2 * margin
        coverage = digit.resize((height, height), Image.Resampling.BICUBIC)
        board.paste(ink, (margin, margin), coverage)
        return board


def slope_depth() -> np.ndarray:
    """Returns the depth of each row of the slope, a plane, (SIDE,) float32 [m].

    The inverse depth of a plane is linear in the row.
    """
    return (1 / np.linspace(*(1 / np.array(SLOPE)), SIDE)).astype(np.float32)
