"""Checks the entries of a configuration that the data pipeline of every task reads."""

from ml_collections import ConfigDict

from tokenvit_jax.data.datasets import dataset_info
from tokenvit_jax.data.token_labels import CELL_SIZE
from tokenvit_jax.errors import UserError

MIN_IMAGE_SIZE = CELL_SIZE  # one cell of the last map [pixels]


def check_data(config: ConfigDict) -> None:
    """Checks `dataset`, `seed`, `image_size`, `data.on_corrupt`, `data.workers`, `data.repeats`.

    Raises:
      UserError: one of these entries is not valid; the message names the first one.
    """
    dataset_info(config.dataset)
    if config.image_size < MIN_IMAGE_SIZE:
        raise UserError(f"image_size={config.image_size}; valid: at least {MIN_IMAGE_SIZE}")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed}; valid: 0 to {2**32 - 1}")
    if config.data.on_corrupt not in ("raise", "skip"):
        raise UserError(f"data.on_corrupt={config.data.on_corrupt!r}; valid: 'raise', 'skip'")
    if config.data.workers < 0:
        raise UserError(f"data.workers={config.data.workers}; valid: 0 or more")
    repeats = config.data.repeats
    if repeats < 1 or (repeats > 1 and repeats >= config.batch_size):
        raise UserError(
            f"data.repeats={repeats}; valid: 1, or more below batch_size={config.batch_size}"
        )
