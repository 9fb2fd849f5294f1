"""Checks the entries of a configuration that the data pipeline of every task reads."""

from ml_collections import ConfigDict

from tokenvit_jax.config import ENTRIES, check_entries
from tokenvit_jax.data.datasets import dataset_info
from tokenvit_jax.errors import UserError

_READ = (
    "seed", "image_size", "in_channels", "batch_size", "data.split", "data.workers",
    "data.on_corrupt", "data.repeats", "data.eval_batch_size", "data.normalization",
)  # fmt: skip


def check_data(config: ConfigDict) -> None:
    """Raises UserError for the first entry of the data pipeline that is not valid.

    Args:
      config: reads `dataset`, `seed`, `image_size`, `in_channels`, `batch_size`, and
        `data.on_corrupt`, `data.normalization`, `data.workers`, `data.split`, `data.classes`,
        `data.repeats` and `data.eval_batch_size`.
    """
    check_entries(config, {key: ENTRIES[key] for key in _READ})
    dataset_info(config)
    if 1 < config.data.repeats >= config.batch_size:
        raise UserError(
            f"config.data.repeats={config.data.repeats} is not valid; valid: 1, or more below "
            f"config.batch_size={config.batch_size}"
        )
