"""Predicts images of any size and compares the predictions with label maps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from ml_collections import ConfigDict

from tokenvit_jax.data import IGNORED
from tokenvit_jax.metrics.confusion import confusion_matrix
from tokenvit_jax.ops.resize import resize_rows
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
    compare = jax.vmap(functools.partial(_compare_rows, num_classes=logits.shape[-1]))
    sums = compare(logits, labels, sizes, label_sizes)
    return jax.tree.map(lambda x: x.sum(0), sums)


def _compare_rows(logits, labels, size, label_size, num_classes):
    """Computes confusion and loss of one image, a chunk of rows at a time."""
    height, width = labels.shape
    chunk = min(CHUNK, height)

    def visit(number, carry):
        # The last chunk may overlap the previous one: rows that were counted do not count again.
        start = jnp.minimum(number * chunk, height - chunk)
        rows = start + jnp.arange(chunk)
        wanted = lax.dynamic_slice_in_dim(labels, start, chunk)
        wanted = jnp.where((rows >= number * chunk)[:, None], wanted, IGNORED)
        found = resize_pixels(logits, size, label_size, rows, width)
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


def resize_pixels(
    logits: jax.Array, size: jax.Array, new_size: jax.Array, rows: jax.Array, width: int
) -> jax.Array:
    """Returns rows of an image's logits at another resolution, (n, width, K).

    Args:
      logits: (H, W, K).
      size: (2,) int, height and width of the image in the buffer.
      new_size: (2,) int, height and width of the resized image.
      rows: (n,) int, rows of the resized image to return.
      width: number of columns to return; columns from ``new_size[1]`` on are meaningless.
    """
    x = resize_rows(logits, size[0], new_size[0], rows).swapaxes(0, 1)
    return resize_rows(x, size[1], new_size[1], jnp.arange(width)).swapaxes(0, 1)


@functools.partial(jax.jit, static_argnames="new_size")
def largest_labels(logits: jax.Array, size: jax.Array, new_size: tuple[int, int]) -> jax.Array:
    """Returns the most probable class of every pixel of a resized image, uint8.

    Args:
      logits: (H, W, K).
      size: (2,) int, height and width of the image in the buffer.
      new_size: height and width of the result.
    """
    height, width = new_size
    chunk = min(CHUNK, height)

    def predict(start):  # a chunk of rows at a time: logits for all would not fit into memory
        rows = start + jnp.arange(chunk)
        found = resize_pixels(logits, size, jnp.array(new_size), rows, width)
        return jnp.argmax(found, -1).astype(jnp.uint8)

    labels = lax.map(predict, jnp.arange(0, height, chunk))
    return labels.reshape(-1, width)[:height]


def class_shares(labels: np.ndarray) -> list[tuple[int, float]]:
    """Returns the labels that occur in a label map, with their shares of the pixels, largest first.

    Args:
      labels: (H, W) integers.
    """
    found, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(found[i]), float(counts[i] / labels.size)) for i in order]
