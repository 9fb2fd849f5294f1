"""Published figures of Swin Transformers with transposed convolutions, and how they are counted."""

from typing import NamedTuple

import tokenvit_jax as tv

KEYPOINTS = 17  # of the body, in COCO
CHANNELS = 256  # of the transposed convolutions


class Reported(NamedTuple):
    """What MogaNet's authors report for mmpose's network on COCO's keypoints of the body.

    Attributes:
      model: the backbone; the head has three transposed convolutions.
      size: height and width of the crop [pixels].
      params_m: parameters [10^6].
      gmacs: "FLOPs" of one crop [10^9].
    """

    model: str
    size: tuple[int, int]
    params_m: float
    gmacs: float


REPORTED = (
    Reported("swin_t", (256, 192), 32.8, 6.1),
    Reported("swin_b", (256, 192), 93.0, 18.6),
    Reported("swin_b", (384, 288), 93.0, 40.1),
    Reported("swin_l", (256, 192), 203.4, 40.3),
    Reported("swin_l", (384, 288), 203.4, 86.9),
)


def layer_macs(name: str, size: tuple[int, int]) -> int:
    """Counts the network of a Swin Transformer as mmcv's counter does.

    It adds up modules: linear layers and convolutions by their products, norms by two operations
    and ReLU by one for each number. Products of attention are no modules. The maps of mmpose are
    padded to whole windows before the first linear layer of attention, and cut after the last.

    Args:
      name: a Swin Transformer.
      size: height and width of the crop [pixels].
    """
    settings = tv.create_model(name).settings
    height, width = (side // 4 for side in size)
    tokens = height * width
    macs = tokens * settings.dims[0] * (3 * 4 * 4 + 2)  # patches and their norm
    for stage, (dim, depth) in enumerate(zip(settings.dims, settings.depths, strict=True)):
        if stage:
            height, width = height // 2, width // 2
            tokens = height * width
            macs += tokens * 2 * dim * (dim + 2)  # four tokens of half the channels become one
        window = settings.window_size
        padded = -(-height // window) * window * -(-width // window) * window
        macs += depth * (4 * padded * dim**2 + 8 * tokens * dim**2 + 4 * tokens * dim)
    macs += 2 * tokens * dim
    for _ in range(3):
        macs += 16 * tokens * dim * CHANNELS  # 4 x 4 products for every pixel of the input
        tokens, dim = 4 * tokens, CHANNELS
        macs += 3 * tokens * dim
    return macs + tokens * dim * KEYPOINTS
