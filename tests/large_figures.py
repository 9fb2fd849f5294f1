"""The embedded figures with the areas of larger ones, so that random keypoints count as near."""

from typing import Any

from ml_collections import ConfigDict

from tokenvit_jax.data.datasets import figures
from tokenvit_jax.data.datasets.figures import INFO, open_split

__all__ = ["INFO", "annotations", "open_split"]

FACTOR = 200


def annotations(config: ConfigDict, split: str) -> dict[str, Any]:
    found = figures.annotations(config, split)
    persons = [{**person, "area": FACTOR * person["area"]} for person in found["annotations"]]
    return found | {"annotations": persons}
