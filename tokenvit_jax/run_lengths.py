"""Run-length encodings of masks, as COCO writes them."""

import numpy as np


def encode_mask(mask: np.ndarray) -> str:
    """Returns the run-length encoding of a mask (H, W) bool, as COCO writes it."""
    from pycocotools import mask as rle  # only detection needs it

    return rle.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


def decode_mask(counts: str, size: tuple[int, int]) -> np.ndarray:
    """Undoes :func:`encode_mask` for an image of a height and width: (H, W) bool."""
    from pycocotools import mask as rle

    return rle.decode({"size": list(size), "counts": counts.encode()}).astype(bool)
