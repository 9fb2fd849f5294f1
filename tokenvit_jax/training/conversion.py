"""Converts published weights to a run, and a run to a file of published weights.

This module is not in `weights/`, which knows neither workdirs, configurations, checkpoints nor
tasks.
"""

from pathlib import Path

from safetensors.numpy import save_file

from tokenvit_jax.data import dataset_info
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import create_task, default_config
from tokenvit_jax.training.new_run import check_new, write_run
from tokenvit_jax.training.run import load_run
from tokenvit_jax.training.workdir import read_config
from tokenvit_jax.weights import export_weights, find_layout, import_weights, read_arrays


def import_file(
    source: Path, out: Path, name: str, layout: str, dataset: str, normalization: str | None
) -> None:
    """Writes a run at step 0 with the weights of a file.

    Args:
      source: file of weights that :func:`tokenvit_jax.weights.read_arrays` reads.
      out: folder of the new run.
      name: name of the model.
      layout: a key of LAYOUTS.
      dataset: name of a dataset with as many classes as the model.
      normalization: pixel normalisation, a key of NORMALIZATIONS, for the run's configuration;
        None: the layout's default.

    Raises:
      UserError: the file cannot be read or does not fit the model, the layout does not cover the
        model or is for another task than the dataset, or the folder already holds a run.
    """
    found = find_layout(layout, name)
    config = default_config(found.task)
    config.model, config.dataset = name, dataset
    dataset_info(config)  # raises UserError for an unknown name
    try:
        task = create_task(config)
    except UserError as error:
        raise UserError(f"--layout={layout} is for {found.task}: {error}") from error
    check_new(out)
    arrays = read_arrays(source)
    config.model_overrides = found.model_overrides(arrays)
    config.data.normalization = normalization or found.normalization
    config.update(found.config_entries(arrays))
    model = task.make_model()
    config.image_size = found.image_size(model, arrays)
    try:
        params = import_weights(arrays, model, found)
    except UserError as error:
        raise UserError(f"--source={source}: {error}") from error
    write_run(out, config, {"params": params})


def export_run(source: Path, out: Path, layout: str, checkpoint: str) -> None:
    """Writes the weights of a run as a safetensors file.

    Args:
      source: folder of the run.
      out: path of the new file.
      layout: a key of LAYOUTS.
      checkpoint: "last", "best" or a step.

    Raises:
      UserError: there is no such checkpoint, or the layout does not cover the model or is for
        another task.
    """
    config = read_config(source)
    found = find_layout(layout, config.model)
    if config.task != found.task:
        raise UserError(
            f"--layout={layout} is for {found.task}, --source={source} is a run for {config.task}"
        )
    run = load_run(source, checkpoint, config=config)
    save_file(export_weights(run.variables["params"], run.model, found), out)
