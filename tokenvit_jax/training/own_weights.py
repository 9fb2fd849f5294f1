"""Turns a run into a file of weights with the names of this project, and back."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.tasks import create_task
from tokenvit_jax.training.checkpoint import check_same_variables
from tokenvit_jax.training.conversion import AUTO, check_new_weights
from tokenvit_jax.training.exporting import image_shape, write_weights
from tokenvit_jax.training.new_run import check_new, write_run
from tokenvit_jax.training.run import load_run
from tokenvit_jax.training.workdir import restore_config
from tokenvit_jax.weights.own import is_own, named_arrays, read_own

OWN = "own"  # the layout, as `convert` calls it


def means_own(layout: str, source: Path) -> bool:
    """Returns whether a layout, "own" or "auto", stands for our own names in this source."""
    return layout == OWN or (layout == AUTO and is_own(source))


def convert_own(source: Path, out: Path, checkpoint: str) -> None:
    """Calls :func:`export_own` for the folder of a run, and :func:`import_own` for a file."""
    if source.is_dir():
        export_own(source, out, checkpoint)
    else:
        import_own(source, out)


def export_own(source: Path, out: Path, checkpoint: str) -> None:
    """Writes the weights and the configuration of a run as one safetensors file.

    Args:
      source: folder of the run.
      out: path of the new file.
      checkpoint: "last", "best" or a step.

    Raises:
      UserError: there is no such checkpoint, the file exists already, or it cannot be written.
    """
    check_new_weights(out)
    run = load_run(source, checkpoint)
    write_weights(out, run.config, run.variables, run.step, "--out")


def import_own(source: Path, out: Path) -> None:
    """Writes a run at step 0 with the weights and the configuration in a file.

    Args:
      source: file of :func:`export_own`, or the weights of an exported run.
      out: folder of the new run.

    Raises:
      UserError: the file cannot be read, its arrays do not fit its configuration or are not
        finite, or the folder already holds a run.
    """
    check_new(out)
    variables, about = read_own(source)
    config = _config_in(about, source)
    task = create_task(config)
    model = task.make_model()
    images = jax.ShapeDtypeStruct((1, *image_shape(task)), np.float32)
    check_same_variables(variables, variable_shapes(model, images), source)
    for name, x in named_arrays(variables).items():
        if not np.isfinite(x).all():
            raise UserError(f"--source={source}: {name} has values that are not finite")
    write_run(out, config, variables)


def _config_in(about: dict[str, Any], source: Path) -> ConfigDict:
    """Returns the configuration in the description of a file."""
    try:
        return restore_config(about["config"], source)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--source={source} holds no configuration of a run ({type(error).__name__}: {error}); "
            "valid: a file of --layout=own"
        ) from error
