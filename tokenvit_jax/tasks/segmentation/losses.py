"""Cross-entropy of pixels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from tokenvit_jax.data import IGNORED


def pixel_cross_entropy(
    logits: jax.Array, labels: jax.Array, to_pixels: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Returns the loss () of a batch in nats, float32.

    The sum over the pixels that count is divided by the number of all pixels, as in mmsegmentation.
    Thus the loss is the mean of the losses of the parts of a batch. Only one image at a time has
    logits at all pixels, which the backward pass computes again: those of 16 images of 512 x 512
    pixels and 150 classes take 2.5 GB.

    Args:
      logits: (B, h, w, K), coarse.
      labels: (B, H, W) integers; IGNORED ones do not count.
      to_pixels: interpolation of coarse logits, (1, h, w, K) -> (1, H, W, K).
    """

    @jax.checkpoint
    def image_loss(image):
        logits, labels = image
        return jnp.mean(pixel_losses(to_pixels(logits[None])[0], labels))

    return jnp.mean(lax.map(image_loss, (logits, labels)))


def pixel_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the loss of every pixel (...); 0 where the label is ignored.

    Args:
      logits: (..., K).
      labels: (...) integers.
    """
    logits = logits.astype(jnp.float32)
    # A sum instead of an index: its gradient is elementwise, too.
    own = jnp.arange(logits.shape[-1]) == labels[..., None]
    losses = jax.nn.logsumexp(logits, -1) - jnp.where(own, logits, 0.0).sum(-1)
    return jnp.where(labels != IGNORED, losses, 0.0)
