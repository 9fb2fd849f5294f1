"""Compares predicted persons with those of the dataset."""

from typing import Any

from tokenvit_jax.data.whole_body import split_fields
from tokenvit_jax.metrics.whole_body import WholeBodyMeter


class PoseMeter(WholeBodyMeter):
    """Average precision of whole bodies; results have the fields of COCO-WholeBody's files."""

    def results(self) -> list[dict[str, Any]]:
        """Returns the persons in COCO-WholeBody's format of results."""
        return [split_fields(entry) for entry in super().results()]
