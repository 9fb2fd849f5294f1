"""Compares a clustered Swin Transformer in a detector with cheaper forms of the same network.

    python -m experiments.detection.expedited --workdirs=RUN_0,RUN_1,RUN_2 [--quick]

The runs are trainings of Mask R-CNN, or of HTC, on the embedded scenes that differ only in their
seed, such as RUNS/mask_rcnn_swin_0 of `python -m experiments.detection.detectors --runs=RUNS`.
Nothing is trained here. Writes expedited.md and expedited.png, or expedited_htc.md and
expedited_htc.png.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments import pages
from experiments.clustered_runs import (
    Measures,
    Setting,
    compare,
    define_flags,
    list_settings,
    load_runs,
)
from experiments.runs import Run, make_evaluate, make_model
from tokenvit_jax import cli
from tokenvit_jax.errors import UserError
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.models.backbone import variable_shapes

FLAGS = flags.FlagValues()
define_flags(FLAGS)

METRICS = {"eval/box_ap": "box AP", "eval/mask_ap": "mask AP"}


class Detector(NamedTuple):
    """A detector, its page, and the settings that are compared: see `list_settings`."""

    title: str
    page: str
    before: tuple[int, ...]
    sides: tuple[int, ...]


DETECTORS = {
    "mask_rcnn": Detector("Mask R-CNN", "expedited", (1, 2, 3), (6, 5, 4)),
    "htc": Detector("HTC", "expedited_htc", (1, 3), (6, 4)),
}
RECIPES = "configs/mask_rcnn.py:scenes or configs/htc.py:scenes"


def evaluate(config: ConfigDict, run: Run) -> dict[str, float]:
    """Returns the metrics of a run with a configuration."""
    return make_evaluate(config, make_model(config))(run.variables)


def mmacs(run: Run, setting: Setting) -> float:
    """Returns the multiply-adds [10^6] of the backbone's maps for one image."""
    backbone = run.model.backbone
    if setting.expedite is not None:
        backbone = backbone.clone(expedite=setting.expedite)
    images = jax.ShapeDtypeStruct((1, *run.task.input_shape), "float32")
    variables = variable_shapes(backbone, images)
    maps = functools.partial(backbone.apply, method="features")
    return count_macs(maps, variables, images) / 1e6


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    runs = load_runs(flag_values, "detection", "scene_instances", RECIPES)
    first = next(iter(runs.values()))
    if first.config.head not in DETECTORS:
        raise UserError(f"{flag_values.workdirs[0]} is no run of {RECIPES}")
    detector = DETECTORS[first.config.head]
    depth = first.config.model_overrides.depths[2]
    settings = list_settings(depth, detector.before, detector.sides)
    table, figure = compare(runs, settings, Measures(METRICS, evaluate, mmacs, "backbone"))
    about = f"""
    {len(runs)} runs of {detector.title} that differ only in their seed ({first.step} steps each) on
    the 200 test scenes of 128 x 128 pixels. This is NOT COCO. The third stage has {depth} blocks on
    one window of 8 x 8 tokens. Nothing is fine-tuned; the temperature is measured on the images.
    The heads cost the same in all rows and are not counted. AP is in %, mean ± standard deviation
    over the runs.
    """
    title = f"A clustered Swin Transformer in {detector.title}"
    lines = [
        *pages.heading(title, __file__, about),
        "", f"![AP over the cost]({detector.page}.png)", "", *table,
    ]  # fmt: skip
    if not flag_values.quick:
        pages.write(str(Path(__file__).with_name(detector.page)), lines, figure)


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdirs",))
