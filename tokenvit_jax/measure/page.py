"""Measures models and operators on the machine at hand, and writes a page of the results.

The parts of the page are measured in the order of their worth, as far as a number of minutes
allows. On an accelerator, the programs of a part are compiled side by side, at most six at once,
and then timed one at a time.
"""

import datetime
import functools
import gc
import logging
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tokenvit_jax.errors import UserError
from tokenvit_jax.measure import models, operators, timing, torch_peers
from tokenvit_jax.measure.parts import part_of, part_of_task
from tokenvit_jax.measure.profile import times_of_parts
from tokenvit_jax.measure.report import format_value, markdown_table

SMALL = ("dgt_t", "clustr_t", "pale_t", "swin_t", "deit_s")
LARGE = ("dgt_s", "clustr_s", "pale_s", "dgt_b", "clustr_b", "pale_b")
# Models of timm: each of ours is compared with the one of its size at equal multiply-adds.
SMALL_PEERS = ("swin_tiny_patch4_window7_224", "deit_small_patch16_224")
LARGE_PEERS = ("swin_small_patch4_window7_224", "swin_base_patch4_window7_224")
# (images, tokens, heads): attention needs memory and time by the square of the tokens.
LENGTHS = ((64, 784, 4), (32, 3136, 2), (8, 16384, 2), (1, 65536, 2))
LENGTHS_ON_CPU = ((1, 784, 4), (1, 3136, 2))
HEADING = "\n## "  # before the title of a part
NOT_MEASURED = "Not measured"
SECONDS = 4.0  # to time each model, less than `benchmark --model`
CASE_SECONDS = 1.0  # to time a case of attention


class TaskPlan(NamedTuple):
    """What the page tells of a dense task.

    Attributes:
      title: the network.
      kind: how the models of the task are timed.
      model: name of the model.
      peer: network of `kind.package` beside it.
      image_size: height and width [pixels].
      batch_size: images per batch.
      insertions: label -> overrides of the model, whose forward passes take turns.
      inserted_size: height and width of the images then [pixels].
    """

    title: str
    kind: models.Kind
    model: str
    peer: str
    image_size: tuple[int, int]
    batch_size: int
    insertions: Mapping[str, Any] = MappingProxyType({})
    inserted_size: tuple[int, int] | None = None


class Plan(NamedTuple):
    """What the page is about.

    Attributes:
      image_size: height and width [pixels], without dense tasks.
      batch_size: images per batch, without dense tasks.
      dtype: type of the computation.
      small: models that are measured first.
      large: models that are measured last.
      peers: models of timm beside the small ones.
      large_peers: models of timm beside the large ones.
      insertions: model -> label -> overrides of `create_model`, token reducers.
      lengths: (images, tokens, heads) of group attention.
      operators: keys of :data:`tokenvit_jax.measure.operators.CASES`.
      tasks: dense tasks; if there are any, the page is about them alone.
    """

    image_size: tuple[int, int]
    batch_size: int
    dtype: jnp.dtype
    small: Sequence[str] = SMALL
    large: Sequence[str] = LARGE
    peers: Sequence[str] = SMALL_PEERS
    large_peers: Sequence[str] = LARGE_PEERS
    insertions: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    lengths: Sequence[tuple[int, int, int]] = LENGTHS
    operators: Sequence[str] = (
        "cluster_density_peaks", "kmedoids", "kmeans", "cluster_superpixels", "reconstruct_tokens",
        "depthwise_conv",
    )  # fmt: skip
    tasks: Sequence[TaskPlan] = ()


class Part(NamedTuple):
    """A part of the page.

    Attributes:
      title: its heading.
      minutes: time that it is expected to take on a GPU with 16 CPU cores, by the times that
        compilation was seen to take there.
      measure: yields its tables, lists of lines, as soon as each is known.
    """

    title: str
    minutes: float
    measure: Callable[[], Iterator[list[str]]]


