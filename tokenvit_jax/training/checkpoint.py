"""Checkpoints of a run in `WORKDIR/checkpoints/STEP`, written by orbax in the background.

A checkpoint has four items: "model" (parameters, averages, other collections), "optimizer",
"progress" (the state of the data iterator, in JSON) and "digests" (of the other three, in JSON). It
gets its name only when it is complete. The file `metrics/metrics` is empty JSON until the state has
been evaluated. A checkpoint whose contents have other digests counts as one that cannot be read;
one without digests is from an earlier version of this package and is not verified.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn

from tokenvit_jax.errors import UserError
from tokenvit_jax.memory import release_pages
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.output import write_file
from tokenvit_jax.training.digests import array_digests, describe, json_digest, sealed, unsealed
from tokenvit_jax.training.processes import everywhere, is_main_process, on_main_process
from tokenvit_jax.training.quiet_orbax import brief, no_counters, patient_loops
from tokenvit_jax.training.scores import SCORE, best_step, metrics_file, score_of
from tokenvit_jax.training.state import TrainState, eval_variables
from tokenvit_jax.training.workdir import check_version

FOLDER = "checkpoints"
_DELETED = ".deleted"  # ends the name of a checkpoint that is being deleted

# What paths must not contain: tensorstore reads "/" for a backslash, orbax "gs://" for "gs:/", and
# when orbax puts the files of a checkpoint together it takes the path for a pattern.
_NEVER_READ = ("\\", "gs:/")
_NEVER_WRITTEN = ("[", "*", "?")


def saved_steps(workdir: Path) -> list[int]:
    """Returns the steps that have a complete checkpoint in a workdir, in order."""
    names = (path.name for path in (workdir / FOLDER).glob("*") if path.is_dir())
    return sorted(int(name) for name in names if _is_step(name))


def _is_step(name: str) -> bool:
    """Returns whether a folder has the name of a checkpoint; int() alone reads much more."""
    return name.isascii() and name.isdigit() and str(int(name)) == name


class Checkpoints:
    """Saves and restores the state of a run; every process calls the same methods.

    This is a context manager: leaving it waits until everything is written.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep_last: int,
        keep_best: int,
        score: Callable[[dict[str, float]], float],
    ):
        """Opens the checkpoints of a workdir; removes unfinished ones that a killed run left.

        Args:
          workdir: folder of the run.
          keep_last: number of latest checkpoints to keep.
          keep_best: number of checkpoints with the highest scores to keep.
          score: maps the metrics of an evaluation to a number, such as `Task.score`.

        Raises:
          UserError: the folder cannot be read or written.
        """
        self._workdir = workdir.absolute()
        self._folder = self._workdir / FOLDER
        _check_path(self._folder, (*_NEVER_READ, *_NEVER_WRITTEN))
        self._keep_last, self._keep_best, self._score_of = keep_last, keep_best, score
        leaves = _leaf_handlers()
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                model=ocp.PyTreeCheckpointHandler(type_handler_registry=leaves),
                optimizer=ocp.PyTreeCheckpointHandler(type_handler_registry=leaves),
                progress=ocp.JsonCheckpointHandler(),
                digests=ocp.JsonCheckpointHandler(),
                metrics=ocp.JsonCheckpointHandler("metrics"),
            )
        )
        self._patches = contextlib.ExitStack()
        self._writing = self._folder
        with self._write_errors():
            on_main_process(self._open_folder)

    def __enter__(self) -> "Checkpoints":
        self._patches.enter_context(patient_loops())
        self._patches.enter_context(no_counters())
        return self

    def __exit__(self, *_: Any) -> None:
        with self._patches, self._write_errors():
            self._checkpointer.close()
            self._prune()

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, in order."""
        return saved_steps(self._workdir)

    def save(self, step: int, state: TrainState, progress: dict) -> None:
        """Starts to save the state after a step; the state may be consumed afterwards.

        Args:
          step: number of steps done.
          state: result of `Parallel.to_global`.
          progress: JSON object, equal in all processes.

        Raises:
          UserError: this checkpoint or the previous one cannot be written.
        """
        model = _model_item(state)
        digests = {
            "model": _described_digests(model),
            "optimizer": _described_digests(state.opt_state),
            "progress": json_digest(progress),
        }
        items = ocp.args.Composite(
            model=ocp.args.PyTreeSave(model),
            optimizer=ocp.args.PyTreeSave(state.opt_state),
            progress=ocp.args.JsonSave(progress),
            digests=ocp.args.JsonSave(sealed(digests)),
            metrics=ocp.args.JsonSave(sealed({})),
        )
        self.wait()
        path = self._writing = self._folder / str(step)
        with self._write_errors():
            self._prune()
            if path.exists():  # it was not among the checkpoints when the run was resumed
                self._set_aside([step])
            self._checkpointer.save(path, args=items)

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is complete."""
        with self._write_errors():
            self._checkpointer.wait_until_finished()
        release_pages()

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Adds the metrics of its evaluation to the checkpoint of a step, all at once.

        Args:
          step: a step that was saved.
          metrics: metrics of the evaluation of its state.

        Raises:
          UserError: the checkpoint or its metrics cannot be written.
        """
        self.wait()
        path = self._folder / str(step)

        def write() -> None:
            if not path.is_dir():
                logging.warning("checkpoint %s was deleted: its metrics are not kept", path)
                return
            file = metrics_file(path)
            scored = {**metrics, SCORE: self._score_of(metrics)}
            write_file(file, json.dumps(sealed(scored)))

        self._writing = metrics_file(path)
        with self._write_errors():
            on_main_process(write)
            self._prune()

    def restore(self, like: TrainState) -> tuple[TrainState, dict] | None:
        """Restores the latest readable checkpoint; sets later ones aside.

        Args:
          like: tree with the shapes, types and shardings of the state.

        Returns:
          The state and its progress; None if there is no checkpoint.

        Raises:
          UserError: the checkpoint belongs to another model or optimizer, there is not enough
            memory for it, or none of several can be read.
        """
        unreadable = []
        for step in reversed(self.steps()):
            path = self._folder / str(step)
            items, error = _attempt(self._read_step, step, like)
            # Digests of arrays that several processes hold are computed by all of them.
            if everywhere(error is None):
                _, error = _attempt(_verify, items)
                if everywhere(error is None):
                    self._set_aside(unreadable)
                    state = like.replace(opt_state=items["optimizer"], **items["model"])
                    return state, items["progress"]
            reason = brief(error) if error else "another process could not read it"
            if not everywhere(not _lacks_memory(error)):
                raise UserError(f"there is no memory, or no free file, to read {path}: {reason}")
            logging.warning("checkpoint %s cannot be read: %s", path, reason)
            unreadable.append(step)
        if unreadable:
            raise UserError(f"none of the checkpoints {unreadable} in {self._folder} can be read")
        return None

    def _read_step(self, step: int, like: TrainState) -> dict[str, Any]:
        """Returns the items of a checkpoint; "digests" are None in one of an earlier version."""
        path = self._folder / str(step)
        trees = {"model": _model_item(like), "optimizer": like.opt_state}
        digests = _read_digests(path)
        for name, tree in trees.items():
            found = digests[name] if digests else _read_metadata(path / name)
            _check_same(_types(found), describe(tree), path, name)
        args = {
            name: ocp.args.PyTreeRestore(
                tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
            )
            for name, tree in trees.items()
        }
        args["progress"] = ocp.args.JsonRestore()
        with patient_loops():
            items = self._checkpointer.restore(path, args=ocp.args.Composite(**args))
        return {**items, "digests": digests}

    def _open_folder(self) -> None:
        """Creates the folder, and removes what a killed run left in it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._folder.iterdir()):
            name, _, end = path.name.partition(".")
            if _is_step(name) and end.startswith("orbax-checkpoint-tmp"):
                logging.warning("checkpoint %s was not finished and is removed", path)
                shutil.rmtree(path, ignore_errors=True)
            elif _is_step(name) and f".{end}".startswith(_DELETED):
                shutil.rmtree(path, ignore_errors=True)
        for step in self.steps():
            try:
                score_of(self._folder / str(step))
            except ValueError as error:
                logging.warning("%s; the checkpoint is kept, whatever its score was", error)

    def _prune(self) -> None:
        """Deletes the checkpoints that are neither among the last nor among the best.

        One with unreadable metrics stays: it may be the best.
        """
        if not is_main_process():
            return
        steps = self.steps()
        kept, scored = set(steps[-max(self._keep_last, 1) :]), []
        for step in steps:
            try:
                scored.append((score_of(self._folder / str(step)), step))
            except ValueError:
                kept.add(step)
        scored = sorted((score, step) for score, step in scored if score is not None)
        kept |= {step for _, step in scored[max(len(scored) - self._keep_best, 0) :]}
        for step in set(steps) - kept:
            # First renamed: a half deleted checkpoint must not have the name of a whole one.
            path = self._folder / str(step)
            deleted = _unused(path.with_name(path.name + _DELETED))
            try:
                path.rename(deleted)
            except OSError as error:  # such as: somebody else deleted it
                logging.warning("checkpoint %s cannot be deleted: %s", path, error.strerror)
            shutil.rmtree(deleted, ignore_errors=True)  # the rest when the run is opened again

    def _set_aside(self, steps: list[int]) -> None:
        """Renames unreadable checkpoints, so that the run can save these steps again."""

        def rename() -> None:
            for step in steps:
                path = self._folder / str(step)
                aside = _unused(self._folder / f"unreadable-{step}")
                logging.warning("checkpoint %s is renamed to %s", path, aside.name)
                path.rename(aside)

        on_main_process(rename)

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:  # it names the file
            raise
        except Exception as error:  # orbax and its storage raise many types
            whole = ", ".join(map(str, self.steps())) or "none"
            raise UserError(
                f"checkpoint {self._writing} cannot be written: {brief(error)}; "
                f"complete checkpoints: {whole}"
            ) from error


