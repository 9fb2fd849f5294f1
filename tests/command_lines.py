"""Random command lines, plausible and wrong ones, and what is right about their results.

A line is right if it ends with status 0, or with status 1 or 2 and one line that names something of
the command line. It is wrong if it ends in a traceback or takes too long, if a value without any
meaning is accepted, or if a file that it reads has changed.
"""

import collections
import contextlib
import copy
import functools
import importlib
import io
import math
import random
import signal
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from safetensors.numpy import save_file
from tiny_config import get_config

from tokenvit_jax import cli
from tokenvit_jax.ahead import targets
from tokenvit_jax.errors import UserError
from tokenvit_jax.expediting import candidates, search
from tokenvit_jax.measure import models, operators, timing
from tokenvit_jax.tasks import create_task, default_config, entries_of
from tokenvit_jax.training import loop
from tokenvit_jax.training.new_run import write_run

SECONDS = 60  # a line that takes longer hangs
REQUIRED = {
    "train": ("config", "workdir"), "evaluate": ("workdir",), "export": ("workdir", "out"),
    "predict": ("workdir", "images", "out"), "label": ("workdir", "out"), "list": (),
    "convert": ("source", "out"), "expedite": ("workdir", "budget"), "prepare": (),
    "summary": (), "benchmark": (), "compile": ("config", "target"),
}  # fmt: skip
POSITIONAL = {"prepare": ("DATASET",), "list": ("models|configs|datasets",)}
INPUTS = ("workdir", "images", "source", "data_dir", "manual_dir", "config")

# ------------------------------------------------------------------------------------------------
# Values
# ------------------------------------------------------------------------------------------------

# No flag can mean one of these.
MEANINGLESS = {
    "number": ["", " ", "nan", "-nan", "inf", "-inf", "-1", "-7", "text", "1e999", "0x10", "1;2",
               "9" * 30, "9" * 5000, "None", "[]", "١٢x", "1\x00"],
    "whole": ["1.5", "0.0", "1e3"],
    "path": ["", "a\x00b", "~nobody-here/x", "--out=x"],
    "output": ["broken.png/x", "/proc/none/x", "/dev/null/x", "x" * 300, "y/" * 3000 + "z"],
    "input": ["missing", "missing/deeper", "x" * 300, "ünknown→", "/dev/null/x", "*.none",
              "\udc9f"],
    "choice": ["", "x", "None", "-1", "nan", "MODEL", "dgt_tt", "w" * 4000, "ü", "--", "../x"],
    "switch": ["2", "maybe", "-1", "nan", "None"],
}  # fmt: skip
# Flag -> kinds of its meaningless values, then plausible values.
VALUES = {
    "workdir": (("path", "input"), ["RUN", "GROUPS", "./RUN", "RUN/../RUN"]),
    "source": (("path", "input"), ["RUN", "weights.safetensors", "GROUPS"]),
    "images": (("path", "input"), ["photos", "image.png", "photos,image.png", "photos/*.png"]),
    "out": (("path", "output"), ["OUT", "new/OUT", "./OUT"]),
    "plot": (("path", "output"), ["OUT.png", "new/OUT.pdf"]),
    "results": (("path", "output"), ["OUT.json", "OUT.csv"]),
    "data_dir": (("path", "input"), ["photos"]),
    "manual_dir": (("path", "input"), ["photos"]),
    "checkpoint": (("choice",), ["last", "0"]),
    "dataset": (("choice",), ["digits"]),
    "model": (("choice",), ["deit_ti"]),
    "against": (("choice",), []),
    "op": (("choice",), ["kmeans", "dot_product_attention", "depthwise_conv"]),
    "format": (("choice",), ["table", "json"]),
    "dtype": (("choice",), ["float32", "bfloat16"]),
    "mode": (("choice",), ["forward", "train", "both"]),
    "of": (("choice",), ["macs"]),
    "layout": (("choice",), ["auto", "timm", "own"]),
    "method": (("choice",), ["tome", "kmeans,tome", "evit"]),
    "keep": (("number", "choice"), ["level1", "9,4", "16,9"]),
    "expedite": (("number", "choice"), ["1,1,3x3", "1,1,3x3,logits", "1,1,3x3,temperature=5"]),
    "image_size": (("number", "whole"), ["32", "33", "32x48"]),
    "batch_size": (("number", "whole"), ["1", "3"]),
    "num_images": (("number", "whole"), ["1", "3"]),
    "target": (("choice",), ["h100", "h100x8", "v5e:2x2"]),
    "batch_per_device": (("number", "whole"), ["1", "2"]),
    "budget": (("number",), ["0.9", "0.75", "0.01"]),
    "top_k": (("number", "whole"), ["1", "5", "10"]),
    "num_classes": (("number", "whole"), ["0", "10"]),
    "eval_crop": (("number",), ["1.0", "0.875"]),
    "num_processes": (("number", "whole"), ["1"]),
    "process_id": (("number", "whole"), []),
    "coordinator": (("choice",), []),
    "override": (("path", "choice"), ["distilled=False"]),
    "normalization": (("choice",), ["imagenet", "inception"]),
    "eval_interpolation": (("choice",), ["bicubic"]),
    "config": (("path", "input", "choice"), ["tiny.py", "dgt_t:digits"]),
    "carry": (("switch",), ["true", "false"]),
    "per_class": (("switch",), ["true", "false"]),
    "attention": (("switch",), ["true", "false"]),
    "ema": (("switch",), ["false"]),
    "fit": (("switch",), ["true", "false"]),
}
# Flags of a plausible line, besides the required ones.
OFTEN = {"benchmark": ["model|op", "image_size", "batch_size"], "summary": ["model", "image_size"],
         "expedite": ["num_images"], "convert": ["model"]}  # fmt: skip


