"""Semantic segmentation: model, loss, inference and metrics."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax
from ml_collections import ConfigDict

from tokenvit_jax.data import IGNORED
from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.heads import LinearDecoder, MaskTransformer
from tokenvit_jax.models import create_model
from tokenvit_jax.models.backbone import BackboneModel
from tokenvit_jax.ops.resize import resize_rows
from tokenvit_jax.tasks.sliding_window import sliding_logits

HEADS = {"mask_transformer": MaskTransformer, "linear": LinearDecoder}
# Rows of a map of labels that are predicted at once: logits of all would not fit into memory.
CHUNK = 64


class Segmenter(BackboneModel):
    """A backbone, a head on its tokens, and logits of every pixel, bilinear between the tokens.

    With a plain host this is Segmenter (Strudel et al. 2021). A hierarchical backbone gives its
    head the tokens of all of its maps at once.

    Attributes:
      backbone: a :class:`Backbone`.
      head: tokens (B, n, C) -> logits (B, n, K).
    """

    head: nn.Module

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Returns logits (B, H, W, K) in float32 of images (B, H, W, 3)."""
        tokens, restore = self.backbone.encode(images, train)
        logits = restore(self.head(tokens, train=train))
        # The map is that of an image of whole patches.
        height, width = (cells * self.backbone.strides[0] for cells in logits.shape[1:3])
        shape = (len(images), height, width, logits.shape[-1])
        logits = jax.image.resize(logits.astype(jnp.float32), shape, "bilinear", antialias=False)
        return logits[:, : images.shape[1], : images.shape[2]]


def make_model(config: ConfigDict, num_classes: int, *, axis_name: str | None = None) -> Segmenter:
    """Returns the segmentation model of a configuration.

    Args:
      config: reads `model`, `model_overrides`, `head`, `head_overrides` and `dtype`.
      num_classes: number of classes.
      axis_name: axis of `jax.pmap` over which a batch is split; None under `jax.jit`.

    Raises:
      UserError: unknown model, head or override.
    """
    common = {"dtype": jnp.dtype(config.dtype), "axis_name": axis_name}
    backbone = create_model(config.model, **common, **config.model_overrides.to_dict())
    if config.head not in HEADS:
        hint = did_you_mean(config.head, HEADS)
        raise UserError(
            f"config.head={config.head!r} is not valid{hint}; valid: {', '.join(HEADS)}"
        )
    overrides = config.head_overrides.to_dict()
    try:
        head = HEADS[config.head](num_classes=num_classes, **common, **overrides)
    except TypeError as error:
        raise UserError(f"config.head_overrides={overrides} of {config.head}: {error}") from error
    return Segmenter(backbone, head)


