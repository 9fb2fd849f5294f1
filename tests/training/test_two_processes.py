"""Networks of dense tasks train and are evaluated in two real processes as in one."""

import json

import jax
import pytest
import started
import tiny_detector
import tiny_masks
import tiny_pose
from timings import without_timings

from tokenvit_jax.tasks.detection.task import Detection
from tokenvit_jax.tasks.masks.task import Masks
from tokenvit_jax.training import devices
from tokenvit_jax.training.loop import train


def metrics_of(workdir):
    return [without_timings(json.loads(line)) for line in (workdir / "metrics.jsonl").open()]


# Compiling takes nearly all of the time. tests/test_train_command.py has a classifier.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "argument", "num_steps", "metric"),
    [
        (tiny_detector, "retinanet", 1, "eval/box_ar100"),  # one of its canvases
        (tiny_detector, "mask_rcnn", 2, "eval/box_ar100"),
        (tiny_masks, "semantic", 2, "eval/miou"),
        (tiny_pose, "mta", 2, "eval/body_ar"),
        (tiny_pose, "deconvolution", 2, "eval/body_ar"),
    ],
)
def test_two_processes_equal_one(module, argument, num_steps, metric, tmp_path, monkeypatch):
    """The first two steps of a detector have different canvases, the same in all processes."""
    config = module.get_config(argument)
    config.num_steps = num_steps
    env = started.environment(tmp_path / "compiled") | {"PYTHONPATH": "tests:."}
    flags = f"--config={module.__file__}:{argument}", f"--config.num_steps={num_steps}"
    command = ["-m", "tokenvit_jax.train", *flags, f"--workdir={tmp_path / 'two'}"]
    processes = started.start_several(2, command, env)

    one = devices.MeshParallel(devices=jax.devices()[:1])
    monkeypatch.setattr(devices, "make_parallel", lambda config: one)
    # As in several processes, all images are evaluated on the square canvas.
    for task in (Detection, Masks):
        monkeypatch.setattr(task, "grouped", lambda self, batches: batches)
    train(config, tmp_path / "one")
    for process in processes:
        started.finish(process)

    found, expected = metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one")
    steps = [*range(1, num_steps + 1), num_steps]
    assert [line["step"] for line in found] == [line["step"] for line in expected] == steps
    for line, wanted in zip(found, expected, strict=True):
        # After a step, rounding can move a cell of a mask to the other side of one half.
        assert line == pytest.approx(wanted, rel=1e-4 if line["step"] == 1 else 1e-3)
    assert all(line["loss"] > 0 for line in found[:-1])
    assert found[-1][metric] > 0