class Line(NamedTuple):
    """A command line.

    Attributes:
      command: name of the command.
      arguments: what follows the name.
      meaningless: the arguments that no flag can mean.
    """

    command: str
    arguments: tuple[str, ...]
    meaningless: tuple[str, ...]


def draw_line(rng: random.Random, number: int) -> Line:
    """Draws a command line; its outputs carry the number."""
    command = rng.choice(list(REQUIRED))
    flag_values = importlib.import_module(f"tokenvit_jax.{command}").FLAGS
    names = [name for name in flag_values if name in VALUES]
    often = [rng.choice(name.split("|")) for name in OFTEN.get(command, ())]
    chosen = dict.fromkeys([*REQUIRED[command], *often])
    plausible = rng.random() < 0.3
    for _ in range(0 if plausible or not names else rng.choice([0, 1, 1, 2])):
        chosen[rng.choice(names)] = None
    number_wrong = 0 if plausible else min(len(chosen), rng.choice([0, 1, 1, 2]))
    wrong = rng.sample(list(chosen), number_wrong)
    arguments, meaningless = [], []
    for name in chosen:
        bad, good = VALUES[name]
        if command == "prepare" or (command, name) == ("train", "workdir"):
            bad = ("path",)  # these make the folder
        if name in wrong or not good:
            value = rng.choice([v for kind in bad for v in MEANINGLESS[kind]])
            meaningless.append(f"--{name}={value}")
        else:
            value = rng.choice(good).replace("OUT", f"out{number}")
        arguments.append(f"--{name}={value}")
    if command == "train" and not plausible:
        for _ in range(rng.choice([0, 1, 1, 2])):
            entry, bad = _draw_entry(rng)
            arguments.append(entry)
            meaningless += [entry] * bad
    words = {"prepare": ["digits", "folder", "imagenet2012"], "list": ["models", "configs"]}
    if command in words:
        more = [] if plausible else ["modles", "", "-", "ü"]
        word = rng.choice([*words[command], *more])
        arguments.insert(rng.randrange(len(arguments) + 1), word)
        meaningless += [word] * (word not in words[command])
    if not plausible and rng.random() < 0.25:
        _spoil(rng, arguments, meaningless)
    meaningless = [argument for argument in meaningless if argument in arguments]
    return Line(command, tuple(arguments), tuple(meaningless))