def _check_path(path: Path, refused: Sequence[str]) -> None:
    """Raises UserError if the storage of checkpoints takes a path for another one.

    It would write there, or say that all is saved and write nothing that can be read.
    """
    if found := [part for part in refused if part in str(path)]:
        raise UserError(
            f"{path} cannot hold checkpoints, because of {found[0]}; valid: a path without "
            f"{' '.join(refused)}"
        )
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path} cannot hold checkpoints, because its name is not in UTF-8; valid: another "
            "path, or with LC_ALL=C.UTF-8 if the name is right there"
        ) from error


class Checkpoint(NamedTuple):
    """A checkpoint for inference.

    Attributes:
      step: its training step.
      path: its folder.
      variables: arguments of `model.apply`, with averaged parameters if the run kept them.
    """

    step: int
    path: Path
    variables: dict[str, Any]


def load_checkpoint(workdir: Path, which: str = "last") -> Checkpoint:
    """Reads a checkpoint for inference, as numpy arrays.

    Args:
      workdir: folder of the run.
      which: "last", "best" (best score) or a step.

    Raises:
      UserError: there is no such checkpoint, it cannot be read, or an earlier version of this
        package wrote it.
    """
    check_version(workdir)
    folder = workdir.absolute() / FOLDER
    _check_path(folder, _NEVER_READ)
    steps = saved_steps(workdir)
    if not steps:
        raise UserError(f"--workdir={workdir} holds no checkpoints")
    listed = ", ".join(map(str, steps))
    if which not in ("last", "best", *map(str, steps)):
        raise UserError(f"no checkpoint {which!r} in {folder}; valid: last, best, {listed}")
    if which == "best":
        step = best_step(folder, steps)
    else:
        step = steps[-1] if which == "last" else int(which)
    path = folder / str(step)
    try:
        with patient_loops():
            item = _read_model(path)
        variables = {k: item[k] for k in ("params", "model_state", "ema") if k in item}
    except Exception as error:  # orbax raises many types on damaged files
        raise UserError(
            f"checkpoint {path} cannot be read: {brief(error)}; there are: {listed}"
        ) from error
    return Checkpoint(step, path, eval_variables(**variables))


