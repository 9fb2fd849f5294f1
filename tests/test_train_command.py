import contextlib
import functools
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import started
import tiny_config
import vit_config
from make_task import make_task
from started import environment, finish
from timings import without_timings
from token_model import token_config, use_token_model

from tokenvit_jax import stopping
from tokenvit_jax.errors import UserError
from tokenvit_jax.training import loop
from tokenvit_jax.training.checkpoint import Checkpoints, load_checkpoint, saved_steps
from tokenvit_jax.training.devices import MeshParallel
from tokenvit_jax.training.evaluation import check_metrics
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.state import init_state

CONFIG = Path(tiny_config.__file__)
RUN_CONFIG = Path(vit_config.__file__)  # of the processes, which compile it again and again


@pytest.fixture(scope="session")
def env(tmp_path_factory):
    """The environment of the processes: one device each, with shared compiled programs."""
    path = os.pathsep.join([str(CONFIG.parent), os.environ.get("PYTHONPATH", "")])
    return environment(tmp_path_factory.mktemp("compiled")) | {"PYTHONPATH": path}


def command_of(command, workdir, *arguments):
    """Returns a command with the tiny configuration."""
    flags = f"--config={RUN_CONFIG}", f"--workdir={workdir}"
    return ["-m", f"tokenvit_jax.{command}", *flags, *arguments]


@pytest.fixture(scope="session")
def start(env):
    """Starts a command with the tiny configuration in a process of its own."""
    return lambda *command: started.start(command_of(*command), env, process_group=0)


@pytest.fixture(scope="session")
def reference(start, tmp_path_factory):
    """The workdir of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("reference")
    finish(start("train", workdir))
    return workdir


def wait_for(process, condition):
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def last_logged(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def metrics_of(workdir):
    """Returns everything that was logged except the timings, in order."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [without_timings(json.loads(line)) for line in lines]


def test_an_undisturbed_run_learns_and_logs_every_step_once(reference):
    lines = metrics_of(reference)
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 61))
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [10, 20, 30, 40, 50, 60]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05
    assert all(line["grad_norm"] > 0 for line in lines if "loss" in line)
    assert {"50", "55", "60"} & {p.name for p in (reference / "checkpoints").iterdir()}
    assert list(reference.glob("events.out.tfevents.*"))
    assert json.loads((reference / "config.json").read_text())["model"] == "vit_ti"


@pytest.mark.slow
def test_resumes_bit_identically_after_sigkill_and_sigterm(reference, start, tmp_path):
    run = start("train", tmp_path)
    wait_for(run, (tmp_path / "checkpoints" / "5").exists)
    run.kill()
    run.communicate()
    assert last_logged(tmp_path) < 60

    # A signal to the whole group of processes, as from a terminal or a cluster.
    run = start("train", tmp_path, "--config.data.workers=1")
    # The resumed run drops what the killed one logged after its last checkpoint.
    first = list(itertools.takewhile(lambda line: "resumed" not in line, run.stdout))
    assert first == [
        "model    vit_ti, classification, float32\n",
        "devices  1 x cpu, jit\n",
        "data     digits: 1,437 images of the split train, 360 images of the split test\n",
        "6,858 parameters\n",
    ]
    assert run.stdout.readline() == "compiling the training step ...\n"
    assert re.fullmatch(r"compiling the training step: \d+\.\d s\n", run.stdout.readline())
    first_step = last_logged(tmp_path)
    assert 5 <= first_step < 60
    wait_for(run, lambda: last_logged(tmp_path) > first_step)
    os.killpg(run.pid, signal.SIGTERM)
    out, err = finish(run)
    assert "SIGTERM: stopping after this step is saved; once more: at once\n" in err
    stopped_at = last_logged(tmp_path)
    assert first_step < stopped_at < 60
    assert f"stopped and saved after step {stopped_at}; the same command resumes" in out
    assert (tmp_path / "checkpoints" / str(stopped_at)).is_dir()

    out, _ = finish(start("train", tmp_path))
    assert f"resumed {tmp_path} after step {stopped_at}" in out
    assert metrics_of(tmp_path) == metrics_of(reference)


def test_evaluate_prints_the_metrics_of_the_last_checkpoint(reference, start):
    out, _ = finish(start("evaluate", reference, "--checkpoint=60"))
    logged = metrics_of(reference)[-1]
    assert without_timings(json.loads(out)) == pytest.approx(logged, rel=1e-6)


@pytest.mark.slow
def test_two_processes_equal_one(reference, env, tmp_path):
    runs = started.start_several(2, command_of("train", tmp_path), env)
    # SIGTERM to one process stops both after the same step.
    wait_for(runs[0], lambda: last_logged(tmp_path) >= 3)
    runs[1].terminate()
    for run in runs:
        finish(run)
    lines, expected = metrics_of(tmp_path), metrics_of(reference)
    assert 3 <= lines[-1]["step"] < 60
    for found, line in zip(lines, expected[: len(lines)], strict=True):
        assert found == pytest.approx(line, rel=2e-3)
    assert (tmp_path / "checkpoints" / str(lines[-1]["step"])).is_dir()