def measure_page(plan: Plan, minutes: float, command: str) -> Iterator[str]:
    """Yields the page, in Markdown, after each of its tables: a run that is cut keeps what it has.

    Args:
      plan: what to measure.
      minutes: time to spend; parts that would take longer are left out and named.
      command: command that the page says it was written by.

    Raises:
      UserError: after the last part, if some could not be measured; the page says why.
    """
    start, done, left_out, failed = time.monotonic(), [], [], []

    def page():
        lines = [*_heading(plan, command, reasons), *done, *_not_measured(left_out)]
        return "\n".join(lines) + "\n"

    reasons = {package: _why_no_peers(package) for package in _packages(plan)}
    if reasons.get(models.CLASSIFICATION.package):
        plan = plan._replace(peers=(), large_peers=())
    tasks = [task._replace(peer="") if reasons[task.kind.package] else task for task in plan.tasks]
    plan = plan._replace(tasks=tasks)
    for part in _parts(plan):
        if (time.monotonic() - start) / 60 + part.minutes > minutes:
            left_out.append(f"{part.title}: {part.minutes:g} minutes are needed")
        else:
            began, above = time.monotonic(), [f"{HEADING}{part.title}", ""]
            try:
                for table in part.measure():
                    done += [*above, *table]
                    above = [""]
                    yield page()
                done += ["", f"Measured in {(time.monotonic() - began) / 60:.1f} minutes."]
            except Exception as error:
                logging.warning("%s: %s", part.title, _message(error))
                left_out.append(f"{part.title}: {_message(error)}")
                failed.append(part.title)
            gc.collect()
            torch_peers.release_memory()
        yield page()
    if failed:
        raise UserError(f"not measured, for a reason that the page gives: {'; '.join(failed)}")


def _parts(plan):
    if plan.tasks:
        return [part for task in plan.tasks for part in _task_parts(plan, task)]
    parts = [
        Part("Training step", 6, lambda: _models(plan, "train")),
        Part("Forward pass", 3, lambda: _models(plan, "forward")),
    ]
    if plan.lengths:
        parts.append(Part("Attention by number of tokens", 1.5, lambda: _attention(plan)))
    if plan.insertions:
        parts.append(Part("Token reducers, forward pass", 1.5, lambda: _reducers(plan)))
    parts += (
        Part(f"Operator `{name}`", 0.5, lambda name=name: _operator(plan, name))
        for name in plan.operators
    )
    if plan.large:
        parts += [
            Part("Larger models, training step", 12, lambda: _models(plan, "train", large=True)),
            Part("Larger models, forward pass", 5, lambda: _models(plan, "forward", large=True)),
        ]
    return parts


def _task_parts(plan, task):
    size = "{} x {}".format(*task.image_size)
    parts = [
        Part(f"{task.title}, {size}, {text}", minutes, functools.partial(_task, plan, task, mode))
        for mode, text, minutes in (("forward", "forward pass", 2), ("train", "training step", 6))
    ]
    if task.insertions:
        size = "{} x {}".format(*task.inserted_size)
        title = f"{task.title}, {size}, clustered tokens, forward pass"
        parts.append(Part(title, 3, functools.partial(_clustered, plan, task)))
    return parts


# ------------------------------------------------------------------------------------------------
# Parts
# ------------------------------------------------------------------------------------------------


def _models(plan, mode, large=False):
    """Yields a table of models beside timm's, and one of where they spend their time."""
    names, peers = (plan.large, plan.large_peers) if large else (plan.small, plan.peers)
    setting = (plan.image_size, plan.batch_size, plan.dtype, mode)
    return _compare(names, peers, setting, models.CLASSIFICATION, part_of)


def _task(plan, task, mode):
    """Yields the same tables for a model of a dense task; its parts tell backbone and head."""
    setting = (task.image_size, task.batch_size, plan.dtype, mode)
    peers = [task.peer] if task.peer else []
    return _compare([task.model], peers, setting, task.kind, part_of_task)


def _clustered(plan, task):
    """Yields a table of images per second with and without clustered tokens."""
    setting = (task.inserted_size, task.batch_size, plan.dtype, "forward")
    variants = {task.model: task.insertions}
    contenders, plain = models.build_contenders([task.model], *setting, (), variants, task.kind)
    rows = models.compare_contenders(contenders, *setting, (), plain, seconds=SECONDS)
    yield _insertions(rows)


