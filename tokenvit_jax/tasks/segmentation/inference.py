"""Predicts images of any size and compares the predictions with label maps."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from ml_collections import ConfigDict

from tokenvit_jax.data import IGNORED
from tokenvit_jax.metrics.confusion import confusion_matrix
from tokenvit_jax.ops.resize import resize_valid
from tokenvit_jax.tasks.segmentation.losses import pixel_losses
from tokenvit_jax.tasks.segmentation.settings import windows
from tokenvit_jax.tasks.segmentation.sliding_window import sliding_logits

# Number of rows of a label map to predict at once: logits for all rows would not fit into memory.
CHUNK = 64


def predict_logits(
    model: nn.Module, config: ConfigDict, variables: Any, images: jax.Array, sizes: jax.Array
) -> jax.Array:
    """Returns the logits for images in buffers, from several windows where windows are smaller.

    Args:
      model: segmentation model.
      config: provides `image_size`, `inference.window` and `inference.stride`.
      variables: variables of the model.
      images: (B, H, W, C), normalised.
      sizes: (B, 2) int, height and width of the image in each buffer.

    Returns:
      (B, H, W, K) float32.

    Raises:
      UserError: the windows do not fit.
    """
    window, stride = windows(config, images.shape[1:3])
    apply = functools.partial(model.apply, variables, train=False)
    return sliding_logits(apply, images, sizes, window, stride)


class View(NamedTuple):
    """The logits for an image at one size.

    Attributes:
      logits: (H, W, K) float32.
      size: (2,) int, height and width of the image in the map of logits.
    """

    logits: jax.Array
    size: jax.Array


def predict_views(
    model: nn.Module,
    config: ConfigDict,
    variables: Any,
    images: Sequence[jax.Array],
    sizes: Sequence[jax.Array],
) -> list[View]:
    """Returns the logits for one image at several sizes, and for the mirrored image.

    Args:
      model: segmentation model.
      config: provides `image_size` and `inference`.
      variables: variables of the model.
      images: the image at each of the scales, in a buffer (H, W, C), normalised.
      sizes: (2,) int each, height and width of the image in its buffer.

    Returns:
      One view for each scale, and with `inference.flip` two: the image's, and that of the mirrored
      image, mirrored back.

    Raises:
      UserError: the windows do not fit.
    """
    views = []
    for image, size in zip(images, sizes, strict=True):
        shown = [image, mirrored(image, size[1])] if config.inference.flip else [image]
        logits = predict_logits(
            model, config, variables, jnp.stack(shown), jnp.stack([size] * len(shown))
        )
        views.append(View(logits[0], size))
        if config.inference.flip:
            views.append(View(mirrored(logits[1], size[1]), size))
    return views


def mirrored(x: jax.Array, width: jax.Array) -> jax.Array:
    """Returns a map (H, W, C) whose first ``width`` columns are in reverse order."""
    columns = jnp.arange(x.shape[1])
    return jnp.take(x, jnp.where(columns < width, width - 1 - columns, columns), 1)


def compare_with_labels(
    logits: jax.Array,
    sizes: jax.Array,
    labels: jax.Array,
    label_sizes: jax.Array,
) -> dict[str, jax.Array]:
    """Compares predictions with label maps, at the size of the label maps.

    Args:
      logits: (B, H, W, K).
      sizes: (B, 2) int, height and width of the image in each map of logits.
      labels: (B, h, w) integers; IGNORED ones do not count.
      label_sizes: (B, 2) int, height and width of the label map in each buffer.

    Returns:
      "confusion" (K, K) int32, see `metrics.confusion`; "loss" () float32, the sum over the pixels
      that count, in nats.
    """
    compare = jax.vmap(lambda view, *label: compare_views([view], *label))
    sums = compare(View(logits, sizes), labels, label_sizes)
    return jax.tree.map(lambda x: x.sum(0), sums)


def compare_views(
    views: Sequence[View], labels: jax.Array, label_size: jax.Array
) -> dict[str, jax.Array]:
    """Compares the prediction for one image with its label map, a chunk of rows at a time.

    Args:
      views: logits for the image.
      labels: (h, w) integers; IGNORED ones do not count.
      label_size: (2,) int, height and width of the label map in its buffer.

    Returns:
      As :func:`compare_with_labels`.
    """
    height, width = labels.shape
    num_classes = views[0].logits.shape[-1]
    chunk = min(CHUNK, height)

    def visit(number, carry):
        # The last chunk may overlap the previous one: rows that were counted do not count again.
        start = jnp.minimum(number * chunk, height - chunk)
        rows = start + jnp.arange(chunk)
        wanted = lax.dynamic_slice_in_dim(labels, start, chunk)
        wanted = jnp.where((rows >= number * chunk)[:, None], wanted, IGNORED)
        found = resized_logits(views, label_size, rows, width)
        sums = {
            "confusion": confusion_matrix(jnp.argmax(found, -1), wanted, num_classes, IGNORED),
            "loss": pixel_losses(found, wanted).sum(),
        }
        return jax.tree.map(jnp.add, carry, sums)

    zero = {
        "confusion": jnp.zeros((num_classes, num_classes), jnp.int32),
        "loss": jnp.zeros(()),
    }
    return lax.fori_loop(0, -(-height // chunk), visit, zero)


def resized_logits(
    views: Sequence[View], new_size: jax.Array, rows: jax.Array, width: int
) -> jax.Array:
    """Returns rows of an image's logits at another resolution, (n, width, K).

    The logits of a single view are resized. Several views are resized before the softmax; the mean
    of their probabilities has the logits log(mean), as in mmsegmentation.

    Args:
      views: logits for the image.
      new_size: (2,) int, height and width of the resized image.
      rows: (n,) int, rows of the resized image to return.
      width: number of columns to return; columns from ``new_size[1]`` on are meaningless.
    """
    resized = (resize_valid(*view, new_size, rows, width) for view in views)
    if len(views) == 1:
        return next(resized)
    mean = sum(map(jax.nn.softmax, resized)) / len(views)
    return jnp.log(jnp.maximum(mean, jnp.finfo(mean.dtype).tiny))


@functools.partial(jax.jit, static_argnames="new_size")
def largest_labels(views: Sequence[View], new_size: tuple[int, int]) -> jax.Array:
    """Returns the most probable class of every pixel of a resized image, uint8.

    Args:
      views: logits for the image.
      new_size: height and width of the result.
    """
    height, width = new_size
    chunk = min(CHUNK, height)

    def predict(start):  # a chunk of rows at a time: logits for all would not fit into memory
        rows = start + jnp.arange(chunk)
        found = resized_logits(views, jnp.array(new_size), rows, width)
        return jnp.argmax(found, -1).astype(jnp.uint8)

    labels = lax.map(predict, jnp.arange(0, height, chunk))
    return labels.reshape(-1, width)[:height]
