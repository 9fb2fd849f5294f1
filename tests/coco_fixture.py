"""A fixture of COCO's evaluation: objects, crowds among them, and detections of boxes and masks."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenvit_jax.metrics.coco import CocoMeter
from tokenvit_jax.run_lengths import decode_mask

GOLDEN = Path(__file__).parent / "data" / "golden" / "coco"
MAX_DETECTIONS = 200  # of an image
MASK_SIDE = 8


class Outcome(NamedTuple):
    rows: dict


def read(name):
    return json.loads((GOLDEN / name).read_text())


def rows_of(detections, truth, with_masks):
    """Returns the fixture's detections as rows, and images that fill up the batch."""
    images = [image["id"] for image in truth["images"]]
    categories = sorted(entry["id"] for entry in truth["categories"])
    batch = len(images) + 2
    rows = {
        "boxes": np.zeros((batch, MAX_DETECTIONS, 4), np.float64),
        "classes": np.full((batch, MAX_DETECTIONS), -1),
        "scores": np.zeros((batch, MAX_DETECTIONS)),
        "index": np.array([*range(len(images)), -1, -1]),
        "mask": np.array([1.0] * len(images) + [0.0] * 2),
        "original_size": np.array(
            [[image["height"], image["width"]] for image in truth["images"]] + [[9, 9]] * 2
        ),
    }
    counts = dict.fromkeys(images, 0)
    for entry in detections:
        image, place = images.index(entry["image_id"]), counts[entry["image_id"]]
        counts[entry["image_id"]] += 1
        left, top, width, height = entry["bbox"]
        rows["boxes"][image, place] = left, top, left + width, top + height
        rows["classes"][image, place] = categories.index(entry["category_id"])
        rows["scores"][image, place] = entry["score"]
    if with_masks:
        rows["masks"] = np.ones((batch, MAX_DETECTIONS, MASK_SIDE, MASK_SIDE))
    rows["classes"][-2:] = 0  # of no record
    return rows


def mask_meter(monkeypatch):
    """Returns a meter with the masks of the fixture, which no frame of a box could hold."""
    truth, detections = read("ground_truth.json"), read("detections_segm.json")
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    pixels = {}
    for entry in detections:
        mask = decode_mask(entry["segmentation"]["counts"], sizes[entry["image_id"]])
        pixels.setdefault(entry["image_id"], []).append(mask)
    given = iter([mask for image in truth["images"] for mask in pixels.get(image["id"], ())])
    monkeypatch.setattr("tokenvit_jax.metrics.coco.paste_part", lambda *args: (next(given), (0, 0)))
    entries = [{**entry, "bbox": [0, 0, 1, 1]} for entry in detections]
    meter = CocoMeter(lambda: truth, has_masks=True)
    meter.add(Outcome(rows_of(entries, truth, with_masks=True)))
    return meter
