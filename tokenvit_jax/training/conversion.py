"""Makes a run of published weights, and published weights of a run.

It lives here because a run is a workdir with a configuration and a checkpoint, and its model comes
from a task: `weights/` knows none of these.
"""

from pathlib import Path

from flax import linen as nn
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from tokenvit_jax.config import default_config
from tokenvit_jax.data import dataset_info, list_datasets
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import task_of
from tokenvit_jax.training.checkpoint import load_variables
from tokenvit_jax.training.new_run import check_new, write_run
from tokenvit_jax.training.workdir import read_config
from tokenvit_jax.weights import (
    Layout,
    export_weights,
    find_layout,
    import_weights,
    read_arrays,
)


def import_file(
    source: Path, out: Path, name: str, layout: str, dataset: str, normalization: str | None
) -> None:
    """Writes a run at step 0 with the weights of a file.

    Args:
      source: file of weights, as for :func:`tokenvit_jax.weights.read_arrays`.
      out: folder of the new run.
      name: name of the model.
      layout: a key of LAYOUTS.
      dataset: a dataset with as many classes as the model.
      normalization: pixel normalisation, a key of NORMALIZATIONS, for the run's configuration;
        None: the layout's default.

    Raises:
      UserError: the file cannot be read or does not fit the model, the layout has no such model or
        is for another task than the dataset, or the folder already holds a run.
    """
    found = find_layout(layout, name)
    _check_task(layout, found, dataset)
    check_new(out)
    arrays = read_arrays(source)
    config = default_config()
    config.model, config.dataset = name, dataset
    config.model_overrides = found.model_overrides(arrays)
    config.data.normalization = normalization or found.normalization
    config.update(found.config_entries(arrays))
    model = _make_model(config)
    config.image_size = found.image_size(model)
    try:
        params = import_weights(arrays, model, found)
    except UserError as error:
        raise UserError(f"--source={source}: {error}") from error
    write_run(out, config, {"params": params})


def export_run(source: Path, out: Path, layout: str, checkpoint: str) -> None:
    """Writes the weights of a run as a safetensors file.

    Args:
      source: folder of the run.
      out: the new file.
      layout: a key of LAYOUTS.
      checkpoint: "last", "best" or a step.

    Raises:
      UserError: there is no such checkpoint, or the layout has no such model or is for another
        task.
    """
    config = read_config(source)
    found = find_layout(layout, config.model)
    _check_task(layout, found, config.dataset)
    model = _make_model(config)
    loaded = load_variables(model, config.image_size, source, checkpoint)
    save_file(export_weights(loaded.variables["params"], model, found), out)


def _make_model(config: ConfigDict) -> nn.Module:
    return task_of(config.dataset).make_model(config, dataset_info(config.dataset).num_classes)


def _check_task(name: str, layout: Layout, dataset: str) -> None:
    """Raises UserError unless a layout is for the task of a dataset."""
    if (task := dataset_info(dataset).task) != layout.task:
        valid = ", ".join(x for x in list_datasets() if dataset_info(x).task == layout.task)
        raise UserError(
            f"--layout={name} is for {layout.task}, dataset {dataset!r} for {task}; valid: {valid}"
        )
