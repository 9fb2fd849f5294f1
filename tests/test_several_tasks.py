"""Commands that do not divide their work refuse to run in several tasks or processes."""

import importlib

import jax
import pytest

from tokenvit_jax import slurm
from tokenvit_jax.__main__ import COMMANDS
from tokenvit_jax.tasks import default_config
from tokenvit_jax.training.workdir import write_config

SLURM = {"SLURM_STEP_NODELIST": "host[0-1]", "SLURM_NTASKS": "2"}
# Of the others, train divides its work, and the rest only print.
FLAGS = {
    "evaluate": {}, "predict": {"images": "x.png", "out": "out"}, "label": {"out": "out"},
    "convert": {"out": "out"}, "expedite": {"budget": 0.5, "out": "out"}, "export": {"out": "out"},
    "benchmark": {"report": "page.md"}, "prepare": {},
}  # fmt: skip
ONLY_PRINT = {"summary", "compile", "list"}
SOURCE = {"convert": "source"}  # flag for the run
WITHOUT_RUN = {"benchmark", "prepare"}


@pytest.fixture
def refused(monkeypatch, run, tmp_path):
    """Runs a command for a run without a checkpoint; returns its error."""
    config = default_config("classification")
    config.model, config.dataset = "dgt_t", "digits"
    write_config(tmp_path / "run", config)
    monkeypatch.chdir(tmp_path)

    def start(name):
        command = importlib.import_module(f"tokenvit_jax.{name}")
        main = command.main
        if name == "prepare":
            monkeypatch.setattr(command, "main", lambda flags: main(flags, "fashion_mnist"))
        own = {} if name in WITHOUT_RUN else {SOURCE.get(name, "workdir"): tmp_path / "run"}
        status, out, err = run(command, (), **own, **FLAGS[name])
        assert (status, out) == (1, "")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
        return err

    return start


def test_every_command_is_here():
    assert {*FLAGS, *ONLY_PRINT, "train"} == {*COMMANDS}


@pytest.mark.parametrize("name", FLAGS)
def test_tasks_of_slurm(name, refused, monkeypatch):
    for key, value in SLURM.items():
        monkeypatch.setenv(key, value)
    assert refused(name) == (
        f"error: {name} works in one process, and SLURM has started 2 tasks; valid: srun "
        "--ntasks=1, or SLURM_NTASKS=1 if only one task runs the command\n"
    )


@pytest.mark.parametrize("name", ["evaluate", "predict", "label", "expedite", "export"])
def test_processes_of_a_pod(name, refused, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    assert refused(name).startswith(f"error: {name} works in one process, and here are 4; valid: ")


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 1),
        ({"SLURM_NTASKS": "4"}, 1),  # the script of a job, outside its steps
        ({"SLURM_STEP_NODELIST": "a"}, 1),
        ({"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "4"}, 4),
        ({"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, 4),
        # The shell of `salloc --ntasks=4` where it is a step of its own.
        ({"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, 1),
        ({"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "4"}, 1),
    ],
)
def test_number_of_tasks(variables, count, monkeypatch):
    for name in ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert slurm.num_tasks() == count
