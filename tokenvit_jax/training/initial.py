"""Starts training from another run: from its variables and the token numbers its search found."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError, blame
from tokenvit_jax.models.backbone import BACKBONE, backbone_of, variable_shapes
from tokenvit_jax.models.reducers import reads_keep, searched_keep
from tokenvit_jax.tasks import Task, create_task
from tokenvit_jax.training.checkpoint import load_checkpoint
from tokenvit_jax.training.state import TrainState, averaged_variables
from tokenvit_jax.training.workdir import read_config
from tokenvit_jax.weights.channels import adapt_channels

RGB = 3  # input channels that a first layer can be adapted from
# Settings of a training or a method, which say nothing about the network of another run.
_OWN_SETTINGS = {
    "num_classes", "in_channels", "drop_path", "dropout", "remat", "dtype", "axis_name",
    "batch_norm", "init_std", "token_reducer", "expedite", "released_mask",
}  # fmt: skip
_RESIZED_SETTINGS = {"position_size", "window_size"}


class Initial(NamedTuple):
    """The run that training starts from.

    Attributes:
      path: folder of its checkpoint.
      variables: its variables, as numpy arrays.
      task: its task; None: a model with the same settings and classes as ours.
    """

    path: Path
    variables: Mapping[str, Any]
    task: Task | None = None


def load_initial(config: ConfigDict) -> Initial | None:
    """Loads the run that training starts from; returns None for random parameters.

    Args:
      config: configuration; `initial` is read.

    Raises:
      UserError: there is no such run or checkpoint.
    """
    if not config.initial.workdir:
        return None
    workdir = Path(os.path.expanduser(config.initial.workdir))
    try:
        found = load_checkpoint(workdir, str(config.initial.checkpoint))
        return Initial(found.path, found.variables, create_task(read_config(workdir)))
    except UserError as error:
        entry = f"config.initial.workdir={config.initial.workdir}"
        raise blame(error, f"--workdir={workdir}", entry) from error


def with_initial_settings(config: ConfigDict, source: ConfigDict | None) -> ConfigDict:
    """Returns a configuration with the settings of the network that it leaves to another run.

    Args:
      config: configuration; `model_overrides` that it names stay.
      source: configuration of the run that training starts from, or of the run that goes on; only
        one of the same model is used. None: there is no such run.
    """
    if not config.initial.workdir or source is None or source.model != config.model:
        return config
    named, found = config.model_overrides, source.model_overrides.to_dict()
    left = {key: found[key] for key in found if key not in named and key not in _OWN_SETTINGS}
    if not left:
        return config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model_overrides.update(left)
    return config


def with_searched_keep(
    config: ConfigDict, initial: Initial | None, resumed: ConfigDict | None = None
) -> ConfigDict:
    """Returns a configuration with the token numbers of a search in place of `keep=()`.

    Args:
      config: configuration; `model_overrides.token_reducer` and `initial` are read.
      initial: result of :func:`load_initial`.
      resumed: configuration of the run that goes on, which has the numbers; None: a new run.

    Raises:
      UserError: the run that training starts from was not a search.
    """
    reducer = _reducer(config)
    if not reducer or not reads_keep(reducer) or reducer.get("keep"):
        return config
    found = ()
    if initial is not None:
        found = searched_keep(initial.variables["params"])
    elif resumed is not None:
        found = _reducer(resumed).get("keep")
    if not found:
        raise UserError(
            "config.model_overrides.token_reducer.keep=() takes the numbers that a search found, "
            f"but config.initial.workdir={config.initial.workdir!r} was no search; valid: the "
            "workdir of a run with token_reducer.method='soft_extract', or a number for every block"
        )
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model_overrides.token_reducer.keep = found
    return config


def _reducer(config: ConfigDict) -> dict[str, Any]:
    """Returns the settings of the token reducer; empty if there is none.

    What is no group of settings is refused when the model is made.
    """
    reducer = config.model_overrides.get("token_reducer")
    return reducer.to_dict() if isinstance(reducer, ConfigDict) else {}


def start_from(state: TrainState, initial: Initial, task: Task) -> tuple[TrainState, list[str]]:
    """Returns a state before the first step with the variables of another run.

    What depends on the classes stays new if the run has other classes. A run of another task gives
    its backbone. Tables of positions are resized, and a first layer for RGB images is adapted to
    other numbers of channels. Token reducers and the normalisation of queries and keys add
    parameters that either run may lack: those that the other run lacks stay new.

    Args:
      state: result of `Parallel.init`.
      initial: result of :func:`load_initial`.
      task: the task of the state.

    Returns:
      The state, and lines of text that say what is not taken as it is.

    Raises:
      UserError: the run has another model; the message names all differences.
    """
    ours = flatten_dict({"params": state.params, **state.model_state}, sep="/")
    theirs, notes = fit_variables(initial, ours, task)
    put = lambda new, old: jax.device_put(np.asarray(new, old.dtype), old.sharding)  # noqa: E731
    ours |= {name: put(value, ours[name]) for name, value in theirs.items()}
    model_state = unflatten_dict(ours, sep="/")
    params = model_state.pop("params")
    ema = None if state.ema is None else averaged_variables(params, model_state)
    return state.replace(params=params, model_state=model_state, ema=ema), notes


def fit_variables(
    initial: Initial, ours: Mapping[str, Any], task: Task
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the variables of a run that another model can take, and notes on the others.

    Args:
      initial: the run.
      ours: the variables of the model by path, such as "params/norm/bias"; only shapes are read.
      task: the task of the model.

    Returns:
      Path -> array with the shape of ours, and lines of text.

    Raises:
      UserError: the run has another model; the message names all differences.
    """
    model, theirs, notes = task.make_model(), initial.variables, []
    backbone, there = backbone_of(model), None
    if initial.task is not None:
        there = backbone_of(initial.task.make_model())
        notes += _compare(initial, there, task, backbone)
    other_task = _wraps(theirs) != (backbone is not model)
    if other_task:
        theirs = _only_backbone(theirs, backbone)
        notes.append(f"{initial.path} gives its backbone; the head of this model is new")
    theirs = flatten_dict(dict(theirs), sep="/")

    may_lack = {
        name for name in ours.keys() | theirs.keys() if name.endswith(backbone.optional_parameters)
    }
    if other_task:
        may_lack |= {name for name in ours if model.is_head(_path(name))}
        models = [model] if initial.task is None else [model, initial.task.make_model()]
        may_lack |= _unread(ours.keys() | theirs.keys(), models)
    if initial.task is not None and not initial.task.info.same_classes(task.info):
        new = _class_parameters(task)
        theirs = {name: value for name, value in theirs.items() if name not in new}
        may_lack |= new
        if not (task.info.num_classes and initial.task.info.num_classes):  # one has no classifier
            may_lack |= {name for name in ours.keys() | theirs.keys() if model.is_head(_path(name))}
        if not other_task:
            notes.append(_other_classes(initial, task, new & ours.keys()))
    theirs, changed = _resize(initial, theirs, there, ours, model)
    _check(initial, theirs, ours, may_lack)
    return {name: theirs[name] for name in ours.keys() & theirs.keys()}, notes + changed


