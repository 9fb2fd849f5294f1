"""Exports a run as a folder that needs neither this package nor its models: only jax.

The folder holds the lowered model for any number of images (`jax.export`), its weights, and a
description in JSON. The model normalises the images itself.
"""

import contextlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import export
from ml_collections import ConfigDict

from tokenvit_jax.output import new_folder, write_file
from tokenvit_jax.tasks import Task
from tokenvit_jax.training.workdir import plain_config
from tokenvit_jax.weights.own import named_arrays, variables_of, write_own

MODEL_FILE, WEIGHTS_FILE, ABOUT_FILE = "model.jax", "weights.safetensors", "export.json"
PLATFORMS = ("cpu", "cuda", "tpu")
BATCH = "batch"  # name of the number of images in the shapes


def write_export(
    out: Path,
    task: Task,
    model: nn.Module,
    variables: dict[str, Any],
    step: int,
    name: str = "out",
) -> None:
    """Writes a model as a folder, which appears when it is complete.

    Args:
      out: the new folder.
      task: task of the model.
      model: linen module.
      variables: variables for `model.apply`.
      step: training step of the variables.
      name: how the caller calls `out`, for messages.

    Raises:
      UserError: something exists at the path, or it cannot be written.
    """
    with new_folder(out, name) as folder:
        exported = lower(task, model, variables)
        write_file(folder / MODEL_FILE, bytes(exported.serialize()))
        write_weights(folder / WEIGHTS_FILE, task.config, variables, step)
        about = {**_describe(task, exported), "step": step}
        write_file(folder / ABOUT_FILE, json.dumps(about, indent=2) + "\n")


def write_weights(
    path: Path, config: ConfigDict, variables: dict[str, Any], step: int, name: str = ""
) -> None:
    """Writes variables as a safetensors file that also holds the configuration of their run.

    Raises:
      UserError: the file cannot be written; the message begins with `name`, if any.
    """
    write_own(path, variables, {"step": step, "config": plain_config(config)}, name)


def image_shape(task: Task) -> tuple[int, int, int]:
    """Returns the shape of the images that the model of a task sees at a time, (H, W, C)."""
    return *task.view_size, task.config.in_channels


def lower(task: Task, model: nn.Module, variables: dict[str, Any]) -> export.Exported:
    """Lowers a model with the normalisation of its images, for any number of images.

    Args:
      task: task of the model.
      model: linen module.
      variables: variables for `model.apply`, or their shapes.

    Returns:
      The function of (name -> array, images (B, H, W, C) uint8) that gives `Task.outputs`, for
      `PLATFORMS`.
    """

    def predict(arrays, images):
        return task.outputs(model, variables_of(arrays), task.normalize(images))

    (batch,) = export.symbolic_shape(BATCH)
    images = jax.ShapeDtypeStruct((batch, *image_shape(task)), np.uint8)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    with _no_source_lines():
        return export.export(jax.jit(predict), platforms=PLATFORMS)(named_arrays(shapes), images)


@contextlib.contextmanager
def _no_source_lines() -> Iterator[None]:
    """Keeps the paths of this machine's files, which jax notes for debuggers, out of a model."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _describe(task: Task, exported: export.Exported) -> dict[str, Any]:
    """Returns the description of an export, for `ABOUT_FILE`."""

    def spec(x):
        shape = [side if isinstance(side, int) else str(side) for side in x.shape]
        return {"shape": shape, "dtype": x.dtype.name}

    (arrays, images), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return {
        "task": task.config.task,
        "model": task.config.model,
        "images": spec(images),
        "outputs": {name: spec(x) for name, x in outputs.items()},
        "class_names": list(task.class_names()),
        "parameters": sum(x.size for x in jax.tree.leaves(variables_of(arrays)["params"])),
        "platforms": list(exported.platforms),
        "versions": {name: version(name) for name in ("tokenvit_jax", "jax")},
    }