def token_run(monkeypatch):
    """Returns the configuration of runs in this process, whose model compiles in a second."""
    use_token_model(monkeypatch)
    config = token_config()
    config.image_size = config.batch_size = 32
    config.log_every_steps = config.eval_every_steps = config.checkpoint_every_steps = 1
    config.data.eval_batch_size = 100  # no multiple of 8 devices
    return config


def test_infinite_loss_stops_and_keeps_the_last_good_checkpoint(monkeypatch, tmp_path):
    config = token_run(monkeypatch)
    config.eval_every_steps = config.num_steps
    loop.train(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "10")
    poison(config, tmp_path, step=9)
    message = (
        f"loss is nan at step 10: stopped; the checkpoints before it are in "
        f"{tmp_path / 'checkpoints'}"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        loop.train(config, tmp_path)
    assert max(saved_steps(tmp_path)) == 9
    assert last_logged(tmp_path) == 9
    assert load_checkpoint(tmp_path).step == 9


def poison(config, workdir, step):
    """Makes the parameters of a checkpoint infinite, so that the next loss is not finite."""
    task = make_task(config)
    init_fn = functools.partial(init_state, task.make_model(), make_optimizer(config), config)
    abstract = MeshParallel().abstract(init_fn)
    with Checkpoints(workdir, keep_last=9, keep_best=0, score=task.score) as checkpoints:
        state, progress = checkpoints.restore(abstract)
    shutil.rmtree(workdir / "checkpoints" / str(step))
    with Checkpoints(workdir, keep_last=9, keep_best=0, score=task.score) as checkpoints:
        assert int(state.step) == step
        infinite = lambda x: jax.device_put(np.full(x.shape, np.inf, x.dtype), x.sharding)  # noqa: E731
        checkpoints.save(step, state.replace(params=jax.tree.map(infinite, state.params)), progress)


def run_here(monkeypatch, capsys, command, *arguments):
    """Returns exit status and last stderr line of a command that fails before any computation."""
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    monkeypatch.setattr(stopping, "watch", lambda **_: None)  # the process is not only its own
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module(f"tokenvit_jax.{command}", run_name="__main__")
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    return exit_info.value.code, lines[-1]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--wrkdir=x"], 2, "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
        (
            ["--config.sead=1"],
            2,
            "--config.sead is not a key of the configuration; did you mean 'seed'",
        ),
        (
            ["--config.optimizer.lerning_rate=1"],
            2,
            "--config.optimizer.lerning_rate is not a key of the configuration; did you mean "
            "'optimizer.learning_rate'?",
        ),
        (
            ["--config.model_overrides.num_group=3"],
            2,
            "is not a key of the configuration; did you mean 'model_overrides.num_groups'?",
        ),
        (["--config.seed=abc"], 2, "--config.seed=abc"),
        (["rest"], 2, "unexpected argument 'rest'"),
        (["--config.model=dgt"], 1, "unknown model 'dgt'"),
        (["--config.model=dgt_tt"], 1, "did you mean 'dgt_t'"),
        (["--config.model_overrides={'num_group': 3}"], 1, "did you mean 'num_groups'"),
        (["--config.dataset=digit"], 1, "no dataset 'digit' (did you mean 'digits'?)"),
        (["--config.dtype=float16"], 1, "config.dtype='float16' is not valid; valid: float32"),
        (["--config.parallel=ddp"], 1, "config.parallel='ddp' is not valid; valid: jit, pmap"),
        (["--config.model_overrides.centroid_rule=x"], 1, "centroid_rule='x' is not valid; valid"),
        (["--config.inference.stride=4"], 2, "an entry of the tasks: segmentation"),
        (
            ["--config.task=tracks"],
            1,
            "config.task='tracks' is not valid; valid: classification, seg",
        ),
        (
            ["--config.task=segmentation", "--config.dataset=scenes"],
            1,
            "config.task='segmentation' needs the entry config.augment.max_class_share, which",
        ),
        (
            ["--config.data.normalization=half"],
            1,
            "config.data.normalization='half' is not valid; valid: imagenet, inception",
        ),
        (["--config.image_size=31"], 1, "config.image_size=31 is not valid; valid: whole num"),
        (["--config.batch_size=20"], 1, "config.batch_size=20 is not a multiple of 8 devices"),
        (["--config.batch_size=0"], 1, "config.batch_size=0 is not valid; valid: whole num"),
        (["--config.ema_decay=1.5"], 1, "config.ema_decay=1.5 is not valid; valid: numbers"),
        (["--config.mesh.fsdp=3"], 1, "config.mesh.fsdp=3 does not divide"),
        (["--config.optimizer.warmup_steps=40"], 1, "warmup_steps=40 must be below"),
        (["--config.profile=3"], 1, "config.profile='3' is not valid"),
        (["--config.data.on_corrupt=ignore"], 1, "data.on_corrupt='ignore'"),
        (["--num_processes=2"], 1, "also need --coordinator and --process_id"),
        (
            ["--config.dataset=imagenet2012", "--config.data.data_dir=/nowhere"],
            1,
            "dataset imagenet2012 not found in data.data_dir=/nowhere",
        ),
    ],
)
def test_wrong_flags_keys_and_values(monkeypatch, capsys, tmp_path, arguments, status, message):
    flags = [f"--config={CONFIG}", f"--workdir={tmp_path}", *arguments]
    found_status, line = run_here(monkeypatch, capsys, "train", *flags)
    assert line.startswith("error: ")
    assert message in line
    assert found_status == status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"--config={CONFIG}"], "--workdir is missing"),
        (["--workdir=x", "--config=/nowhere.py"], "--config=/nowhere.py: no such file"),
        (["--workdir=x", "--config=/nowhere.py", "--config.seed=1"], "/nowhere.py"),
    ],
)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_missing_flags(monkeypatch, capsys, command, arguments, message):
    status, line = run_here(monkeypatch, capsys, command, *arguments)
    assert message in line
    assert status in (1, 2)


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("train", 2, "--config is missing"),
        ("evaluate", 1, "--workdir=x holds no config.json"),
    ],
)
def test_missing_config(monkeypatch, capsys, command, status, message):
    found_status, line = run_here(monkeypatch, capsys, command, "--workdir=x")
    assert message in line
    assert found_status == status


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("evaluate", ["--workdir={old}"]),
        ("evaluate", ["--workdir={old}", f"--config={CONFIG}"]),
        ("train", ["--workdir={old}", f"--config={CONFIG}"]),
        (
            "train",
            ["--workdir={new}", f"--config={CONFIG}", "--config.initial.workdir={old}"],
        ),
    ],
)
def test_workdir_of_an_earlier_version_is_named(
    monkeypatch, capsys, reference, tmp_path, command, flags
):
    workdir = tmp_path / "old"
    shutil.copytree(reference, workdir)
    remove_entry(workdir / "config.json", "task")
    for metrics in workdir.glob("checkpoints/*/metrics/metrics"):
        metrics.write_text('{"eval/accuracy": 0.5}')  # without a score
    files = sorted(workdir.rglob("*"))
    flags = [flag.format(old=workdir, new=tmp_path / "new") for flag in flags]
    status, line = run_here(monkeypatch, capsys, command, *flags)
    assert f"{workdir}/config.json has no entry 'task': an earlier version" in line
    assert status == 1
    assert sorted(workdir.rglob("*")) == files


