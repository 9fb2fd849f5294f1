"""Evaluates heat maps that equal their targets: how exactly keypoints can be read from them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tokenvit_jax.data import open_split
from tokenvit_jax.data.person_crops import inverse_matrix, transform_points
from tokenvit_jax.ops.heatmaps import heatmap_targets, to_heatmap
from tokenvit_jax.tasks import Outcome, create_task
from tokenvit_jax.tasks.pose.settings import heatmap_size


class FixedHeatmaps:
    """A model that returns heat maps (B, h, w, K) whatever it sees."""

    def __init__(self, heatmaps: jax.Array):
        self.heatmaps = heatmaps

    def apply(self, variables: Any, images: jax.Array, train: bool, **kwargs: Any) -> Any:
        """Returns the heat maps, in training with an empty state."""
        return (self.heatmaps, {}) if "mutable" in kwargs else self.heatmaps


def reader(config: ConfigDict) -> Callable[[jax.Array, Mapping[str, Any]], Outcome]:
    """Returns a compiled function that reads the keypoints of crops from given heat maps.

    Args:
      config: configuration with the task `pose`; `inference.flip` does not count.

    Returns:
      A function of heat maps (B, h, w, K) and an evaluation batch that returns what the task's
      meter adds.
    """
    config = config.copy_and_resolve_references()
    config.inference.flip = False
    task = create_task(config)

    @jax.jit
    def read(heatmaps, batch):
        return task.evaluate(FixedHeatmaps(heatmaps), {}, batch)

    return read


def perfect(config: ConfigDict, batch_size: int = 40) -> dict[str, float]:
    """Returns the metrics of the test split if the heat maps are their targets.

    Args:
      config: configuration with the task `pose`; `inference.flip` does not count, as the targets of
        a mirrored image are mirrored.
      batch_size: crops of a call, a divisor of the number of persons.
    """
    task, read = create_task(config), reader(config)
    size, settings = task.input_size, config.pose
    cells = heatmap_size(size)

    @jax.jit
    def targets(points):
        places = to_heatmap(points[..., :2], size, cells, unbiased=settings.unbiased)
        found = heatmap_targets(
            places, points[..., 2] > 0, cells, sigma=settings.sigma, unbiased=settings.unbiased
        )
        return found.maps

    source, examples = open_split(config, task.info.eval_split), task.examples(train=False)
    meter = task.meter()
    for start in range(0, len(source), batch_size):
        indices = np.arange(start, start + batch_size)
        records = [source.read(index) for index in indices]
        found = [examples(record, None) for record in records]
        batch = {name: np.stack([example[name] for example in found]) for name in found[0]}
        batch |= {"index": indices, "mask": np.ones(batch_size)}
        points = [
            transform_points(record["person"].keypoints, inverse_matrix(example["to_image"]))
            for record, example in zip(records, found, strict=True)
        ]
        meter.add(jax.device_get(read(targets(np.stack(points)), batch)))
    return meter.result()
