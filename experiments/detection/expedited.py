"""Compares a clustered Swin Transformer in a detector with cheaper forms of the same network.

    python -m experiments.detection.expedited --workdirs=RUN_0,RUN_1,RUN_2 [--quick]

The runs are trainings of Mask R-CNN on the embedded scenes that differ only in their seed, such as
RUNS/mask_rcnn_swin_0 of `python -m experiments.detection.detectors --runs=RUNS`. Nothing is trained
here. Writes expedited.md and expedited.png.
"""

import functools

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments import pages
from experiments.clustered_runs import (
    Setting,
    columns,
    compare,
    define_flags,
    list_settings,
    load_runs,
    plot,
)
from experiments.runs import Run, make_evaluate, make_model
from tokenvit_jax import cli
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.models.backbone import variable_shapes

FLAGS = flags.FlagValues()
define_flags(FLAGS)

METRICS = {"eval/box_ap": "box AP", "eval/mask_ap": "mask AP"}


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
    runs = load_runs(flag_values, "detection", "scene_instances", "configs/mask_rcnn.py:scenes")
    first = next(iter(runs.values()))
    depth = first.config.model_overrides.depths[2]
    settings = list_settings(depth)
    results, rows = compare(runs, settings, METRICS, evaluate, mmacs)
    about = f"""
    {len(runs)} runs of Mask R-CNN that differ only in their seed ({first.step} steps each) on the
    200 test scenes of 128 x 128 pixels. This is NOT COCO. The third stage has {depth} blocks on one
    window of 8 x 8 tokens. Nothing is fine-tuned; the temperature is measured on the images. The
    heads cost the same in all rows and are not counted. AP is in %, mean ± standard deviation over
    the runs.
    """
    cost = "MMACs, backbone"
    lines = [
        *pages.heading("A clustered Swin Transformer in Mask R-CNN", __file__, about),
        "", "![AP over the cost](expedited.png)", "",
        *pages.table(columns(settings, METRICS, cost), rows),
    ]  # fmt: skip
    if not flag_values.quick:
        pages.write(__file__, lines, plot(results, METRICS, f"10^6 multiply-adds, {cost[7:]}"))


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdirs",))