def _path(name):
    """Returns the path of a variable without its collection."""
    return name.partition("/")[2]


def _unread(names, models):
    """Returns the names of the variables of a backbone that one of some models does not use."""
    modules = {name for model in models for name in getattr(model, "unread_modules", ())}
    own = {name: _path(name).removeprefix(f"{BACKBONE}/").split("/")[0] for name in names}
    return {name for name in names if own[name] in modules}


def _wraps(variables):
    return BACKBONE in variables["params"]


def _only_backbone(theirs, backbone):
    """Returns the variables of a classifier's backbone as a wrapped one, or the other way round."""
    if _wraps(theirs):
        return {name: tree[BACKBONE] for name, tree in theirs.items() if BACKBONE in tree}
    return {
        name: {BACKBONE: {key: x for key, x in tree.items() if not backbone.is_head(key)}}
        for name, tree in theirs.items()
    }


def _compare(initial, other, task, backbone):
    """Returns a note on the settings that differ; raises UserError for another family."""
    if type(other) is not type(backbone):
        raise UserError(
            f"config.initial.workdir: {initial.path} is a run of a {type(other).__name__}, this "
            f"model is a {type(backbone).__name__}; valid: a run of the same family"
        )
    names = {field.name for field in dataclasses.fields(backbone.settings)} - _OWN_SETTINGS
    names -= _RESIZED_SETTINGS  # they have a line of their own
    found = [
        f"{name} is {there} there, {here} here"
        for name in sorted(names)
        if (there := getattr(other.settings, name)) != (here := getattr(backbone.settings, name))
    ]
    there, here = (x.config.data.normalization for x in (initial.task, task))
    if there != here:
        found.append(f"data.normalization is {there} there, {here} here")
    return [f"{initial.path} has other settings: {'; '.join(found)}"] if found else []


