"""Checks the entries of a configuration that the data pipeline of every task reads."""

from ml_collections import ConfigDict

from tokenvit_jax.config import check_values
from tokenvit_jax.data.datasets import dataset_info
from tokenvit_jax.data.images import NORMALIZATIONS
from tokenvit_jax.data.token_labels import CELL_SIZE
from tokenvit_jax.errors import UserError

MIN_IMAGE_SIZE = CELL_SIZE  # one cell of the last map [pixels]

_CHOICES = {
    "data.on_corrupt": ("raise", "skip"),
    "data.normalization": tuple(NORMALIZATIONS),
}
_RANGES = {
    "image_size": (MIN_IMAGE_SIZE, None),
    "seed": (0, 2**32 - 1),
    "data.workers": (0, None),
    "data.split": (0, 1),
}


def check_data(config: ConfigDict) -> None:
    """Raises UserError for the first entry of the data pipeline that is not valid.

    Args:
      config: reads `dataset`, `seed`, `image_size`, `batch_size`, and `data.on_corrupt`,
        `data.normalization`, `data.workers`, `data.split`, `data.classes` and `data.repeats`.
    """
    check_values(config, _CHOICES, _RANGES)
    dataset_info(config)
    repeats = config.data.repeats
    if repeats < 1 or (repeats > 1 and repeats >= config.batch_size):
        raise UserError(
            f"config.data.repeats={repeats} is not valid; valid: 1, or more below "
            f"config.batch_size={config.batch_size}"
        )
