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
      memory_gib: memory of the device [GiB]; None: all that it has.
      launches: kernels; TPUs: operations. None: not yet bounded.
    """

    images: int
    memory_gib: float | None = None
    launches: int | None = None


# Configuration -> target -> bound. One configuration of every family, one with a reducer, and some
# of dense tasks, two of them for a GPU only: they compile for minutes.
# The numbers are about a tenth above those of compiled steps.
BOUNDS: dict[str, dict[str, Bound]] = {
    "dgt_t": {"h100": Bound(128, 9.0, 2000), "v5e": Bound(64, 6.8, 3830)},
    "clustr_t": {"h100": Bound(128, 6.1, 1130), "v5e": Bound(64, 4.0, 2010)},
    "pale_t": {"h100": Bound(128, 8.5, 2040), "v5e": Bound(64, 8.9, 4860)},
    "deit_s": {"h100": Bound(128, 4.6, 630), "v5e": Bound(64, 4.1, 1180)},
    "deit_s:level3": {"h100": Bound(128, 2.4, 720), "v5e": Bound(64, 2.4, 2030)},
    "swin_t": {"h100": Bound(128, 7.0, 800), "v5e": Bound(64, 7.5, 1820)},
    "segmenter_s": {"h100": Bound(8, 2.3, 1070), "v5e": Bound(8, 4.6, 1790)},
    "mask2former:ade20k_semantic_swin_t": {"h100": Bound(16, 37.5, 3750)},
    "pose:clustr_s": {"h100": Bound(128, 20.5, 2680)},
}
