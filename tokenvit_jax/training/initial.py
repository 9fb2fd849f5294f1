"""The run that a training starts from: its variables, and what its search for tokens found."""

import re
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError
from tokenvit_jax.models.reducers import reads_keep, searched_keep
from tokenvit_jax.training.checkpoint import Checkpoint, load_checkpoint
from tokenvit_jax.training.state import TrainState, averaged_variables

# Parameters that only some settings of a host have: one run may have them and the next one not.
_OPTIONAL = re.compile(r"/(soft_extract/retention|halve_map/conv/(kernel|bias)|attention/alpha)$")
# The head of a segmentation model, and what a classifier has behind that model's backbone.
_HEADS = re.compile(r"^\w+/(head|backbone/(\w*classifier|head_\w+))/")


def load_initial(config: ConfigDict) -> Checkpoint | None:
    """Loads the checkpoint that a configuration starts from; None: from random parameters.

    Args:
      config: reads `initial`.

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
    """Returns a configuration in which `token_reducer.keep`, if it is (), is what a search found.

    Args:
      config: reads `model_overrides.token_reducer` and `initial`.
      initial: of :func:`load_initial`.

    Raises:
      UserError: the run that training starts from was no search.
    """
    reducer = config.model_overrides.get("token_reducer")
    if not reducer or not reads_keep(reducer.to_dict()) or reducer.get("keep"):
        return config
    found = () if initial is None else searched_keep(initial.variables["params"])
    if not found:
        raise UserError(
            "config.model_overrides.token_reducer.keep=() is what a search has found, but "
            f"config.initial.workdir={config.initial.workdir!r} is none; valid: the workdir of a "
            "run with token_reducer.method='soft_extract', or a number for every block"
        )
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model_overrides.token_reducer.keep = found
    return config


def start_from(state: TrainState, initial: Checkpoint) -> TrainState:
    """Returns a state before the first step with the variables of another run.

    Parameters that only one of the runs has, because of its token reducer or its normalisation of
    queries and keys, stay as they are, or are left. So do the head and the classifier where the
    backbone of a segmentation model starts from a run of classification: with position embeddings
    of the same size, `model_overrides.position_size` of that run.

    Args:
      state: of `Parallel.init`.
      initial: of :func:`load_initial`.

    Raises:
      UserError: the run is of another model; all differences are named.
    """
    ours = flatten_dict({"params": state.params, **state.model_state}, sep="/")
    theirs, of_one = initial.variables, [_OPTIONAL]
    if "backbone" in state.params and "backbone" not in theirs["params"]:
        theirs = {collection: {"backbone": tree} for collection, tree in theirs.items()}
        of_one.append(_HEADS)
    theirs = flatten_dict(theirs, sep="/")
    wrong = []
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = (getattr(tree.get(name), "shape", "missing") for tree in (ours, theirs))
        may_lack = "missing" in (here, there) and any(rule.search(name) for rule in of_one)
        if here != there and not may_lack:
            wrong.append(f"{name} is {there} there, {here} here")
    if wrong:
        raise UserError(
            f"config.initial.workdir: {initial.path} is of another model; {len(wrong)} entries "
            f"differ: {'; '.join(wrong)}"
        )
    shared = ours.keys() & theirs.keys()
    put = lambda new, old: jax.device_put(np.asarray(new, old.dtype), old.sharding)  # noqa: E731
    ours |= {name: put(theirs[name], ours[name]) for name in shared}
    model_state = unflatten_dict(ours, sep="/")
    params = model_state.pop("params")
    ema = None if state.ema is None else averaged_variables(params, model_state)
    return state.replace(params=params, model_state=model_state, ema=ema)