def _compare(names, peers, setting, kind, part_of):
    """Yields a table of models beside their peers, and one of where the models spend their time.

    A model or a peer that fails is named, and the others are measured.

    Args:
      names: names of the models.
      peers: names of the peers.
      setting: size of the images, of the batch, type of the computation, and mode.
      kind: task of the models.
      part_of: part of an operation from its origin.
    """
    failed: dict[str, Exception] = {}
    contenders, _ = models.build_contenders(names, *setting, peers, kind=kind, failed=failed)
    for name, contender in contenders.items():
        try:
            jax.block_until_ready(contender.program.call())
        except Exception as error:  # such as a lack of memory
            failed[name] = error.with_traceback(None)  # whose frames hold arrays
        del contender
    contenders = {name: one for name, one in contenders.items() if name not in failed}
    gc.collect()  # what failed may have left too little memory for the others
    if not contenders.keys() & {*names}:
        raise failed[names[0]]
    names = [name for name in names if name in contenders]
    peers = [peer for peer in peers if f"{kind.package}/{peer}" in contenders]
    rows = models.compare_contenders(
        contenders, *setting, peers, package=kind.package, seconds=SECONDS
    )
    columns = ["model", "GMACs", "ms", "images/s", *(f"over {peer}" for peer in peers),
               "temporary GiB", "compiled in s"]  # fmt: skip
    cells = (
        (f"`{row['model']}`", row["gmacs"], row["median_ms"], row["images_per_second"],
         *(row[f"ratio_to_{peer}"] for peer in peers), _gib(row), row["compile_seconds"])
        for row in rows
    )  # fmt: skip
    lines = _table(columns, cells)
    if peers:
        text = f"divided by the same product of the model of {kind.package}"
        lines += ["", *_wrap(f'"Over": images per second times multiply-adds, {text}.')]
    for name, error in failed.items():
        logging.warning("%s: %s", name, _message(error))
        lines += ["", *_wrap(f"`{name}` was not measured: {_message(error)}")]
    yield lines
    yield _profile({name: contenders[name] for name in names}, part_of)


def _profile(contenders, part_of):
    """Returns a table of the milliseconds of each part of compiled models."""
    try:
        times = {
            name: times_of_parts(contender.compiled, contender.program.call, part_of)
            for name, contender in contenders.items()
        }
    except Exception as error:  # a profiler that is not allowed, or a file of another form
        return _wrap(f"No profile: {_message(error)}")
    named = dict.fromkeys(part for column in times.values() for part in column)
    parts = [part for part in named if any(column.get(part) for column in times.values())]
    if not parts:
        return ["No profile: the profiler recorded no kernel."]
    unit = "CPU threads" if jax.default_backend() == "cpu" else "kernels"
    title = f"Where the time goes: milliseconds of {unit} in one call."
    rows = ([part, *(column.get(part, 0.0) for column in times.values())] for part in parts)
    return [title, "", *_table(["part", *(f"`{name}`" for name in times)], rows)]


def _attention(plan):
    """Yields a table of attention in groups beside the dense forms, by the number of tokens."""
    rows = [
        operators.benchmark_case(case, mode, seconds=CASE_SECONDS)
        for batch, length, heads in plan.lengths
        for case in operators.group_attention_cases(batch, plan.dtype, ((length, heads),))
        for mode in ("forward", "train")
    ]
    batches = {length: batch for batch, length, _ in plan.lengths}
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    cells = []
    for row in rows:
        times = {name: timing["median_ms"] for name, timing in row["contenders"].items()}
        dense = [time for name, time in times.items() if name != "group" and time]
        gain = min(dense) / times["group"] if dense and times["group"] else None
        cells.append((batches[row["length"]], row["length"], row["heads"], _mode(row["mode"]),
                      *(times.get(name) for name in names), gain))  # fmt: skip
    columns = ["images", "tokens", "heads", "mode", *(f"{name} ms" for name in names),
               "best dense / group"]  # fmt: skip
    yield _table(columns, cells)


