"""Bounds of the recipes' training steps as compiled for one GPU and one TPU.

Tests compile the steps and compare (`make test-aot`); the page of compiled recipes
(`experiments.compiled_recipes`) shows the bounds. A change that makes a step larger or longer must
raise its bound here.
"""

from typing import NamedTuple


class Bound(NamedTuple):
    """Highest cost of a training step on one device.

    Attributes:
      images: images per device.
      memory_gib: memory of the device [GiB].
      launches: kernels; TPUs: operations.
    """

    images: int
    memory_gib: float
    launches: int


# Configuration -> target -> bound. One configuration of every family, and one with a reducer.
BOUNDS: dict[str, dict[str, Bound]] = {}