def remove_entry(path, key):
    entries = json.loads(path.read_text())
    del entries[key]
    entries.pop("digest", None)
    path.write_text(json.dumps(entries))


def test_workdir_of_a_later_version_is_named(monkeypatch, capsys, reference, tmp_path):
    entries = json.loads((reference / "config.json").read_text())
    del entries["digest"]
    (tmp_path / "config.json").write_text(json.dumps(entries | {"new": {"entry": 1}}))
    status, line = run_here(monkeypatch, capsys, "evaluate", f"--workdir={tmp_path}")
    assert "it has an unknown entry 'new'; another version" in line
    assert status == 1


def test_wrong_argument_of_a_configuration_is_one_line(monkeypatch, capsys, tmp_path):
    config = tmp_path / "config.py"
    config.write_text("def get_config(arg):\n    raise ValueError(f'no variant {arg!r}')\n")
    flags = [f"--config={config}:big", "--workdir=x"]
    status, line = run_here(monkeypatch, capsys, "train", *flags)
    assert line == f"error: --config={config}:big: ValueError: no variant 'big' (line 2)"
    assert status == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.model=vit_s"], "holds a run with config.model='vit_ti', now it is 'vit_s'"),
        (["--config.batch_size=32"], "config.batch_size=16, now it is 32"),
    ],
)
def test_another_run_in_the_same_workdir(monkeypatch, capsys, reference, arguments, message):
    flags = [f"--config={RUN_CONFIG}", f"--workdir={reference}", *arguments]
    status, line = run_here(monkeypatch, capsys, "train", *flags)
    assert message in line
    assert status == 1


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_checkpoint_of_another_model(monkeypatch, capsys, reference, tmp_path, command):
    workdir = tmp_path / "copy"
    shutil.copytree(reference, workdir)
    (workdir / "config.json").unlink()
    overrides = "--config.model_overrides={'depth': 2}"
    flags = [f"--config={RUN_CONFIG}", f"--workdir={workdir}", overrides]
    status, line = run_here(monkeypatch, capsys, command, *flags)
    assert f"checkpoint {workdir / 'checkpoints' / '60'} belongs to another model" in line
    assert status == 1


