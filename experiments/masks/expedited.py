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
    Measures,
    Setting,
    compare,
    define_flags,
    list_settings,
    load_runs,
)
from experiments.runs import Run, make_model, test_data
from tokenvit_jax import cli
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.tasks import Outcome, create_task
from tokenvit_jax.tasks.masks.inference import predict_masks
from tokenvit_jax.tasks.masks.settings import INSTANCE, PANOPTIC, SEMANTIC, result_size

FLAGS = flags.FlagValues()
define_flags(FLAGS)

METRICS = {"eval/pq": "PQ", "eval/mask_ap": "mask AP", "eval/miou": "mIoU"}
BEFORE, SIDES = (1, 3), (6, 4)  # see `list_settings`
SMALLER = (96, 64)  # sides of smaller images [pixels]

read = jax.jit(predict_masks, static_argnames=("canvas", "room", "kind", "things"))


def evaluate(config: ConfigDict, run: Run) -> dict[str, float]:
    """Returns the metrics of all kinds of segments, from the same predictions."""
    task, model = create_task(config), make_model(config)

    @jax.jit
    def predict(variables, images):
        found = model.apply(variables, task.normalize(images), train=False)
        return found.logits[-1], found.masks[-1]

    meters = {}
    for kind in (SEMANTIC, INSTANCE, PANOPTIC):
        own = config.copy_and_resolve_references()
        own.inference.kind = kind
        meters[kind] = create_task(own).meter()
    for batch in test_data(config):
        logits, masks = predict(run.variables, batch["image"])
        canvas, sizes = batch["image"].shape[1:3], (batch["image_size"], batch["original_size"])
        for kind, meter in meters.items():
            found = read(
                logits, masks, canvas, *sizes, room=result_size(config), kind=kind,
                things=task.info.things,
            )  # fmt: skip
            names = "index", "mask", "original_size"
            rows = jax.device_get(found) | {name: batch[name] for name in names}
            meter.add(Outcome((), rows))
    return {name: value for meter in meters.values() for name, value in meter.result().items()}


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
    settings = list_settings(depth, BEFORE, SIDES, SMALLER)
    table, figure = compare(runs, settings, Measures(METRICS, evaluate, mmacs))
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
        "", "![Metrics over the cost](expedited.png)", "", *table,
    ]  # fmt: skip
    if not flag_values.quick:
        pages.write(__file__, lines, figure)


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdirs",))