def _draw_entry(rng: random.Random) -> tuple[str, bool]:
    """Returns an entry of a configuration with a value, and whether no entry can mean it."""
    entries = entries_of("classification")
    key = rng.choice([key for key in entries if not key.endswith("_overrides")])
    default, rule = entries[key].default, getattr(entries[key], "valid", None)
    value = rng.choice([v for kind in ("number", "whole", "choice") for v in MEANINGLESS[kind]])
    bad = False
    if type(default) in (int, float):
        try:
            number = int(value) if value.lstrip("-").isdecimal() else float(value)
            bad = math.isnan(number) or (rule is not None and not rule.accepts(number))
        except ValueError:
            bad = True
    return f"--config.{key}={value}", bad


def _spoil(rng: random.Random, arguments: list[str], meaningless: list[str]) -> None:
    """Adds or changes an argument so that the line as a whole is wrong, or doubles one."""
    at = rng.randrange(len(arguments) + 1)
    kind = rng.choice(["unknown", "extra", "bare", "double", "missing", "dashes"])
    if kind == "unknown":
        arguments.insert(at, rng.choice(["--unknown=1", "--wrokdir=RUN", "-x", "--config.x=1"]))
        meaningless.append(arguments[at])
    elif kind == "extra":
        arguments.append(rng.choice(["extra", "", "a b", "ü", "-"]))
        meaningless.append(arguments[-1])
    elif kind == "bare":
        arguments.append(rng.choice(["--workdir", "--out", "--budget"]))
        meaningless.append(arguments[-1])
    elif kind == "double" and arguments:
        arguments.append(rng.choice(arguments))
    elif kind == "missing" and arguments:
        arguments.pop(at % len(arguments))
    elif kind == "dashes":
        arguments.insert(at, "--")


# ------------------------------------------------------------------------------------------------
# Running
# ------------------------------------------------------------------------------------------------


class TooLong(BaseException):
    """A line hangs."""


class Result(NamedTuple):
    """What became of a line.

    Attributes:
      status: its exit status; None: it did not end by itself.
      fault: what is wrong; "": nothing.
      errors: what it wrote on standard error.
    """

    status: int | None
    fault: str
    errors: str


def run_lines(
    seed: int, number: int, folder: Path, patch, *, only_meaningless: bool = False
) -> list[str]:
    """Runs random lines, and returns a description of each that went wrong.

    Args:
      seed: of the random numbers.
      number: number of lines.
      folder: the folder to run them in.
      patch: pytest's MonkeyPatch.
      only_meaningless: whether to run only lines that must be refused; they need no models.
    """
    patch.chdir(folder)
    patch.setenv("HOME", str(folder))
    quick(patch)
    make_inputs(runs=not only_meaningless)
    rng, faults, statuses = random.Random(seed), [], collections.Counter()
    while statuses.total() < number:
        line = draw_line(rng, statuses.total())
        if only_meaningless and not line.meaningless:
            continue
        result = run_line(line)
        statuses[result.status] += 1
        if result.fault:
            shown = [argument[:80] for argument in line.arguments]
            faults.append(f"{line.command} {shown}: {result.fault}: {result.errors[-300:]}")
            print(faults[-1], flush=True)
    print(f"{number} lines, seed {seed}: exit statuses {dict(statuses)}, {len(faults)} faults")
    return faults


def run_line(line: Line) -> Result:
    """Runs a line in the current folder, in this process."""
    module = importlib.reload(importlib.import_module(f"tokenvit_jax.{line.command}"))
    before = _inputs(line)
    status, errors = _run(module, line)
    fault = _fault(line, status, errors, set(module.FLAGS))
    if not fault and line.command != "train" and _inputs(line) != before:
        fault = "an input has changed"
    return Result(status, fault, errors)


def _run(module, line: Line) -> tuple[int | None, str]:
    def stop(*_):
        raise TooLong

    errors, argv = io.StringIO(), sys.argv
    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    sys.argv = [line.command, *line.arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            names = {"required": REQUIRED[line.command]}
            names["positional"] = POSITIONAL.get(line.command, ())
            cli.run(module.main, copy.deepcopy(module.FLAGS), **names)
        except SystemExit as stopped:
            return stopped.code, errors.getvalue()
        except TooLong:
            return None, "too long"
        except BaseException:
            return None, traceback.format_exc()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, former)
            sys.argv = argv


