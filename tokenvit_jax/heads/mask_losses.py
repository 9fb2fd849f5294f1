"""Losses of queries that predict a class and a mask each: matching with targets, then three sums.

Masks are compared at random points, never at all pixels. Losses are sums over images, divided by
counts that the caller gives, so that devices and micro-batches can share the counts of the whole
batch. Points are drawn from the key of an image, whatever its place in the batch.

References:
  Cheng et al. 2022, "Masked-attention Mask Transformer for Universal Image Segmentation", 3.2, 3.3;
  Milletari et al. 2016, "V-Net" (dice).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tokenvit_jax.ops.assignment import assign_targets
from tokenvit_jax.ops.gather import put
from tokenvit_jax.ops.sample_points import sample_maps, sample_objects, uncertain_points

NUM_POINTS = 12544  # 112 x 112
NO_OBJECT_WEIGHT = 0.1
OVERSAMPLING = 3  # candidates of a mask, in points
UNCERTAIN = 0.75  # share of the points that are chosen among the candidates


class MaskTargets(NamedTuple):
    """The segments of a batch of images, padded to M.

    Attributes:
      id_maps: (B, L, H, W) of any integer type, identifiers of segments: one map where segments do
        not overlap, else as many as lie over each other. All else is background.
      ids: (B, M) integers; each is in one map of its image only. A segment may have no pixel.
      classes: (B, M) int32; -1: no segment.
    """

    id_maps: jax.Array
    ids: jax.Array
    classes: jax.Array


class Points(NamedTuple):
    """Random points (x, y) in [0, 1) of a batch of images, or of one without the axis B.

    Attributes:
      matching: where all masks of an image are compared with all segments (B, P, 2).
      candidates: of each segment (B, M, 3 P, 2); its loss is at the most uncertain ones.
      fresh: of each segment (B, M, P / 4, 2); its loss is there, too.
    """

    matching: jax.Array
    candidates: jax.Array
    fresh: jax.Array


class Weights(NamedTuple):
    """Weights of the classification, of the cross-entropy and of the dice of masks."""

    classes: float = 2.0
    masks: float = 5.0
    dice: float = 5.0


WEIGHTS = Weights()


class Losses(NamedTuple):
    """Losses before weights, of every prediction (n,) or of every image (B,).

    Attributes:
      classes: cross-entropy of classes [nats].
      masks: binary cross-entropy of masks, mean over points [nats].
      dice: 1 - dice coefficient.
    """

    classes: jax.Array
    masks: jax.Array
    dice: jax.Array


class Counts(NamedTuple):
    """What divides the losses.

    Attributes:
      classes: sum of the weights of all queries, 1 for a segment and less for no object.
      segments: number of segments, above 0.
    """

    classes: jax.Array
    segments: jax.Array


def count_segments(
    classes: jax.Array, num_queries: int, *, no_object_weight: float = NO_OBJECT_WEIGHT
) -> Counts:
    """Returns the counts of every image, (B,) float32 each, which are known before predictions.

    The losses of a batch are divided by their sums over all its images, on whatever device.

    Args:
      classes: classes of the segments (B, M); -1: no segment.
      num_queries: Q.
      no_object_weight: weight of queries without a segment.
    """
    segments = (classes >= 0).sum(1).astype(jnp.float32)
    return Counts(segments + no_object_weight * (num_queries - segments), segments)


def draw_points(key: jax.Array, num_segments: int, num_points: int = NUM_POINTS) -> Points:
    """Draws the points of one image and one prediction, uniformly.

    Args:
      key: random key.
      num_segments: M.
      num_points: points P of a mask.
    """
    first, second = jax.random.split(key)
    candidates, fresh = OVERSAMPLING * num_points, num_points - int(UNCERTAIN * num_points)
    own = jax.random.uniform(second, (num_segments, candidates + fresh, 2))
    return Points(
        jax.random.uniform(first, (num_points, 2)), own[:, :candidates], own[:, candidates:]
    )


def mask_losses(
    logits: jax.Array,
    masks: jax.Array,
    targets: MaskTargets,
    keys: jax.Array,
    counts: Counts,
    *,
    num_points: int = NUM_POINTS,
    weights: Weights = WEIGHTS,
    no_object_weight: float = NO_OBJECT_WEIGHT,
) -> Losses:
    """Returns the losses of all predictions of a decoder, (n,) each; each has its own matching.

    Predictions are processed one after another, to save memory, and only their chosen points are
    kept for the gradient. The assignments are found together.

    Args:
      logits: of the classes of n predictions (n, B, Q, K + 1); the last class is no object.
      masks: logits of masks (n, B, Q, h, w), of a coarser grid than the targets'.
      targets: segments; M at most Q.
      keys: a random key for each image (B,).
      counts: sums of :func:`count_segments` over all images of the batch, () each. A part of the
        batch takes its share of them, so that the mean over parts is the loss of the batch. Both
        are above 0: a batch without segments counts as one segment.
      num_points: points P of a mask.
      weights: weights of the matching; those of the losses are left to the caller.
      no_object_weight: weight of queries without a segment.

    Raises:
      ValueError: there are more places for segments than queries.
    """
    num_segments = targets.classes.shape[1]

    def points(number):
        own = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
        return jax.vmap(lambda key: draw_points(key, num_segments, num_points))(own)

    def costs(prediction):
        number, *prediction = prediction
        return matching_costs(*prediction, targets, points(number).matching, weights=weights)

    def losses(prediction):
        number, logits, masks, queries = prediction
        by_classes = class_losses(
            logits, targets.classes, queries, no_object_weight=no_object_weight
        )
        chosen = choose_points(masks, queries, points(number))
        return Losses(by_classes, *jax.checkpoint(point_losses)(masks, targets, queries, chosen))

    numbers = jnp.arange(len(logits))
    queries = match_queries(lax.map(costs, lax.stop_gradient((numbers, logits, masks))), targets)
    classes, *others = (x.sum(1) for x in lax.map(losses, (numbers, logits, masks, queries)))
    return Losses(classes / counts.classes, *(x / counts.segments for x in others))


def matching_costs(
    logits: jax.Array,
    masks: jax.Array,
    targets: MaskTargets,
    points: jax.Array,
    *,
    weights: Weights = WEIGHTS,
) -> jax.Array:
    """Returns the costs of all queries for all segments, (B, Q, M) float32.

    Args:
      logits: (B, Q, K + 1).
      masks: logits of masks (B, Q, h, w).
      targets: the segments; the costs of padding mean nothing.
      points: where masks are compared (B, P, 2).
      weights: weights of the sum. The cost of a class is minus its probability.
    """

    def product(masks, segments):
        return jnp.einsum("bqp,bmp->bqm", masks, segments, precision=lax.Precision.HIGHEST)

    found = jax.vmap(sample_maps)(masks, points)
    wanted = jax.vmap(sample_objects)(targets.id_maps, targets.ids, points)
    # Cross-entropy of logits x for values t: softplus(x) - t x.
    entropy = jax.nn.softplus(found).mean(-1)[..., None]
    entropy -= product(found, wanted) / points.shape[1]
    probability = jax.nn.sigmoid(found)
    areas = probability.sum(-1)[..., None] + wanted.sum(-1)[:, None]
    dice = 1 - (2 * product(probability, wanted) + 1) / (areas + 1)
    classes = jax.nn.softmax(logits.astype(jnp.float32))
    own_class = jnp.maximum(targets.classes, 0)[:, None]
    classes = jnp.take_along_axis(classes, own_class, -1)
    return weights.masks * entropy + weights.dice * dice - weights.classes * classes


def match_queries(costs: jax.Array, targets: MaskTargets) -> jax.Array:
    """Returns the query of every segment for n predictions, (n, B, M) int32; -1: no segment.

    Args:
      costs: (n, B, Q, M).
      targets: the segments.
    """
    count, batch, *shape = costs.shape
    # Images are first, as devices share them.
    costs = costs.swapaxes(0, 1).reshape(-1, *shape)
    valid = jnp.repeat(targets.classes >= 0, count, 0)
    return assign_targets(costs, valid).reshape(batch, count, -1).swapaxes(0, 1)


def class_losses(
    logits: jax.Array, classes: jax.Array, queries: jax.Array, *, no_object_weight: float
) -> jax.Array:
    """Returns the weighted cross-entropy of classes, summed over the queries of each image, (B,).

    Args:
      logits: (B, Q, K + 1).
      classes: classes of the segments (B, M).
      queries: query of every segment (B, M); -1: no segment.
      no_object_weight: weight of queries without a segment, whose class is the last one.
    """
    batch, num_queries, num_outputs = logits.shape
    none = jnp.full((batch, num_queries), num_outputs - 1, jnp.int32)
    wanted = put(none, jnp.where(queries < 0, num_queries, queries), classes.astype(jnp.int32))
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    entropy = -jnp.take_along_axis(logs, wanted[..., None], -1)[..., 0]
    return (jnp.where(wanted == num_outputs - 1, no_object_weight, 1.0) * entropy).sum(1)


def choose_points(masks: jax.Array, queries: jax.Array, points: Points) -> jax.Array:
    """Returns the points where the masks of segments are compared (B, M, P, 2), without gradient.

    Args:
      masks: logits of masks (B, Q, h, w).
      queries: query of every segment (B, M); -1: no segment.
      points: all points of the images (B, ...).
    """
    num_points = points.matching.shape[1]

    def choose(masks, queries, candidates, fresh):
        return uncertain_points(masks, candidates, fresh, num_points, jnp.maximum(queries, 0))

    return jax.vmap(choose)(masks, queries, points.candidates, points.fresh)


def point_losses(
    masks: jax.Array, targets: MaskTargets, queries: jax.Array, points: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns cross-entropy and dice of masks, summed over the segments of each image, (B,) each.

    Args:
      masks: logits of masks (B, Q, h, w).
      targets: the segments.
      queries: query of every segment (B, M); -1: no segment.
      points: where masks are compared (B, M, P, 2).
    """
    # Without a segment, any query.
    found = jax.vmap(sample_maps)(masks, points, jnp.maximum(queries, 0))
    wanted = jax.vmap(sample_objects)(targets.id_maps, targets.ids, points)
    entropy = (jax.nn.softplus(found) - wanted * found).mean(-1)
    probability = jax.nn.sigmoid(found)
    shared = (probability * wanted).sum(-1)
    dice = 1 - (2 * shared + 1) / (probability.sum(-1) + wanted.sum(-1) + 1)
    entropy, dice = (jnp.where(queries >= 0, x, 0.0).sum(1) for x in (entropy, dice))
    return entropy, dice
