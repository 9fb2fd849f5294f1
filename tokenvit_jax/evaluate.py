"""Evaluates a checkpoint: python -m tokenvit_jax.evaluate --workdir=DIRECTORY.

Prints the metrics as one line of JSON. The configuration is that of the run, or another:
--config=CONFIG.py. --checkpoint=last, best (highest accuracy or mIoU) or a step.

    python -m tokenvit_jax.evaluate --workdir=RUN --keep=level1 --keep=level3 --carry

A plain host with a token reducer inserted, without training: a line without it, then one for every
--keep and --method, with the multiply-adds of an image. --expedite=ALPHA,BETA,ROWSxCOLUMNS: the
same of hosts whose tokens are clustered for some blocks.
"""

import functools
import json
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from tokenvit_jax import cli, insertion_flags
from tokenvit_jax.data import dataset_info
from tokenvit_jax.summary import summarize_model
from tokenvit_jax.tasks import task_of
from tokenvit_jax.tasks.batches import eval_dataset
from tokenvit_jax.training import parallel as devices
from tokenvit_jax.training.checkpoint import load_variables
from tokenvit_jax.training.step import make_eval_step
from tokenvit_jax.training.validate import check_config
from tokenvit_jax.training.workdir import for_inference, read_config

FLAGS = flags.FlagValues()
cli.define_config(FLAGS)
flags.DEFINE_string("workdir", None, "folder of a training run", flag_values=FLAGS)
flags.DEFINE_string("checkpoint", "last", "last, best or a step", flag_values=FLAGS)
flags.DEFINE_string(
    "data_dir",
    None,
    "where `prepare` wrote the dataset; default: that of the configuration",
    flag_values=FLAGS,
)
insertion_flags.define(FLAGS)


def evaluate(config: ConfigDict, workdir: Path, checkpoint: str = "last") -> dict[str, float]:
    """Returns the metrics of a checkpoint over the whole evaluation split.

    Args:
      config: see `tokenvit_jax.config`.
      workdir: folder of a training run.
      checkpoint: "last", "best" or a step.

    Returns:
      "step" and the metrics of the task, see its `mean_metrics`.

    Raises:
      UserError: there is no such checkpoint, it is of another model, or a value of the config
        does not fit.
    """
    check_config(config)
    parallel = devices.make_parallel(config)
    num_classes = dataset_info(config.dataset).num_classes
    task = task_of(config.dataset)
    model = task.make_model(config, num_classes, axis_name=parallel.axis_name)
    loaded = load_variables(model, config.image_size, workdir, checkpoint)

    eval_step = parallel.eval_step(make_eval_step(model, config, axis_name=parallel.axis_name))
    variables = parallel.put_variables(loaded.variables)
    sums = devices.map_batches(
        functools.partial(eval_step, variables), eval_dataset(config), parallel.put_batch
    )
    return {"step": loaded.step, **task.mean_metrics(sums)}


def main(flag_values: flags.FlagValues) -> None:
    """Runs the command."""
    workdir = Path(flag_values.workdir)
    given = flag_values["config"].value is not None
    if given:
        config = cli.read_config(flag_values)
        if flag_values.data_dir is not None:
            config.data.data_dir = flag_values.data_dir
    else:
        config = for_inference(read_config(workdir), flag_values.data_dir)
    insertions = insertion_flags.insertions(flag_values, config.model)
    for label, overrides in {"none": {}, **insertions}.items():
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            for key, value in overrides.items():  # `update` would keep parts of what was there
                changed.model_overrides[key] = value
        metrics = evaluate(changed, workdir, flag_values.checkpoint)
        if insertions:
            metrics |= {"inserted": label, "gmacs": _gmacs(changed)}
        print(json.dumps(metrics), flush=True)


def _gmacs(config):
    num_classes = dataset_info(config.dataset).num_classes
    model = task_of(config.dataset).make_model(config, num_classes)
    return summarize_model(model, (config.image_size, config.image_size), config.model).macs / 1e9


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir",))