def _fault(line: Line, status: int | None, errors: str, names: set[str]) -> str:
    if status is None:
        return errors.strip().splitlines()[-1]
    if status == 0:
        return f"accepted: {line.meaningless[0]!r}"[:200] if line.meaningless else ""
    if status not in (1, 2):
        return f"status {status}"
    messages = [text for text in errors.splitlines() if text.startswith("error: ")]
    others = [text for text in errors.splitlines() if not text.startswith(("error", "WARNING"))]
    if len(messages) != 1 or others:
        return f"{len(messages)} errors, {len(others)} other lines"
    (message,) = messages
    given = list(map(repr, line.arguments))
    given += [part for word in line.arguments for part in word.lstrip("-").split("=", 1) if part]
    given += [part.rpartition("/")[2] for part in given]
    known = [f"--{name}" for name in names] + given + list(POSITIONAL.get(line.command, ()))
    shown = [part for part in known if part.strip()]
    if not any(part[:40] in message or repr(part)[1:40] in message for part in shown):
        return "the message names nothing of the line"
    return ""


def _inputs(line: Line) -> dict[str, tuple[int, int]]:
    """Returns size and time of all files that the line reads."""
    found = {}
    for argument in line.arguments:
        name, _, value = argument.lstrip("-").partition("=")
        for part in value.split(",") if name in INPUTS else ():
            with contextlib.suppress(OSError, ValueError):
                top = Path(part)
                files = [top, *(top.rglob("*") if top.is_dir() else ())]
                stats = {str(file): file.stat() for file in files if file.is_file()}
                found |= {file: (stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}
    return found


# ------------------------------------------------------------------------------------------------
# Files, and computations that take a moment
# ------------------------------------------------------------------------------------------------


def make_inputs(*, runs: bool) -> None:
    """Writes the files that the lines name into the current folder.

    Args:
      runs: whether to write runs, whose models are compiled.
    """
    if runs:
        _make_runs()
    save_file({"head.bias": np.zeros(10, np.float32)}, "weights.safetensors")
    pixels = np.random.default_rng(0).integers(256, size=(40, 48, 3), dtype=np.uint8)
    Path("photos").mkdir()
    for path in ("image.png", "photos/a.png", "photos/b.png"):
        Image.fromarray(pixels).save(path)
    Path("broken.png").write_text("no image")
    text = Path(__file__).with_name("tiny_config.py").read_text()
    Path("tiny.py").write_text(text.replace("num_steps = 40", "num_steps = 1"))


def _make_runs() -> None:
    host = default_config("classification")
    host.model = "deit_ti"
    host.model_overrides = {
        "dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "position_size": (32, 32),
    }  # fmt: skip
    host.image_size = 32
    host.data.eval_batch_size = 360
    for name, config in (("RUN", host), ("GROUPS", get_config())):
        model = create_task(config).make_model()
        images = jnp.zeros((1, 32, 32, 3))
        variables = jax.jit(lambda x, model=model: model.init(jax.random.key(0), x))(images)
        write_run(Path(name), config, jax.device_get(variables))


def quick(patch) -> None:
    """Shortens measurements and searches, and stops training after its checks.

    Args:
      patch: pytest's MonkeyPatch.
    """
    in_turns = lambda calls, *, seconds: timing.time_in_turns(calls, seconds=0)  # noqa: E731
    patch.setattr(models, "time_in_turns", in_turns)
    patch.setattr(operators, "time_in_turns", in_turns)
    for name, cases in operators.CASES.items():
        shapes = cases.__defaults__[0]
        few = dict([next(iter(shapes.items()))]) if isinstance(shapes, dict) else shapes[:1]
        patch.setitem(operators.CASES, name, functools.partial(cases, shapes=few))
    patch.setattr(candidates, "FRACTIONS", (0.5, 0.75))
    patch.setattr(search, "FACTORS", search.FACTORS[:1])
    patch.setattr(loop, "train", lambda config, workdir: None)
    patch.setattr(targets, "devices_of", _no_compiler)


def _no_compiler(target) -> None:
    raise UserError(f"--target={target.name} needs a compiler")
