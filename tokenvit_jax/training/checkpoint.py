"""Checkpoints of a run in `WORKDIR/checkpoints/STEP`, written by orbax in the background.

A checkpoint has three items: "model" (parameters, averages, other collections), "optimizer" and
"progress" (the state of the data iterator, in JSON). A checkpoint gets its name only when it is
complete.
"""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn
from orbax.checkpoint.checkpoint_managers import preservation_policy

from tokenvit_jax.errors import UserError
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.training.processes import on_main_process
from tokenvit_jax.training.state import TrainState, eval_variables
from tokenvit_jax.training.workdir import check_version

FOLDER = "checkpoints"
# The task's score, stored with the metrics of an evaluation: it selects the "best" checkpoint.
_SCORE = "score"

# orbax logs the errors that it raises, with tracebacks; asyncio those of its other writers.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def saved_steps(workdir: Path) -> list[int]:
    """Returns the steps that have a complete checkpoint in a workdir, in order."""
    folder = workdir / FOLDER
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


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
        """
        self._folder = workdir.absolute() / FOLDER
        for path in sorted(self._folder.glob("*.orbax-checkpoint-tmp")):
            logging.warning("checkpoint %s was not finished and is removed", path)
        self._set_aside(_steps_with_damaged_metrics(workdir))
        best = preservation_policy.BestN(
            get_metric_fn=_score, n=keep_best, keep_checkpoints_without_metrics=False
        )
        last = preservation_policy.LatestN(keep_last)
        self._manager = _open_manager(
            self._folder,
            preservation_policy=preservation_policy.AnyPreservationPolicy([last, best]),
            cleanup_tmp_directories=True,
        )
        self._keep_best = keep_best
        self._score_of = score
        self._best = self._best_score()
        self._writing = self._folder

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        with self._write_errors():
            self._manager.close()

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Returns whether a checkpoint with these metrics would be kept for its score."""
        return self._keep_best > 0 and self._score_of(metrics) > self._best

    def save(
        self,
        step: int,
        state: TrainState,
        progress: dict,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Starts to save the state after a step; the state may be consumed afterwards.

        Args:
          step: number of steps done.
          state: result of `Parallel.to_global`.
          progress: JSON object, equal in all processes.
          metrics: metrics of the evaluation of this state; None if it was not evaluated.

        Raises:
          UserError: this checkpoint or the previous one cannot be written.
        """
        items = ocp.args.Composite(
            model=ocp.args.PyTreeSave(_model_item(state)),
            optimizer=ocp.args.PyTreeSave(state.opt_state),
            progress=ocp.args.JsonSave(progress),
        )
        if metrics is not None:
            metrics = {**metrics, _SCORE: self._score_of(metrics)}
        with self._write_errors():
            self._manager.wait_until_finished()
        self._writing = self._folder / str(step)
        with self._write_errors():
            self._manager.save(step, args=items, metrics=metrics)
        if metrics is not None:
            self._best = max(self._best, _score(metrics))

    def restore(self, like: TrainState) -> tuple[TrainState, dict] | None:
        """Restores the latest readable checkpoint; sets later ones aside.

        Args:
          like: tree with the shapes, types and shardings of the state.

        Returns:
          The state and its progress; None if there is no checkpoint.

        Raises:
          UserError: the checkpoint belongs to another model, or none of several can be read.
        """
        unreadable = []
        for step in reversed(self.steps()):
            try:
                restored = self._restore_step(step, like)
            except UserError:
                raise
            except Exception as error:  # orbax raises many types on damaged files
                path = self._folder / str(step)
                logging.warning("checkpoint %s cannot be read: %s", path, _brief(error))
                unreadable.append(step)
                continue
            self._set_aside(unreadable)
            self._manager.reload()
            self._best = self._best_score()
            return restored
        if unreadable:
            raise UserError(f"none of the checkpoints {unreadable} in {self._folder} can be read")
        return None

    def _restore_step(self, step: int, like: TrainState) -> tuple[TrainState, dict]:
        model_item = _model_item(like)
        found = self._manager.item_metadata(step)["model"].tree
        check_same_variables(found, model_item, self._folder / str(step))
        args = {
            name: ocp.args.PyTreeRestore(
                item, restore_args=ocp.checkpoint_utils.construct_restore_args(item)
            )
            for name, item in (("model", model_item), ("optimizer", like.opt_state))
        }
        args["progress"] = ocp.args.JsonRestore()
        items = self._manager.restore(step, args=ocp.args.Composite(**args))
        state = like.replace(opt_state=items["optimizer"], **items["model"])
        return state, items["progress"]

    def _best_score(self) -> float:
        best = self._manager.best_step()
        return -math.inf if best is None else _score(self._manager.metrics(best))

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
        except Exception as error:  # orbax and its storage raise many types
            whole = ", ".join(map(str, saved_steps(self._folder.parent))) or "none"
            raise UserError(
                f"checkpoint {self._writing} cannot be written: {_brief(error)}; "
                f"complete checkpoints: {whole}"
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
    steps = saved_steps(workdir)
    if not steps:
        raise UserError(f"--workdir={workdir} holds no checkpoints")
    listed = ", ".join(map(str, steps))
    if which not in ("last", "best", *map(str, steps)):
        raise UserError(f"no checkpoint {which!r} in {folder}; valid: last, best, {listed}")
    with _open_manager(folder, read_only=True) as manager:
        best = manager.best_step()
        if which == "best" and best is None:
            raise UserError(f"none of the checkpoints {listed} in {folder} was evaluated")
        named = {"last": steps[-1], "best": best}
        step = named[which] if which in named else int(which)
        try:
            tree = manager.item_metadata(step)["model"].tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            args = ocp.args.Composite(model=ocp.args.PyTreeRestore(restore_args=as_numpy))
            item = manager.restore(step, args=args)["model"]
            variables = {k: item[k] for k in ("params", "model_state", "ema") if k in item}
        except Exception as error:
            raise UserError(
                f"checkpoint {folder / str(step)} cannot be read: {_brief(error)}; "
                f"there are: {listed}"
            ) from error
    return Checkpoint(step, folder / str(step), eval_variables(**variables))


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
    found, expected = _describe(found), _describe(expected)
    differences = [
        f"{name} is {found.get(name, 'missing')} there, {expected.get(name, 'missing')} here"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise UserError(
            f"checkpoint {path} belongs to another model; {len(differences)} entries differ: "
            + "; ".join(differences[:3])
        )


def _describe(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(x.dtype)}{x.shape}"
        for path, x in leaves
    }


def _model_item(state: TrainState) -> dict[str, Any]:
    """Returns the state without the optimizer's state, which inference does not read."""
    fields = {name: getattr(state, name) for name in ("params", "model_state", "step", "skipped")}
    return fields if state.ema is None else {**fields, "ema": state.ema}


def _open_manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(best_fn=_score, **options),
        item_handlers={
            "model": ocp.PyTreeCheckpointHandler(),
            "optimizer": ocp.PyTreeCheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        },
    )


def _score(metrics: dict[str, float]) -> float:
    return metrics[_SCORE]


def _steps_with_damaged_metrics(workdir: Path) -> list[int]:
    """Returns the checkpoints because of which orbax could not open the others."""
    damaged = []
    for step in saved_steps(workdir):
        path = workdir / FOLDER / str(step) / "metrics" / "metrics"
        try:
            _score(json.loads(path.read_text()))
        except FileNotFoundError:
            pass  # saved without an evaluation
        except (ValueError, KeyError, TypeError):
            damaged.append(step)
    return damaged


def _brief(error: Exception) -> str:
    """Returns the first line of a message; storage errors go on with locations in their source."""
    line = str(error).partition("\n")[0] or type(error).__name__
    return line if len(line) <= 400 else f"{line[:150]} ... {line[-250:]}"


def _unused(path: Path) -> Path:
    """Returns the path, with a number appended if the path exists."""
    number = 1
    unused = path
    while unused.exists():
        unused = path.with_name(f"{path.name}-{number}")
        number += 1
    return unused
