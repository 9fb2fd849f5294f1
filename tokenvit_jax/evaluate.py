"""Evaluates a checkpoint: python -m tokenvit_jax.evaluate --workdir=DIRECTORY.

Prints the metrics as one line of JSON; --per_class adds the metrics of every class by name. The
configuration is the run's own, or another one with --config=CONFIG.py; --config.key=value changes
an entry of it. --dataset and --data_dir name other images with the same classes. --checkpoint is
last, best (highest score of the task) or a step.

    python -m tokenvit_jax.evaluate --workdir=RUN --config.inference.window=whole \\
        --config.inference.scales="(0.5, 0.75, 1.0, 1.25, 1.5, 1.75)" --config.inference.flip

evaluates a segmentation model on whole images, at six sizes and mirrored.

    python -m tokenvit_jax.evaluate --workdir=RUN --out=results.json

also writes the detections of a detector, in COCO's format of results, the segments of a model of
segmentation by masks, or the persons of a pose model, in COCO-WholeBody's format.

    python -m tokenvit_jax.evaluate --workdir=RUN --keep=level1 --keep=level3 --carry

inserts a token reducer into a plain host without training. This prints a line without the reducer,
then a line for every --keep and --method, with the multiply-adds per image.
--expedite=ALPHA,BETA,ROWSxCOLUMNS does the same with hosts whose tokens are clustered; it measures
the temperature on the first images of the evaluation split.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

from absl import flags

from tokenvit_jax import cli
from tokenvit_jax.expediting import insertions

FLAGS = cli.config_flags(of_run=True)
flags.DEFINE_string("workdir", None, "folder of a training run", flag_values=FLAGS)
flags.DEFINE_string("checkpoint", "last", "last, best or a step", flag_values=FLAGS)
flags.DEFINE_string(
    "dataset",
    None,
    "dataset with the classes of the run, in the same order; default: as in the configuration",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "data_dir",
    None,
    "folder of the prepared dataset, or of images; default: as in the configuration",
    flag_values=FLAGS,
)
flags.DEFINE_bool("per_class", False, "add the metrics of every class", flag_values=FLAGS)
flags.DEFINE_string(
    "out", None, "JSON file for detections, segments or persons; default: none", flag_values=FLAGS
)
insertions.define_flags(FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Evaluates the checkpoint, also with each insertion."""
    from tokenvit_jax.data import check_reads_files, with_dataset
    from tokenvit_jax.training.evaluation import check_insertion, evaluate_insertions
    from tokenvit_jax.training.workdir import for_inference, read_config

    workdir, checkpoint = Path(flag_values.workdir), flag_values.checkpoint
    config = cli.run_config(flag_values, lambda: for_inference(read_config(workdir)))
    if flag_values.data_dir is not None:
        config.data.data_dir = flag_values.data_dir
    if flag_values.dataset is not None:
        config = with_dataset(config, flag_values.dataset)
    check_reads_files(config, flag_values.data_dir)
    fits = functools.partial(check_insertion, config)
    inserted = insertions.from_flags(flag_values, config.model, fits)
    out = _results_file(flag_values, config.task, inserted)
    per_class = flag_values.per_class
    for metrics in evaluate_insertions(workdir, checkpoint, config, inserted, per_class, out):
        print(json.dumps(metrics), flush=True)


def _results_file(flag_values: flags.FlagValues, task: str, inserted: Mapping) -> Path | None:
    """Returns the file for the predictions, if there is to be one and it can be written."""
    from tokenvit_jax.output import check_file
    from tokenvit_jax.tasks import TASKS

    if flag_values.out is None:
        return None
    out = Path(flag_values.out)
    if not TASKS[task].has_results:
        valid = ", ".join(name for name, cls in TASKS.items() if cls.has_results)
        raise cli.UsageError(f"--out={out} is for runs of the task {valid}; this is one of {task}")
    if inserted:
        raise cli.UsageError(f"--out={out} does not go with --keep and --expedite: one file only")
    check_file(out, "--out")
    return out


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir",))