def _reducers(plan):
    """Yields a table of the share of saved multiply-adds that token reducers turn into speed."""
    setting = (plan.image_size, plan.batch_size, plan.dtype, "forward")
    contenders, plain = models.build_contenders([*plan.insertions], *setting, (), plan.insertions)
    rows = models.compare_contenders(contenders, *setting, (), plain, seconds=SECONDS)
    yield _insertions(rows)


def _insertions(rows):
    columns = [
        "model",
        "GMACs",
        "ms",
        "images/s",
        "speed-up",
        "saved multiply-adds",
        "speed-up over saved",
    ]
    keys = ("gmacs", "median_ms", "images_per_second", "speedup", "saved", "speedup_over_saved")
    return _table(columns, ((f"`{row['model']}`", *(row.get(key) for key in keys)) for row in rows))


def _operator(plan, name):
    """Yields a table of an operator beside its alternatives, at the shapes of the models."""
    rows = operators.benchmark_operator(name, None, plan.dtype, ("forward", "train"))
    measured = ("mode", "speedup", "contenders")
    shape = [key for key in rows[0] if key not in measured]
    names = list(rows[0]["contenders"])
    cells = (
        (*(row[key] for key in shape), _mode(row["mode"]),
         *(row["contenders"][name]["median_ms"] for name in names), row["speedup"])
        for row in rows
    )  # fmt: skip
    yield _table([*shape, "mode", *(f"{name} ms" for name in names), "speed-up"], cells)


# ------------------------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------------------------


def _heading(plan, command, reasons):
    device, found = jax.devices()[0], timing.environment()
    for package, reason in reasons.items():
        found |= {} if reason else torch_peers.environment(package)
    versions = ", ".join(f"{key} {value}" for key, value in found.items())
    platform = getattr(device.client, "platform_version", "").split("\n")[0]
    size = "models at {} x {} pixels, batch {}".format(*plan.image_size, plan.batch_size)
    if plan.tasks:
        size = "; ".join(f"{task.title}, batch {task.batch_size}" for task in plan.tasks)
    text = (
        f"Written by `{command}` on {datetime.date.today()}: {size}, "
        f"{plan.dtype.name}, random weights and images. Milliseconds are "
        "medians of calls that take turns; on an accelerator "
        f"{timing.CALLS_IN_A_ROW} calls of less than {timing.SLOW} s follow one another before the "
        "host waits. Programs are "
        "compiled side by side there, so that compilation takes longer than alone."
    )
    lines = [f"# {device.device_kind}", "", *_wrap(text), "", *_wrap(f"{versions}; {platform}.")]
    for package, reason in reasons.items():
        lines += ["", *_wrap(f"No comparison with {package}: {reason}.")] if reason else []
    return lines


def _not_measured(left_out):
    return [f"{HEADING}{NOT_MEASURED}", "", *(f"- {line}" for line in left_out)] if left_out else []


def _packages(plan):
    """Returns the Python packages of the peers."""
    kinds = [task.kind for task in plan.tasks] or [models.CLASSIFICATION]
    return dict.fromkeys(kind.package for kind in kinds)


def _why_no_peers(package):
    """Returns why models of a package cannot be timed beside ours; None if they can."""
    try:
        torch_peers.check_peers(package)
        torch_peers.environment(package)
    except Exception as error:  # a comparison is worth less than the rest of the page
        return str(error) if isinstance(error, UserError) else _message(error)
    return None


def _message(error):
    """Returns the first line of an error."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:300]


def _table(columns, rows):
    return markdown_table(columns, (map(format_value, row) for row in rows))


def _wrap(text):
    return textwrap.wrap(text, 96, break_on_hyphens=False, break_long_words=False)


def _gib(row):
    return None if row["temp_mib"] is None else row["temp_mib"] / 1024


def _mode(mode):
    return {"forward": "forward", "train": "forward + backward"}[mode]
