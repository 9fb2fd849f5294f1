"""Starts training from another run: from its variables and the token numbers its search found."""

from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError
from tokenvit_jax.models.backbone import backbone_of
from tokenvit_jax.models.reducers import reads_keep, searched_keep
from tokenvit_jax.training.checkpoint import Checkpoint, load_checkpoint
from tokenvit_jax.training.state import TrainState, averaged_variables


def load_initial(config: ConfigDict) -> Checkpoint | None:
    """Loads the checkpoint that training starts from; returns None for random parameters.

    Args:
      config: configuration; `initial` is read.

    Raises:
      UserError: there is no such run or checkpoint.
    """
    if not config.initial.workdir:
        return None
    workdir = Path(config.initial.workdir).expanduser()
    try:
        return load_checkpoint(workdir, str(config.initial.checkpoint))
    except UserError as error:
        raise UserError(f"config.initial.workdir={config.initial.workdir}: {error}") from error


def with_searched_keep(config: ConfigDict, initial: Checkpoint | None) -> ConfigDict:
    """Returns a configuration with the token numbers of a search in place of `keep=()`.

    Args:
      config: configuration; `model_overrides.token_reducer` and `initial` are read.
      initial: result of :func:`load_initial`.

    Raises:
      UserError: the run that training starts from was not a search.
    """
    reducer = config.model_overrides.get("token_reducer")
    if not reducer or not reads_keep(reducer.to_dict()) or reducer.get("keep"):
        return config
    found = () if initial is None else searched_keep(initial.variables["params"])
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


def start_from(state: TrainState, initial: Checkpoint, model: nn.Module) -> TrainState:
    """Returns a state before the first step with the variables of another run.

    Token reducers and the normalisation of queries and keys add parameters that either run may
    lack. If the other run lacks them, they keep their first values; if this one does, they are left
    out. The backbone of a model for dense tasks can start from a classifier, without the
    classifier's own layers; both position embeddings must have the same size
    (`model_overrides.position_size` of that run).

    Args:
      state: result of `Parallel.init`.
      initial: result of :func:`load_initial`.
      model: the model of the state.

    Raises:
      UserError: the run has another model; the message names all differences.
    """
    ours = {"params": state.params, **state.model_state}
    theirs, backbone = initial.variables, backbone_of(model)
    from_classifier = backbone is not model and "backbone" not in theirs["params"]
    if from_classifier:
        theirs = _without(theirs, backbone.head_modules)
        theirs = {name: {"backbone": tree} for name, tree in theirs.items()}

    def may_lack(name):
        is_head = from_classifier and name.split("/")[1] != "backbone"
        return is_head or name.endswith(backbone.optional_parameters)

    ours, theirs = (flatten_dict(tree, sep="/") for tree in (ours, theirs))
    wrong = []
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = (getattr(tree.get(name), "shape", "missing") for tree in (ours, theirs))
        if here != there and not ("missing" in (here, there) and may_lack(name)):
            wrong.append(f"{name} is {there} there, {here} here")
    if wrong:
        raise UserError(
            f"config.initial.workdir: {initial.path} has another model; {len(wrong)} entries "
            f"differ: {'; '.join(wrong)}"
        )
    shared = ours.keys() & theirs.keys()
    put = lambda new, old: jax.device_put(np.asarray(new, old.dtype), old.sharding)  # noqa: E731
    ours |= {name: put(theirs[name], ours[name]) for name in shared}
    model_state = unflatten_dict(ours, sep="/")
    params = model_state.pop("params")
    ema = None if state.ema is None else averaged_variables(params, model_state)
    return state.replace(params=params, model_state=model_state, ema=ema)


def _without(variables, modules):
    """Returns the variables of a classifier without some of its submodules."""
    return {
        collection: {name: inner for name, inner in tree.items() if name not in modules}
        for collection, tree in variables.items()
    }
