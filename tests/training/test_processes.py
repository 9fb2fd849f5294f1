"""Several processes of a run: which devices each has, and what all of them must agree on."""

import jax
import pytest
import started

from tokenvit_jax.errors import UserError
from tokenvit_jax.training import processes

SLURM = {
    "SLURM_JOB_ID": "17", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0",
}  # fmt: skip

TOGETHER = """
import logging
import sys
from pathlib import Path

import jax

from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import default_config
from tokenvit_jax.training import compiled, processes
from tokenvit_jax.training.lock import workdir_lock

def refused(action):
    try:
        action()
    except (OSError, UserError) as error:
        return str(error)

def fail():
    raise OSError("the disk is full")

def refuse():
    raise PermissionError("the folder may not be read")

def hold(folder):
    with workdir_lock(folder):
        return (folder / "lock").exists()

visible = "2,3"
jax.config.update("jax_cuda_visible_devices", visible)
processes.connect(*(sys.argv[2:] and (sys.argv[2], 2, int(sys.argv[3]))))
found = jax.config.values["jax_cuda_visible_devices"]
assert (jax.process_count(), found) == (2, visible)

processes.SHARED_SECONDS = 0.5
folder = Path(sys.argv[1])
main = jax.process_index() == 0
own = folder / f"host {jax.process_index()}"
own.mkdir()
assert processes.is_shared(folder) and not processes.is_shared(own)
assert not processes.is_shared(folder / "missing")
assert processes.everywhere(True) and not processes.everywhere(main)
message = "the disk is full" if main else "the main process failed; it says why"
assert refused(lambda: processes.on_main_process(fail)) == message
processes.on_main_process(lambda: None)
assert hold(folder)
assert f"--workdir={own} is not one folder for all processes" in refused(lambda: hold(own))
assert refused(lambda: processes.check_alone("evaluate")).startswith("evaluate works in one proc")

config = default_config("classification")
given = jax.config.jax_compilation_cache_dir
for name, kept in (("", True), (str(folder / "cache"), True), (str(own), False)):
    compiled._decided = False
    config.compilation_cache = name
    compiled.keep_compiled(config)
    entries = {*folder.rglob("*-cache")}
    jax.jit(lambda x: x + len(name)).lower(1.0).compile()
    assert not main or ({*folder.rglob("*-cache")} > entries) == kept, name
assert jax.config.jax_compilation_cache_dir.startswith(str(folder / "cache"))
jax.config.update("jax_enable_compilation_cache", True)
jax.config.update("jax_compilation_cache_dir", str(own))
compiled._decided, config.compilation_cache = False, ""
compiled.keep_compiled(config)
jax.jit(lambda x: x * 7).lower(1.0).compile()
assert not [*own.rglob("*-cache")]
Path.exists = lambda self: refuse() if self.name.startswith(".shared") and not main else True
assert not processes.is_shared(folder)  # and no process waits
assert processes.everywhere(True)  # the main process has deleted its file by now
assert not [*folder.glob(".shared*"), *own.glob(".shared*")]
"""


@pytest.mark.slow
@pytest.mark.parametrize("found", ["by SLURM", "by flags"])
def test_processes_agree(found, tmp_path):
    """In a SLURM job, jax would give each of them one device of its host."""
    env = started.environment(tmp_path / "compiled")
    command = ["-c", TOGETHER, tmp_path]
    address = started.free_address()
    running = []
    for number in range(2):
        if found == "by SLURM":
            places = {"SLURM_PROCID": str(number), "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
            places["JAX_COORDINATOR_PORT"] = address.rpartition(":")[2]
            running.append(started.start(command, env | SLURM | places))
        else:
            places = {"SLURM_PROCID": str(number), "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
            running.append(started.start([*command, address, number], env | SLURM | places))
    for process in running:
        started.finish(process)


@pytest.mark.parametrize(
    ("changes", "visible"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, "2,3"),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, "2,3"),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, "0"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1"}, "0"),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "JAX_LOCAL_DEVICE_IDS": "0"}, "0"),
    ],
    ids=str,
)
def test_devices_of_tasks_of_slurm(monkeypatch, changes, visible):
    def initialize():
        jax.config.update("jax_cuda_visible_devices", "0")

    for name, value in (SLURM | changes).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    before = jax.config.values["jax_cuda_visible_devices"]
    jax.config.update("jax_cuda_visible_devices", "2,3")  # of the user
    try:
        processes.connect()
        assert jax.config.values["jax_cuda_visible_devices"] == visible
    finally:
        jax.config.update("jax_cuda_visible_devices", before)


def test_a_tpu_of_its_own(monkeypatch, caplog):
    """Without names of hosts there is one; a service that does not answer is an error."""
    monkeypatch.setenv("TPU_ML_PLATFORM", "JAX")
    for error in (ValueError("coordinator_address should be defined."), OSError("no answer")):
        monkeypatch.setattr(jax.distributed, "initialize", lambda error=error: throw(error))
        if isinstance(error, ValueError):
            processes.connect()
        else:
            with pytest.raises(UserError, match=r"this TPU \(no answer\); pass --coordinator, --"):
                processes.connect()


def throw(error):
    raise error
