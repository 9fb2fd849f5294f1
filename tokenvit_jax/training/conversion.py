"""Converts published weights to a run, and a run to a file of published weights.

This module is not in `weights/`, which knows neither workdirs, configurations, checkpoints nor
tasks.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tokenvit_jax import output
from tokenvit_jax.data import dataset_info
from tokenvit_jax.errors import UserError
from tokenvit_jax.models import create_model
from tokenvit_jax.tasks import check_values, create_task, default_config
from tokenvit_jax.training.new_run import check_new, write_run
from tokenvit_jax.training.run import load_run
from tokenvit_jax.training.workdir import read_config
from tokenvit_jax.weights import (
    Arrays,
    Layout,
    export_variables,
    find_layout,
    import_variables,
    layouts_of,
    read_arrays,
    recognise_layout,
    similar_models,
)

AUTO = "auto"
# ImageNet is the dataset of most published classifiers; other numbers of classes have no names.
_IMAGENET = "imagenet2012"
_OTHER_FORMATS = (".npz", ".npy", ".pth", ".pt", ".bin", ".pkl", ".ckpt", ".onnx")
# Settings of a model that --override cannot change, and where they come from.
_SET_ELSEWHERE = {
    "num_classes": "the file tells it; --num_classes=0 leaves the classifier out",
    "dtype": "config.dtype of train and evaluate sets it",
    "axis_name": "config.parallel of train sets it",
}


class Choices(NamedTuple):
    """What the user says about a file of weights; None: what the file or its layout says.

    Attributes:
      dataset: name of a dataset with the names of the classes.
      data_dir: folder of this dataset, if it is not built in.
      num_classes: number of classes of the file; 0: leave the classifier out.
      model_overrides: settings of the model.
      normalization: pixel normalisation, a key of NORMALIZATIONS.
      eval_crop: side of the centre crop over the shorter side, in evaluation.
      eval_interpolation: how images are resized in evaluation.
      ema: whether to read the moving average of the weights.
    """

    dataset: str | None = None
    data_dir: str | None = None
    num_classes: int | None = None
    model_overrides: Mapping[str, Any] | None = None
    normalization: str | None = None
    eval_crop: float | None = None
    eval_interpolation: str | None = None
    ema: bool = False


def import_file(
    source: Path, out: Path, name: str, layout: str = AUTO, choices: Choices | None = None
) -> list[str]:
    """Writes a run at step 0 with the weights of a file.

    Args:
      source: file of weights that :func:`tokenvit_jax.weights.read_arrays` reads.
      out: folder of the new run.
      name: name of the model.
      layout: a key of LAYOUTS; "auto": the names of the arrays decide.
      choices: what the user says; None: nothing.

    Returns:
      Lines that say what the run is, and what the file does not determine.

    Raises:
      UserError: the file cannot be read or does not fit the model, the layout does not cover the
        model or is for another task than the dataset, or the folder already holds a run.
    """
    choices = choices or Choices()
    found = find_layout(layout, name) if layout != AUTO else None
    layouts_of(name)  # raises UserError for a model without layouts
    for key in choices.model_overrides or {}:
        if key in _SET_ELSEWHERE:
            raise UserError(f"--override={key} is not valid: {_SET_ELSEWHERE[key]}")
    check_new(out)
    published = read_arrays(source, choices.ema)
    with _about(source, published, name, layout):
        layout = recognise_layout(published, name) if found is None else layout
        found = find_layout(layout, name)
        arrays = found.prepare(published)
        told = found.model_overrides(arrays)
        create_model(name, **told)
    overrides = _with_choices(name, told, choices.model_overrides or {})
    config = default_config(found.task)
    config.model, config.model_overrides = name, overrides
    lines = _set_classes(config, found, arrays, layout, choices)
    config.data.normalization = found.normalization
    config.update(found.config_entries(arrays))
    model = create_task(config).make_model()
    lines += _set_images(config, found, arrays, model, choices)
    check_values(config)
    with _about(source, published, name, layout):
        variables = import_variables(arrays, model, found)
    write_run(out, config, variables)
    classes = f"{len(config.data.classes)} classes" if config.data.classes else "no classifier"
    data = config.dataset if config.dataset != "none" else classes
    return [f"{name}, layout {layout}, {data}, image_size {config.image_size}", *lines]


@contextlib.contextmanager
def _about(source: Path, arrays: Arrays, model: str, layout: str) -> Iterator[None]:
    """Adds to error messages about arrays the name of their file, and what they look like."""
    try:
        yield
    except UserError as error:
        hint = _look(arrays, model, layout)
        raise UserError(f"--source={source}: {error}{hint}") from error


def _look(arrays: Arrays, model: str, layout: str) -> str:
    """Returns the model or layout that arrays look like, if it is not the given one."""
    similar = similar_models(arrays)
    if similar and model not in similar:
        return f"; the file looks like --model={' or '.join(similar)}"
    with contextlib.suppress(UserError):
        found = recognise_layout(arrays, model)
        if layout not in (AUTO, found):
            return f"; the file looks like --layout={found}"
    return ""


def _with_choices(name: str, told: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that a file tells, with those that the user chose in their place.

    Raises:
      UserError: a choice is not valid.
    """
    overrides = dict(told) | dict(chosen)
    try:
        create_model(name, **overrides)
    except UserError as error:
        raise UserError(f"--override: {error}") from error
    return overrides