def load_variables(
    model: nn.Module, input_shape: tuple[int, int, int], workdir: Path, which: str = "last"
) -> Checkpoint:
    """Reads a checkpoint like :func:`load_checkpoint`, and checks that it fits this model.

    Args:
      model: linen module, called as `model(images, train=False)`.
      input_shape: shape of the images, (H, W, C).
      workdir: folder of the run.
      which: "last", "best" (best score) or a step.

    Raises:
      UserError: there is no such checkpoint, it cannot be read, or it belongs to another model.
    """
    loaded = load_checkpoint(workdir, which)
    images = jax.ShapeDtypeStruct((1, *input_shape), "float32")
    check_same_variables(loaded.variables, variable_shapes(model, images), loaded.path)
    return loaded


def check_same_variables(found: Any, expected: Any, path: Path) -> None:
    """Raises UserError unless two trees have the same names, shapes and types.

    Args:
      found: variables in the checkpoint.
      expected: variables that the model needs.
      path: folder of the checkpoint, for the message.
    """
    _check_same(describe(found), describe(expected), path, "model")


def _check_same(found: dict[str, str], expected: dict[str, str], path: Path, kind: str) -> None:
    """Raises UserError unless two descriptions of a "model" or an "optimizer" are equal."""
    differences = [
        f"{name} is {found.get(name, 'missing')} there, {expected.get(name, 'missing')} here"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if not differences:
        return
    raise UserError(
        f"checkpoint {path} belongs to another {kind}{_cause(found, expected, kind)}; "
        f"{len(differences)} entries differ: " + "; ".join(differences[:3])
    )


def _cause(found: dict[str, str], expected: dict[str, str], kind: str) -> str:
    """Returns the entry of the configuration that made the difference, if it is known."""
    if kind == "optimizer":
        return " (config.optimizer)"
    averages = {name for name in found | expected if name.startswith("ema/")}
    if {k: v for k, v in found.items() if k not in averages} != {
        k: v for k, v in expected.items() if k not in averages
    }:
        return ""
    return f" (config.ema_decay was {'above 0' if averages & found.keys() else '0'} there)"


def _model_item(state: TrainState) -> dict[str, Any]:
    """Returns the state without the optimizer's state, which inference does not read."""
    fields = {name: getattr(state, name) for name in ("params", "model_state", "step", "skipped")}
    return fields if state.ema is None else {**fields, "ema": state.ema}


def _described_digests(tree: Any) -> dict[str, list[str]]:
    """Returns the type and shape of every array of a tree, and its digest."""
    digests = array_digests(tree)
    return {name: [kind, digests[name]] for name, kind in describe(tree).items()}


def _types(described: dict[str, list[str]]) -> dict[str, str]:
    return {name: kind for name, (kind, *_) in described.items()}


def _attempt(function: Callable[..., Any], *args: Any) -> tuple[Any, Exception | None]:
    """Returns the result or the error of a function, for all processes to agree on.

    Raises:
      UserError: the function raised it.
    """
    try:
        return function(*args), None
    except UserError:
        raise
    except Exception as error:  # orbax raises many types on damaged files
        return None, error


def _lacks_memory(error: Exception | None) -> bool:
    """Returns whether a checkpoint may be whole although it could not be read."""
    if error is None:
        return False
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in brief(error)


def _verify(items: dict[str, Any]) -> None:
    """Raises ValueError unless the items are what was saved."""
    saved = items["digests"]
    if saved is None:
        return
    # All digests first: with several processes, all must compute them.
    found = {name: _described_digests(items[name]) for name in ("model", "optimizer")}
    for name, digests in found.items():
        _check_saved(digests, saved[name])
    if json_digest(items["progress"]) != saved["progress"]:
        raise ValueError("the progress of its data is not what was saved")


def _check_saved(found: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raises ValueError unless two descriptions are equal."""
    differ = sorted(k for k in found.keys() | saved.keys() if found.get(k) != saved.get(k))
    if differ:
        raise ValueError(
            f"{len(differ)} of {len(saved)} arrays are not what was saved, such as {differ[0]}"
        )


def _read_digests(path: Path) -> dict[str, Any] | None:
    """Returns the digests in a checkpoint; None if an earlier version wrote it.

    Raises:
      ValueError: they are damaged.
    """
    file = path / "digests" / "metadata"
    if not file.parent.exists():
        return None
    try:
        return unsealed(json.loads(file.read_bytes()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {brief(error)}") from error


def _read_metadata(path: Path) -> dict[str, list[str]]:
    """Returns the types and shapes of the arrays of an item, in the form of its digests."""
    tree = ocp.PyTreeCheckpointHandler().metadata(path).tree
    return {name: [kind] for name, kind in describe(tree).items()}


def _read_model(path: Path) -> dict[str, Any]:
    """Returns the item "model" of a checkpoint as numpy arrays; raises many types on damage."""
    digests = _read_digests(path)
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(path / "model").tree
    if digests:  # before memory is allocated for damaged shapes
        _check_saved(describe(tree), _types(digests["model"]))
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    item = handler.restore(path / "model", args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    if digests:
        _check_saved(_described_digests(item), digests["model"])
    return item


def _leaf_handlers() -> ocp.type_handlers.TypeHandlerRegistry:
    """Returns what writes and reads leaves of a tree: as in orbax, but arrays as they are.

    By default, orbax divides an array of which every device has a copy: each device cuts out its
    part, by a program of its own for each shape. On eight devices that is eight programs per array.
    """
    kinds = ocp.type_handlers.supported_types()
    handlers = {kind: ocp.type_handlers.get_type_handler(kind) for kind in kinds}
    handlers[jax.Array] = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    return ocp.type_handlers.create_type_handler_registry(*handlers.items())


def _unused(path: Path) -> Path:
    """Returns the path, with a number appended if the path exists."""
    number = 1
    unused = path
    while unused.exists():
        unused = path.with_name(f"{path.name}-{number}")
        number += 1
    return unused
