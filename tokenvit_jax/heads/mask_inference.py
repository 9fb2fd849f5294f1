"""Reads queries that predict a class and a mask each, as semantic, panoptic or instance segments.

All functions take one image, with masks at the size of the result.

References:
  Cheng et al. 2021, "Per-Pixel Classification is Not All You Need for Semantic Segmentation",
  section 3.3; Cheng et al. 2022, "Masked-attention Mask Transformer for Universal Image
  Segmentation", whose released code has these rules.
"""

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

KEPT = 0.8  # a query with a lower probability of its class is no panoptic segment
UNCOVERED = 0.8  # a query that keeps a smaller share of its mask is none, either
MAX_OBJECTS = 100


class PanopticMap(NamedTuple):
    """Panoptic segments of an image.

    Attributes:
      ids: identifier of the segment of every pixel (H, W) int16; 0: none.
      classes: classes of the segments 1, 2, ... (Q,) int32; -1 at the end.
    """

    ids: jax.Array
    classes: jax.Array


class Objects(NamedTuple):
    """Objects in an image, by falling score.

    Attributes:
      masks: (D, H, W) bool.
      classes: (D,) int32; -1 at the end: no object.
      scores: (D,) float32.
    """

    masks: jax.Array
    classes: jax.Array
    scores: jax.Array


def semantic_scores(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """Returns the scores of all classes at every pixel, (K, H, W) float32.

    Args:
      logits: (Q, K + 1); the last class is no object.
      masks: logits of the masks (Q, H, W).
    """
    probabilities = jax.nn.softmax(logits)[:, :-1]
    return jnp.einsum(
        "qk,qhw->khw", probabilities, jax.nn.sigmoid(masks), precision=lax.Precision.HIGHEST
    )


def panoptic_map(
    logits: jax.Array, masks: jax.Array, inside: jax.Array, things: Collection[int] | None
) -> PanopticMap:
    """Returns the segments of an image, which do not overlap.

    A pixel belongs to the query with the largest product of the probabilities of class and mask, if
    that of the mask is at least 1/2. Stuff of a class is one segment.

    Args:
      logits: (Q, K + 1); the last class is no object.
      masks: logits of the masks (Q, H, W).
      inside: pixels of the image (H, W) bool; the others are padding.
      things: the classes that are things; None: all.
    """
    num_queries, num_classes = len(logits), logits.shape[1] - 1
    probabilities = jax.nn.softmax(logits)
    labels, scores = probabilities.argmax(1).astype(jnp.int32), probabilities.max(1)
    kept = (labels < num_classes) & (scores > KEPT)
    weighted = jnp.where(kept[:, None, None], scores[:, None, None] * jax.nn.sigmoid(masks), -1.0)
    winner = weighted.argmax(0).astype(jnp.int32)
    sure = inside & (jnp.take_along_axis(masks, winner[None], 0)[0] >= 0)

    def area(where):
        counts = jnp.bincount(jnp.where(where, winner, num_queries).ravel(), length=num_queries + 1)
        return counts[:num_queries]

    won, seen = area(inside), area(sure)
    own = ((masks >= 0) & inside).sum((1, 2))
    kept &= (seen > 0) & (won / jnp.maximum(own, 1) >= UNCOVERED)
    is_thing = jnp.zeros(num_classes, bool).at[jnp.array(sorted(things or ()), int)].set(True)
    is_thing = jnp.ones(num_classes, bool) if things is None else is_thing

    def number(carry, query):
        """Gives a query the next identifier, or that of the stuff of its class."""
        following, stuff = carry
        label, exists = query
        known = jnp.where(is_thing[label], 0, stuff[label])
        new = exists & (known == 0)
        own = jnp.where(exists, jnp.where(new, following, known), 0)
        stuff = stuff.at[label].set(jnp.where(exists, own, stuff[label]))
        return (following + new, stuff), own

    start = jnp.int32(1), jnp.zeros(num_classes, jnp.int32)
    _, ids = lax.scan(number, start, (jnp.minimum(labels, num_classes - 1), kept))
    places = jnp.where(ids > 0, ids - 1, num_queries)
    classes = jnp.full(num_queries, -1, jnp.int32).at[places].set(labels, mode="drop")
    return PanopticMap(jnp.where(sure, ids[winner], 0).astype(jnp.int16), classes)


def best_objects(
    logits: jax.Array, masks: jax.Array, things: Collection[int] | None, num: int = MAX_OBJECTS
) -> Objects:
    """Returns the objects of an image with the highest probabilities of a class.

    A query can be objects of several classes. The score of an object is the probability of its
    class times the mean probability of its mask, over the pixels where that is above 1/2.

    Args:
      logits: (Q, K + 1); the last class is no object.
      masks: logits of the masks (Q, H, W), below 0 outside of the image.
      things: the classes that are things, of which the others are left out; None: all.
      num: largest number of objects, before things are selected.
    """
    num_classes = logits.shape[1] - 1
    probabilities = jax.nn.softmax(logits)[:, :-1].ravel()
    scores, places = lax.top_k(probabilities, min(num, len(probabilities)))
    classes = (places % num_classes).astype(jnp.int32)
    masks = masks[places // num_classes]
    seen = masks > 0
    certainty = jnp.where(seen, jax.nn.sigmoid(masks), 0.0).sum((1, 2)) / (seen.sum((1, 2)) + 1e-6)
    scores *= certainty
    if things is not None:
        valid = (classes[:, None] == jnp.array(sorted(things), jnp.int32)).any(1)
        classes, scores = jnp.where(valid, classes, -1), jnp.where(valid, scores, -1.0)
    order = jnp.argsort(-scores, stable=True)
    return Objects(seen[order], classes[order], scores[order])
