"""Reads the predictions of queries at the size of the original image."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
from jax import lax

from tokenvit_jax.heads.mask_inference import (
    NUM_INSTANCES,
    find_instances,
    panoptic_map,
    resize_masks,
    semantic_scores,
)
from tokenvit_jax.ops.resize import resize_bilinear, resize_valid
from tokenvit_jax.tasks.masks.settings import INSTANCE, SEMANTIC

CHUNK = 64  # rows of an image whose scores of all classes are held at a time


def predict_masks(
    logits: jax.Array,
    masks: jax.Array,
    canvas: tuple[int, int],
    image_size: jax.Array,
    original_size: jax.Array,
    *,
    room: tuple[int, int],
    kind: str,
    things: Collection[int] | None,
) -> dict[str, jax.Array]:
    """Returns the segments of a batch of images, one image after another to save memory.

    Args:
      logits: logits of the classes (B, Q, K + 1).
      masks: logits of the masks (B, Q, h, w).
      canvas: height and width of the canvas in which the images lay [pixels].
      image_size: height and width of each image in its canvas (B, 2) [pixels].
      original_size: height and width of each original image (B, 2) [pixels].
      room: height H and width W of the buffers of the results, at least those of the originals.
      kind: "semantic", "instance" or "panoptic".
      things: the classes that can be objects; None: all.

    Returns:
      Semantic: "labels" (B, H, W) uint8. Panoptic: "ids" (B, H, W) int16, the place of the segment
      of every pixel in the list "classes" (B, Q) int32, from 1 on, 0 for none; the list has -1 at
      its end. Instance: "bits" (B, D, H, W / 8 rounded up) uint8, masks in rows of bits, "classes"
      (B, D), -1 for none, and "scores" (B, D), by falling score. Pixels beyond the original images
      mean nothing, but masks of objects are empty there.
    """

    num_classes = logits.shape[2] - 1
    is_thing = jnp.array([things is None or i in things for i in range(num_classes)])

    def one(arrays):
        logits, masks, image_size, original_size = arrays
        if kind == SEMANTIC:
            upsampled = resize_bilinear(masks.transpose(1, 2, 0)[None], canvas)[0]
            scores = semantic_scores(logits, upsampled.transpose(2, 0, 1))
            return {"labels": _largest(scores, image_size, original_size, room)}
        masks = resize_masks(masks, canvas, image_size, original_size, room)
        if kind == INSTANCE:
            num = min(NUM_INSTANCES, len(logits) * num_classes)
            found = find_instances(logits, masks, original_size, num=num, is_thing=is_thing)
            bits = jnp.packbits(found.masks, axis=-1)
            return {"bits": bits, "classes": found.classes, "scores": found.scores}
        found = panoptic_map(logits, masks, original_size, is_thing)
        places = jnp.where(found.ids > 0, found.ids - 1, len(logits))
        classes = jnp.full(len(logits), -1, jnp.int32).at[places].set(found.classes, mode="drop")
        return {"ids": found.id_map.astype(jnp.int16), "classes": classes}

    return lax.map(one, (logits, masks, image_size, original_size))


def _largest(scores, size, new_size, room):
    """Returns the class with the highest resized score of every pixel (room) uint8.

    Args:
      scores: (H, W, K).
      size: height and width of the image in the scores (2,).
      new_size: its height and width after resizing (2,).
      room: height and width of the result.
    """

    def visit(start):  # the scores of all rows would not fit into memory
        rows = start + jnp.arange(CHUNK)
        found = resize_valid(scores, size, new_size, rows, room[1])
        return jnp.argmax(found, -1).astype(jnp.uint8)

    labels = lax.map(visit, jnp.arange(0, room[0], CHUNK))
    return labels.reshape(-1, room[1])[: room[0]]
