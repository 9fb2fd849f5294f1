"""Compares a clustered Swin Transformer in Mask2Former with cheaper forms of the same network.

    python -m experiments.masks.expedited --workdirs=RUN_0,RUN_1,RUN_2 [--quick]

The runs are trainings for panoptic segmentation that differ only in their seed:

    python -m tokenvit_jax.train --config=configs/mask2former.py:scenes --workdir=RUN_0 \\
        --config.seed=0

Nothing is trained here. Writes expedited.md and expedited.png.
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

# Kind of reading -> its metric. The three read the same predictions.
KINDS = {"panoptic": "eval/pq", "instance": "eval/mask_ap", "semantic": "eval/miou"}
METRICS = {"eval/pq": "PQ", "eval/mask_ap": "mask AP", "eval/miou": "mIoU"}
SMALLER = (96, 64)  # sides of smaller images [pixels]
COST = "10^6 multiply-adds"


def evaluate(config: ConfigDict, run: Run) -> dict[str, float]:
    """Returns the metrics of all kinds of a run with a configuration."""
    metrics = {}
    for kind in KINDS:
        config.inference.kind = kind
        metrics |= make_evaluate(config, make_model(config))(run.variables)
    return metrics


def mmacs(run: Run, setting: Setting) -> float:
    """Returns the multiply-adds [10^6] of the whole network for one image."""
    model = run.model
    if setting.expedite is not None:
        model = model.clone(backbone=model.backbone.clone(expedite=setting.expedite))
    side = (setting.side, setting.side) if setting.side else run.task.input_shape[:2]
    images = jax.ShapeDtypeStruct((1, *side, run.task.input_shape[2]), "float32")
    predict = functools.partial(model.apply, train=False)
    return count_macs(predict, variable_shapes(model, images), images) / 1e6


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    runs = load_runs(flag_values, "masks", "scene_segments", "configs/mask2former.py:scenes")
    first = next(iter(runs.values()))
    depth = first.config.model_overrides.depths[2]
    settings = list_settings(depth, SMALLER)
    results, rows = compare(runs, settings, METRICS, evaluate, mmacs)
    about = f"""
    {len(runs)} runs of `configs/mask2former.py:scenes` that differ only in their seed
    ({first.step} steps each) on the 200 test scenes of 128 x 128 pixels. This is NOT COCO. The
    third stage has {depth} blocks on one window of 8 x 8 tokens. Nothing is fine-tuned; the
    temperature is measured on the images. PQ, mask AP and mIoU are three readings of the same
    predictions, in %, mean ± standard deviation over the runs. Multiply-adds are those of the
    whole network.
    """
    lines = [
        *pages.heading("A clustered Swin Transformer in Mask2Former", __file__, about),
        "", "![Metrics over the cost](expedited.png)", "",
        *pages.table(columns(settings, METRICS, "MMACs"), rows),
    ]  # fmt: skip
    if not flag_values.quick:
        pages.write(__file__, lines, plot(results, METRICS, COST))


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdirs",))
