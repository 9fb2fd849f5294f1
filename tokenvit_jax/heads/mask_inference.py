"""Label maps, panoptic maps and instances from queries that predict a class and a mask each.

Every function takes one image. Shapes are static: masks are resized into a buffer, in whose upper
left corner the image lies, and segments and instances are lists with free places.

References:
  Cheng et al. 2021, "Per-Pixel Classification is Not All You Need for Semantic Segmentation", 3.4;
  Cheng et al. 2022, "Masked-attention Mask Transformer for Universal Image Segmentation".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tokenvit_jax.ops.resize import linear_weights, resize_rows
from tokenvit_jax.ops.selection import top_indices

OBJECT_THRESHOLD = 0.8  # probability above which a query takes part in a panoptic map
OVERLAP_THRESHOLD = 0.8  # least share of its own pixels that a segment wins
NUM_INSTANCES = 100


class Panoptic(NamedTuple):
    """A panoptic map.

    Attributes:
      id_map: segment of every pixel (H, W) int32, 1, 2, ...; 0: none, or outside of the image.
      ids: segment that each query starts (Q,) int32; 0: it starts none.
      classes: class of each query (Q,) int32, which is that of its segment.
    """

    id_map: jax.Array
    ids: jax.Array
    classes: jax.Array


class Instances(NamedTuple):
    """Instances by falling score.

    Attributes:
      masks: (n, H, W) bool, False outside of the image.
      classes: (n,) int32; -1: no instance.
      scores: (n,) float32; 0: no instance.
    """

    masks: jax.Array
    classes: jax.Array
    scores: jax.Array


def resize_masks(
    masks: jax.Array,
    canvas: tuple[int, int],
    size: jax.Array,
    new_size: jax.Array,
    buffer: tuple[int, int],
) -> jax.Array:
    """Returns logits of masks at another resolution, (Q, H, W) float32.

    As bilinear resizing to the canvas, cutting the image out, and bilinear resizing of this part.
    Both are linear along each axis, so that nothing is as large as the canvas.

    Args:
      masks: logits of the whole canvas (Q, h, w).
      canvas: height and width of the padded image [pixels].
      size: (2,) int, height and width of the image in its canvas.
      new_size: (2,) int, those of the result, at most the buffer's.
      buffer: height H and width W of the result; what lies beyond ``new_size`` means nothing.
    """
    rows, columns = (
        resize_rows(
            jnp.asarray(linear_weights(masks.shape[axis + 1], canvas[axis], False), jnp.float32),
            size[axis],
            new_size[axis],
            jnp.arange(buffer[axis]),
        )
        for axis in (0, 1)
    )
    masks = masks.astype(jnp.float32)
    high = lax.Precision.HIGHEST
    x = jnp.einsum("qhw,Ww->qhW", masks, columns, precision=high)
    return jnp.einsum("Hh,qhW->qHW", rows, x, precision=high)


def semantic_scores(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """Returns the scores of all classes at every pixel, (H, W, K) float32.

    A score is the sum over queries of the probabilities of class and mask. A purely semantic model
    computes it on the canvas and resizes the scores; a model of segments resizes masks first.

    Args:
      logits: of the classes (Q, K + 1); the last class is no object.
      masks: logits of masks (Q, H, W).
    """
    return jnp.einsum(
        "qk,qhw->hwk", _probabilities(logits)[:, :-1], _sigmoid(masks), precision="highest"
    )


def panoptic_map(
    logits: jax.Array,
    masks: jax.Array,
    size: jax.Array,
    is_thing: jax.Array,
    *,
    object_threshold: float = OBJECT_THRESHOLD,
    overlap_threshold: float = OVERLAP_THRESHOLD,
) -> Panoptic:
    """Merges the masks of an image into segments that do not overlap.

    Queries whose class is certain compete for the pixels, with the product of their probabilities
    of class and mask. A query keeps what it wins of its own mask, unless it wins too little. Stuff
    of one class is one segment.

    Args:
      logits: of the classes (Q, K + 1); the last class is no object.
      masks: logits of masks (Q, H, W).
      size: (2,) int, height and width of the image in these masks.
      is_thing: whether each class is of things (K,) bool.
      object_threshold: probability above which queries take part.
      overlap_threshold: least pixels that a query wins, in pixels of its own mask.
    """
    probabilities, num_classes = _probabilities(logits), logits.shape[1] - 1
    scores, classes = probabilities.max(1), probabilities.argmax(1).astype(jnp.int32)
    kept = (classes < num_classes) & (scores > object_threshold)
    inside, masks = _inside(size, masks.shape[1:]), _sigmoid(masks)
    winner = jnp.argmax(jnp.where(kept[:, None, None], scores[:, None, None] * masks, -1.0), 0)
    own = (masks >= 0.5) & inside
    keeps = jnp.take_along_axis(own, winner[None], 0)[0]

    def count(pixels):
        """Returns the pixels that each query wins among some."""
        return jnp.bincount(jnp.where(pixels, winner, len(logits)).ravel(), length=len(logits))

    won, area = count(inside), own.sum((1, 2))
    # Queries that win pixels but keep none are no segments.
    valid = kept & (won > 0) & (area > 0) & (count(keeps) > 0)
    valid &= won.astype(jnp.float32) / jnp.maximum(area, 1) >= overlap_threshold
    segment, ids = _number_segments(valid, jnp.where(valid, classes, 0), is_thing)
    id_map = jnp.where(keeps, segment[winner], 0)
    return Panoptic(id_map, ids, classes)


def _number_segments(valid, classes, is_thing):
    """Numbers segments in the order of queries.

    Returns:
      The segment that each query belongs to (Q,), and the one that it starts; 0: none.
    """

    def visit(carry, query):
        last, of_stuff = carry  # segment of each class of stuff, 0: none yet
        valid, label = query
        known = jnp.where(is_thing[label], 0, of_stuff[label])
        starts = valid & (known == 0)
        last += starts
        segment = jnp.where(valid, jnp.where(known > 0, known, last), 0)
        of_stuff = of_stuff.at[label].set(jnp.where(valid, segment, of_stuff[label]))
        return (last, of_stuff), (segment, jnp.where(starts, segment, 0))

    is_thing = jnp.asarray(is_thing, bool)
    start = jnp.int32(0), jnp.zeros(len(is_thing), jnp.int32)
    return lax.scan(visit, start, (valid, classes))[1]


def find_instances(
    logits: jax.Array,
    masks: jax.Array,
    size: jax.Array,
    *,
    num: int = NUM_INSTANCES,
    is_thing: jax.Array | None = None,
) -> Instances:
    """Returns the instances of an image: the most probable pairs of a query and a class.

    The score is the probability of the class times the mean probability within the mask.

    Args:
      logits: of the classes (Q, K + 1); the last class is no object.
      masks: logits of masks (Q, H, W).
      size: (2,) int, height and width of the image in these masks.
      num: number of instances, at most Q K.
      is_thing: whether each class is of things (K,) bool: the others are left out after the choice
        among pairs of all classes; None: all are instances.

    Raises:
      ValueError: ``num`` is above Q K.
    """
    probabilities = _probabilities(logits)[:, :-1]
    if num > probabilities.size:
        raise ValueError(f"num={num} is not valid; valid: 1 to {probabilities.size}")
    place = top_indices(probabilities.ravel(), num)
    queries, classes = place // probabilities.shape[1], place % probabilities.shape[1]
    inside, chosen = _inside(size, masks.shape[1:]), masks[queries].astype(jnp.float32)
    found = (chosen > 0) & inside
    within = jnp.where(found, jax.nn.sigmoid(chosen), 0.0).sum((1, 2))
    scores = probabilities.ravel()[place] * (within / (found.sum((1, 2)) + 1e-6))
    if is_thing is not None:
        thing = jnp.asarray(is_thing, bool)[classes]
        classes, scores = jnp.where(thing, classes, -1), jnp.where(thing, scores, 0.0)
        found &= thing[:, None, None]
    # Instances without pixels have a score of 0, too, and come before places without an instance.
    order = jnp.lexsort((classes < 0, -scores))
    return Instances(found[order], classes[order].astype(jnp.int32), scores[order])


def _probabilities(logits):
    """Returns the probabilities of all classes and of no object (Q, K + 1)."""
    return jax.nn.softmax(logits.astype(jnp.float32))


def _sigmoid(masks):
    return jax.nn.sigmoid(masks.astype(jnp.float32))


def _inside(size, buffer):
    """Returns which pixels of a buffer lie in the image (H, W)."""
    rows, columns = (jnp.arange(side) < size[axis] for axis, side in enumerate(buffer))
    return rows[:, None] & columns