@pytest.mark.parametrize(
    ("workdir", "message"),
    [
        ("{file}", "{file} is a file; valid: a folder"),
        ("{file}/run", "{file}/run cannot be written: {file} is not a folder"),
        ("/dev/null/run", "/dev/null/run cannot be written: /dev/null is not a folder"),
        ("/proc", "/proc cannot be written: no file can be made in /proc ("),
        ("/proc/run", "/proc/run cannot be written: no file can be made in /proc ("),
    ],
)
def test_workdir_that_cannot_be_made(monkeypatch, capsys, tmp_path, workdir, message):
    file = tmp_path / "file"
    file.write_text("")
    flags = [f"--config={CONFIG}", f"--workdir={workdir.format(file=file)}"]
    status, line = run_here(monkeypatch, capsys, "train", *flags)
    assert line.startswith(f"error: --workdir={message.format(file=file)}")
    assert status == 1


def test_no_end_of_an_evaluation_costs_steps_or_metrics(monkeypatch, capsys, tmp_path):
    """One that fails, one that a signal ends, and one whose training goes on."""
    config = token_run(monkeypatch)
    config.checkpoint_every_steps = 1000
    evaluate = loop.evaluate_batches

    def fail(*_, **kwargs):
        raise UserError("record 3 cannot be read")

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **kwargs)

    def last(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        signal.raise_signal(signal.SIGTERM)
        return metrics

    monkeypatch.setattr(loop, "evaluate_batches", fail)
    with pytest.raises(UserError, match="record 3 cannot be read"):
        loop.train(config, tmp_path)
    assert saved_steps(tmp_path) == [1]
    monkeypatch.setattr(loop, "evaluate_batches", interrupted)
    loop.train(config, tmp_path)
    assert "stopped and saved after step 1; the same command" in capsys.readouterr().out
    monkeypatch.setattr(loop, "evaluate_batches", last)
    loop.train(config, tmp_path)
    logged = [(line["step"], "eval/loss" in line) for line in metrics_of(tmp_path)]
    assert logged == [(1, False), (1, True), (2, False)]
    assert saved_steps(tmp_path) == [1, 2]
    assert load_checkpoint(tmp_path, "best").step == 1


def test_workers_start_before_the_model_and_end_with_the_run(monkeypatch, tmp_path):
    config = tiny_config.get_config().unlock()
    config.data.workers = 1
    before, started = children(), set()

    def fail(*_):  # the next call after the workers are started
        started.update(children() - before)
        raise UserError("no teacher")

    monkeypatch.setattr(loop, "taught_batches", fail)
    with pytest.raises(UserError, match="no teacher"):
        loop.train(config, tmp_path)
    assert len(started) == 2  # for training and for evaluation
    assert not children() & started


def children():
    """Returns the ids of the processes that this process has started and not yet waited for."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split()}


def test_metrics_that_are_not_finite_are_refused(tmp_path):
    absent = {"eval/loss": 1.0, "per_class/iou": {"sky": None}}
    check_metrics(absent, tmp_path / "5")
    message = f"eval/loss is nan in the evaluation of the checkpoint {tmp_path / '5'}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_metrics(absent | {"eval/loss": float("nan")}, tmp_path / "5")


def test_changed_settings_of_a_resumed_run_are_named(
    monkeypatch, capsys, caplog, reference, tmp_path
):
    workdir = tmp_path / "copy"
    shutil.copytree(reference, workdir)
    flags = [f"--config={RUN_CONFIG}", f"--workdir={workdir}", "--config.label_smoothing=0.1"]
    monkeypatch.setattr(sys, "argv", ["train", *flags])
    monkeypatch.setattr(stopping, "watch", lambda **_: None)
    with contextlib.suppress(SystemExit):
        runpy.run_module("tokenvit_jax.train", run_name="__main__")
    assert "config.label_smoothing changes from 0.0 to 0.1 in the resumed run" in caplog.text
    # The run was finished: nothing is computed or logged again.
    assert "finished 60 steps" in capsys.readouterr().out
    assert metrics_of(workdir) == metrics_of(reference)


def test_another_number_of_images_of_a_resumed_run_is_named(tmp_path, caplog):
    for progress in ({"records": 3}, {}):
        loop.warn_of_other_records(progress, [0, 1, 2], tmp_path)
    assert not caplog.records
    loop.warn_of_other_records({"records": 1200}, [0, 1, 2], tmp_path)
    assert "1,200 images so far, now there are 3:" in caplog.text