def pixel_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the loss of a batch: the sum over the pixels that count, over the number of all.

    As in mmsegmentation: so it is the mean of the losses of the parts of a batch.

    Args:
      logits: (B, H, W, K).
      labels: (B, H, W) integers; IGNORED ones do not count.

    Returns:
      () float32, nats.
    """
    return jnp.mean(_losses(logits, labels))


def _losses(logits, labels):
    """0 where a label is ignored."""
    counts = labels != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.where(counts, labels, 0).astype(jnp.int32)
    )
    return jnp.where(counts, losses, 0.0)


def predict_logits(
    model: nn.Module, config: ConfigDict, variables: Any, images: jax.Array, sizes: jax.Array
) -> jax.Array:
    """Returns the logits of images in buffers, from windows where these are smaller.

    Args:
      model: of :func:`make_model`.
      config: reads `image_size`, `inference.window` and `inference.stride`.
      variables: of the model.
      images: (B, H, W, 3), normalised.
      sizes: (B, 2) int, rows and columns that are image.

    Returns:
      (B, H, W, K) float32.

    Raises:
      UserError: windows that do not fit.
    """
    window = config.inference.window or config.image_size
    stride = config.inference.stride or window
    if window > min(images.shape[1:3]):
        raise UserError(
            f"config.inference.window={window} is not valid; valid: up to the shorter side of "
            f"config.data.eval_size, {min(images.shape[1:3])}"
        )
    if not 1 <= stride <= window:
        raise UserError(f"config.inference.stride={stride} is not valid; valid: 1 to {window}")
    apply = functools.partial(model.apply, variables, train=False)
    return sliding_logits(apply, images, sizes, window, stride)


def batch_sums(
    model: nn.Module,
    config: ConfigDict,
    variables: Any,
    images: jax.Array,
    batch: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """Returns sums over the pixels of a batch that :func:`mean_metrics` turns into metrics.

    Predictions are compared with the labels at the resolution of the labels.

    Args:
      model: of :func:`make_model`.
      config: see :func:`predict_logits`.
      variables: of the model.
      images: (B, H, W, 3), normalised.
      batch: "image_size" (B, 2), "label" (B, h, w) integers, "label_size" (B, 2) and "mask" (B,).

    Returns:
      "confusion" (K, K) int32: pixels of a class (rows) that are predicted as another (columns);
      "loss" () float32: the sum over the pixels that count, nats.
    """
    logits = predict_logits(model, config, variables, images, batch["image_size"])
    # Filling of a batch, like pixels beyond an image.
    labels = jnp.where(batch["mask"][:, None, None] > 0, batch["label"], IGNORED)
    compare = jax.vmap(functools.partial(_compare_rows, num_classes=logits.shape[-1]))
    sums = compare(logits, labels, batch["image_size"], batch["label_size"])
    return jax.tree.map(lambda x: x.sum(0), sums)


def _compare_rows(logits, labels, size, label_size, num_classes):
    """Confusion and loss of one image, some rows after others."""
    height, width = labels.shape
    chunk = min(CHUNK, height)

    def visit(number, carry):
        # The last chunk may reach into the one before: what was seen does not count again.
        start = jnp.minimum(number * chunk, height - chunk)
        rows = start + jnp.arange(chunk)
        wanted = lax.dynamic_slice_in_dim(labels, start, chunk)
        wanted = jnp.where((rows >= number * chunk)[:, None], wanted, IGNORED)
        found = resize_pixels(logits, size, label_size, rows, width)
        sums = _compare(found, wanted, num_classes)
        return jax.tree.map(jnp.add, carry, sums)

    zero = {
        "confusion": jnp.zeros((num_classes, num_classes), jnp.int32),
        "loss": jnp.zeros(()),
    }
    return lax.fori_loop(0, -(-height // chunk), visit, zero)


def resize_pixels(
    logits: jax.Array, size: jax.Array, new_size: jax.Array, rows: jax.Array, width: int
) -> jax.Array:
    """Returns rows of the logits of an image at another resolution: (len(rows), width, K).

    Args:
      logits: (H, W, K).
      size: (2,) int, rows and columns that are image.
      new_size: (2,) int, rows and columns wanted of it.
      rows: (n,) int, those wanted.
      width: columns of the result; those from ``new_size[1]`` on are of no use.
    """
    x = resize_rows(logits, size[0], new_size[0], rows).swapaxes(0, 1)
    return resize_rows(x, size[1], new_size[1], jnp.arange(width)).swapaxes(0, 1)


def _compare(logits, labels, num_classes):
    found = jnp.argmax(logits, -1)
    place = jnp.where(labels == IGNORED, num_classes**2, labels.astype(jnp.int32) * num_classes)
    place = jnp.minimum(place + found, num_classes**2)
    confusion = jnp.bincount(place.reshape(-1), length=num_classes**2 + 1)[:-1]
    return {
        "confusion": confusion.reshape(num_classes, num_classes).astype(jnp.int32),
        "loss": _losses(logits, labels).sum(),
    }


def mean_metrics(sums: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Returns the metrics of a pass from the :func:`batch_sums` of its batches.

    Returns:
      Parts of 1: "eval/miou", the intersection of prediction and label over their union, mean over
      the classes that occur in either; "eval/accuracy", of the pixels; "eval/class_accuracy", mean
      over the classes that occur in the labels. "eval/loss", nats per pixel.
    """
    confusion = sum(np.asarray(batch["confusion"], np.int64) for batch in sums)
    right, wanted, found = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    union = wanted + found - right
    return {
        "eval/miou": float(np.mean(right[union > 0] / union[union > 0])),
        "eval/accuracy": float(right.sum() / wanted.sum()),
        "eval/class_accuracy": float(np.mean(right[wanted > 0] / wanted[wanted > 0])),
        "eval/loss": sum(float(batch["loss"]) for batch in sums) / float(wanted.sum()),
    }
