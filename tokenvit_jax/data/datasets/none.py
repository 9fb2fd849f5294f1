"""No dataset: a model with classes, or without a classifier, and no images of its own.

Imported weights have this dataset if no other is given. `config.data.classes` names the classes.
"""

from ml_collections import ConfigDict

from tokenvit_jax.data.record import DatasetInfo, Record, Source
from tokenvit_jax.errors import UserError


def read_info(config: ConfigDict) -> DatasetInfo:
    """Returns the facts that a configuration holds: the names of the classes, and no splits.

    Args:
      config: reads `data.classes`.
    """
    classes = tuple(config.data.classes)
    return DatasetInfo(
        name="none",
        splits={},
        train_split="train",
        eval_split="val",
        fields=frozenset(Record.__annotations__) - {"id"},
        num_classes=len(classes),
        classes=classes,
        center_crop=True,
    )


def open_split(config: ConfigDict, split: str) -> Source:
    """Raises UserError: there are no images."""
    raise UserError(
        f"config.dataset={config.dataset!r} has no images for the split {split!r}; name a dataset "
        "with --config.dataset=NAME (train) or --dataset=NAME (evaluate)"
    )