def _set_classes(
    config: ConfigDict, layout: Layout, arrays: Any, layout_name: str, choices: Choices
) -> list[str]:
    """Sets dataset and classes of a run, and returns lines about them."""
    found = layout.num_classes(arrays)
    if choices.num_classes not in (None, 0, found):
        valid = f"{found}, or 0 to leave it out" if found else "0"
        has = f"{found} classes" if found else "no classifier"
        raise UserError(f"--num_classes={choices.num_classes}: the file has {has}; valid: {valid}")
    count = 0 if choices.num_classes == 0 else found
    name = choices.dataset
    if name is None and count == 1000 and layout.task == "classification":
        name = _IMAGENET
    if name is None and choices.data_dir is not None:
        raise UserError(f"--data_dir={choices.data_dir} needs --dataset, whose classes it names")
    lines = []
    if name is not None:
        config.dataset = name
        if choices.data_dir is not None:
            config.data.data_dir = choices.data_dir
        dataset_info(config)  # raises UserError for an unknown name
        try:
            info = create_task(config).info
        except UserError as error:
            raise UserError(f"--layout={layout_name} is for {layout.task}: {error}") from error
        if info.num_classes == count:
            return lines
        has = f"{count} classes" if count else "no classifier"
        lines = [
            f"--dataset={name} has {info.num_classes} classes, the run {has}: it has no names of "
            "classes"
        ]
    config.dataset = "none"
    config.data.classes = tuple(f"class {label}" for label in range(count))
    return lines


def _set_images(
    config: ConfigDict, layout: Layout, arrays: Any, model: Any, choices: Choices
) -> list[str]:
    """Sets how images are prepared; returns a line about what the file does not determine."""
    config.image_size = layout.image_size(model, arrays)
    keys = ["normalization"]
    if layout.eval_crop is not None:
        config.data.eval_crop = layout.eval_crop(config.image_size, arrays)
        keys += ["eval_crop", "eval_interpolation"]
    for key in ("eval_crop", "eval_interpolation"):
        if key not in keys and getattr(choices, key) is not None:
            raise UserError(f"--{key} has no effect: {layout.task} shows the whole image")
    for key in keys:
        if (value := getattr(choices, key)) is not None:
            config.data[key] = value
    overrides = choices.model_overrides or {}
    assumed = {
        f"--override={key}": getattr(model.settings, key)
        for key in layout.assumed(arrays)
        if key not in overrides
    }
    assumed |= {f"--{key}": config.data[key] for key in keys if getattr(choices, key) is None}
    if not assumed:
        return []
    text = " ".join(f"{key}={value}" for key, value in assumed.items())
    return [f"not in the file, taken from the published models: {text}"]


def export_run(source: Path, out: Path, layout: str, checkpoint: str) -> list[str]:
    """Writes the weights of a run as a safetensors file, and returns a line about it.

    Args:
      source: folder of the run.
      out: path of the new file, in a folder that is created if necessary.
      layout: a key of LAYOUTS; "auto": the first one that covers model and task.
      checkpoint: "last", "best" or a step.

    Raises:
      UserError: there is no such checkpoint, the layout does not cover the model or is for
        another task, or the file exists already, has the suffix of another format or cannot be
        written.
    """
    config = read_config(source)
    if layout == AUTO:
        layout = layouts_of(config.model, config.task)[0]
    found = find_layout(layout, config.model)
    if config.task != found.task:
        raise UserError(
            f"--layout={layout} is for {found.task}, --source={source} is a run for {config.task}"
        )
    if out.is_dir():
        raise UserError(f"--out={out} is a folder; valid: the path of a file")
    check_new_weights(out)
    run = load_run(source, checkpoint, config=config)
    try:
        arrays = export_variables(run.variables, run.model, found)
    except LookupError as error:
        others = [name for name in layouts_of(config.model, config.task) if name != layout]
        raise UserError(
            f"--layout={layout} cannot hold --source={source}: {error}; others of {config.model}: "
            f"{', '.join([*others, 'own'])}"
        ) from error
    with output.new_file(out, "--out", (SafetensorError,)) as temporary:
        save_file(arrays, temporary)
    return [f"{config.model}, layout {layout}"]


def check_new_weights(out: Path) -> None:
    """Raises UserError if a file exists, or its suffix promises another format than safetensors."""
    if out.suffix in _OTHER_FORMATS:
        raise UserError(f"--out={out} is not valid; valid: NAME.safetensors, the only format")
    output.check_new_file(out, "--out")
