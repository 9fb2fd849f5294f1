"""Four processes train as one does, and a run goes on with other numbers of processes.

    pytest tests/stress/test_many_processes.py -m stress

All processes are real, with their own virtual devices, and exchange arrays through the network.
"""

import json
from pathlib import Path

import pytest
from started import environment, finish, free_address, start, start_several
from timings import without_timings

pytestmark = pytest.mark.stress

CONFIG = Path(__file__).with_name("tiny_vit.py")
LAST = 60  # step of `tiny_vit.py`
# Processes, devices of each, step after which the run is stopped; one after another.
STAGES = [(4, 2, 16), (2, 2, 32), (1, 1, LAST)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder in which the processes share compiled programs."""
    return tmp_path_factory.mktemp("compiled")


def finish_all(processes):
    """Returns the output of process 0, after all have ended without an error."""
    outputs = [finish(process, timeout=1800)[0] for process in processes]
    return outputs[0]


def run(compiled, workdir, processes, devices, stop_after):
    """Trains, and stops all processes by a signal to one of them."""
    command = ["-m", "tokenvit_jax.train", f"--config={CONFIG}", f"--workdir={workdir}"]
    env = environment(compiled, devices)
    started = start_several(processes, command, env) if processes > 1 else [start(command, env)]
    if stop_after < LAST:
        for line in started[0].stdout:
            if line.startswith("step ") and int(line.split()[1].split("/")[0]) >= stop_after:
                break
        started[-1].terminate()
    finish_all(started)


def metrics_of(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [*map(without_timings, lines)]


@pytest.fixture(scope="module")
def reference(compiled, tmp_path_factory):
    """Metrics of an undisturbed run of one process with eight devices."""
    workdir = tmp_path_factory.mktemp("reference")
    run(compiled, workdir, 1, 8, LAST)
    return metrics_of(workdir)


def assert_same_run(found, expected):
    """The same batches in the same order, losses within rounding."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        if "loss" in line:
            assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
            # Differs by a factor of two from batch to batch.
            assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
            assert line["data/skipped"] == wanted["data/skipped"]


def test_four_processes_with_two_devices_equal_one_with_eight(compiled, reference, tmp_path):
    run(compiled, tmp_path, 4, 2, LAST)
    assert_same_run(metrics_of(tmp_path), reference)


def test_processes_and_devices_come_and_go(compiled, reference, tmp_path):
    for processes, devices, stop_after in STAGES:
        run(compiled, tmp_path, processes, devices, stop_after)
        last = metrics_of(tmp_path)[-1]["step"]
        assert stop_after <= last and (last < LAST or stop_after == LAST)
    assert_same_run(metrics_of(tmp_path), reference)


def test_batch_norm_over_processes(compiled):
    """Over all devices, over groups in one or in several processes, and on each device."""
    script = Path(__file__).with_name("norm_groups.py")
    found = []
    for processes, devices in ((1, 8), (4, 2)):
        address = free_address()
        env = environment(compiled, devices)
        started = [start([script, address, processes, i], env) for i in range(processes)]
        found.append(json.loads(finish_all(started).splitlines()[-1]))
    expected, found = found
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values == pytest.approx(expected[name], rel=1e-4), name
    assert len({tuple(values) for values in expected.values()}) > 3  # groups change what is trained