def _class_parameters(task):
    """Returns the names of the variables whose shapes depend on the number of classes."""
    shapes = []
    for more in (1, 2):  # not the present number, which may be 0
        info = dataclasses.replace(task.info, num_classes=task.info.num_classes + more)
        shapes.append(_shapes(dataclasses.replace(task, info=info)))
    return {name for name, shape in shapes[0].items() if shape != shapes[1][name]}


def _shapes(task):
    images = jax.ShapeDtypeStruct((1, *task.input_shape), "float32")
    found = variable_shapes(task.make_model(), images)
    return {name: leaf.shape for name, leaf in flatten_dict(found, sep="/").items()}


def _other_classes(initial, task, new):
    layers = sorted({re.sub("/(kernel|bias|scale)$", "", _path(name)) for name in new})
    left = f"{', '.join(layers)} (new)" if layers else "the classifier"
    there, here = initial.task.info, task.info
    return (
        f"{initial.path} has other classes ({there.num_classes} of {there.name}, here "
        f"{here.num_classes} of {here.name}): all is taken but {left}"
    )


def _resize(initial, theirs, other, ours, model):
    """Fits tables of positions and the first layer; returns the variables and notes.

    Args:
      initial: the run, for the notes.
      theirs: its variables by path.
      other: its backbone, or None.
      ours: the variables of the model by path.
      model: the model.
    """
    backbone, wraps = backbone_of(model), backbone_of(model) is not model
    theirs, tables, layers = dict(theirs), {}, []
    for name in theirs.keys() & ours.keys():
        value, path = theirs[name], _path(name)
        there, here = value.shape, ours[name].shape
        if model.is_head(path) or not name.startswith("params/"):
            continue
        if len(there) == 4 and there[2] == RGB and here == (*there[:2], here[2], there[3]):
            if here[2] != RGB:
                theirs[name] = adapt_channels(value, here[2])
                layers.append(f"{path} of {initial.path} is adapted from 3 to {here[2]} channels")
        elif other is not None:
            own = path.removeprefix(f"{BACKBONE}/") if wraps else path
            fitted = backbone.fit_parameter(own, value, other)
            if fitted is not value:
                theirs[name] = fitted
                change = (path.rpartition("/")[2], there, fitted.shape)
                tables[change] = tables.get(change, 0) + 1
    resized = [
        f"{name} {there} to {here}" + (f" ({count} times)" if count > 1 else "")
        for (name, there, here), count in sorted(tables.items())
    ]
    if resized:
        layers.append(f"tables of {initial.path} are resized: {', '.join(resized)}")
    return theirs, layers


def _check(initial, theirs, ours, may_lack):
    """Raises UserError unless the variables have the same names and shapes."""
    wrong = []
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = (getattr(tree.get(name), "shape", "missing") for tree in (ours, theirs))
        if here != there and not ("missing" in (here, there) and name in may_lack):
            wrong.append(f"{name} is {there} there, {here} here")
    if wrong:
        raise UserError(
            f"config.initial.workdir: {initial.path} has another model; {len(wrong)} entries "
            f"differ: {'; '.join(wrong)}"
        )
