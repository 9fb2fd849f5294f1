"""Run-length encodings of masks, as COCO writes them."""

import numpy as np


def encode_mask(mask: np.ndarray) -> str:
    """Returns the run-length encoding of a mask (H, W) bool, as COCO writes it."""
    from pycocotools import mask as rle  # only detection needs it

    return rle.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


def encode_part(part: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> str:
    """Returns the run-length encoding of a mask whose pixels all lie in a part of the image.

    Only the columns of this part are looked at.

    Args:
      part: (h, w) bool.
      corner: column and row of its top left pixel.
      size: height and width of the image [pixels].
    """
    from pycocotools import mask as rle

    left, top = corner
    columns = np.zeros((part.shape[1], size[0]), np.int8)
    columns[:, top : top + part.shape[0]] = part.T
    # Runs go down the columns, one after another, and start with one of zeros.
    changes = np.flatnonzero(np.diff(columns.ravel(), prepend=0, append=0)) + left * size[0]
    counts = np.diff(changes, prepend=0, append=size[0] * size[1])
    counts = counts.tolist() if counts[-1] else counts[:-1].tolist()
    return rle.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"].decode()


def decode_mask(counts: str, size: tuple[int, int]) -> np.ndarray:
    """Undoes :func:`encode_mask` for an image of a height and width: (H, W) bool."""
    from pycocotools import mask as rle

    return rle.decode({"size": list(size), "counts": counts.encode()}).astype(bool)
