"""Objects with masks: run-length encodings, and COCO's format of annotations."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tokenvit_jax.data.record import Instances


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


def mask_box(mask: np.ndarray) -> np.ndarray:
    """Returns the box of the pixels of a mask (H, W), which has some: (4,) float32."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def instances_of(masks: Sequence[np.ndarray], classes: Sequence[int]) -> Instances:
    """Returns objects, no crowds, from masks (H, W) bool with pixels and their classes."""
    return Instances(
        boxes=np.array([mask_box(mask) for mask in masks], np.float32).reshape(-1, 4),
        classes=np.array(classes, np.int32),
        crowd=np.zeros(len(masks), bool),
        masks=[encode_mask(mask) for mask in masks],
    )


def coco_annotations(
    images: Iterable[tuple[int, Instances]], size: tuple[int, int], classes: Sequence[str]
) -> dict[str, Any]:
    """Returns images of one size in COCO's format; identifiers of objects and classes start at 1.

    Args:
      images: identifier and objects of every image.
      size: height and width of the images [pixels].
      classes: names of the classes.
    """
    from pycocotools import mask as rle

    height, width = size
    found = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
    }
    for identifier, objects in images:
        found["images"].append(
            {"id": identifier, "height": height, "width": width, "file_name": f"{identifier}.png"}
        )
        for box, label, crowd, counts in zip(*objects, strict=True):
            segmentation = {"size": [height, width], "counts": counts}
            left, top, right, bottom = box.tolist()
            found["annotations"].append({
                "id": len(found["annotations"]) + 1,
                "image_id": identifier,
                "category_id": int(label) + 1,
                "bbox": [left, top, right - left, bottom - top],
                "area": int(rle.area({**segmentation, "counts": counts.encode()})),
                "iscrowd": int(crowd),
                "segmentation": segmentation,
            })  # fmt: skip
    return found
