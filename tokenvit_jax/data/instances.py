"""Objects from masks, and COCO's format of annotations."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tokenvit_jax.data.record import Instances
from tokenvit_jax.run_lengths import encode_mask


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
    images: Iterable[tuple[int, tuple[int, int], Instances]], classes: Sequence[str]
) -> dict[str, Any]:
    """Returns objects in COCO's format; identifiers of objects and classes start at 1.

    Args:
      images: identifier, height and width [pixels], and objects of every image.
      classes: names of the classes.
    """
    from pycocotools import mask as rle

    found = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
    }
    for identifier, (height, width), objects in images:
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
