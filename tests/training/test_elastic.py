"""A run goes on with another number of devices: the same batches, losses within rounding."""

import json
import shutil

import jax
import pytest
from timings import without_timings

from tokenvit_jax.tasks import default_config
from tokenvit_jax.training.loop import train

STEPS = {8: 2, 4: 4, 1: 6}  # last step of the run on each number of devices


def config_of_run():
    config = default_config("classification")
    config.model = "deit_ti"
    config.model_overrides = {
        "dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 1, "patch_size": 16,
        "position_size": (32, 32), "drop_path": 0.1,
    }  # fmt: skip
    config.image_size, config.batch_size, config.data.eval_batch_size = 32, 16, 360
    config.mix.mixup = 0.5
    config.num_steps, config.log_every_steps, config.keep_last_checkpoints = 6, 1, 9
    config.eval_every_steps, config.checkpoint_every_steps = 6, 2
    return config


def metrics_of(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [*map(without_timings, lines)]


@pytest.mark.slow
def test_eight_then_four_devices_then_one(tmp_path, monkeypatch):
    all_devices, config = jax.devices(), config_of_run()
    assert len(all_devices) == 8
    train(config, tmp_path / "8")
    former = "8"
    for count in (4, 1):
        monkeypatch.setattr(jax, "devices", lambda *_, count=count: all_devices[:count])
        monkeypatch.setattr(jax, "device_count", lambda *_, count=count: count)
        workdir = tmp_path / str(count)
        shutil.copytree(tmp_path / former, workdir)
        begin = {4: STEPS[8], 1: STEPS[4]}[count]
        for checkpoint in (workdir / "checkpoints").iterdir():
            if checkpoint.name.isdigit() and int(checkpoint.name) > begin:
                shutil.rmtree(checkpoint)
        train(config, workdir)
        former = str(count)
    expected, found = metrics_of(tmp_path / "8"), metrics_of(tmp_path / "1")
    assert [line["step"] for line in expected if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert len(found) == len(expected)
    for line, reference in zip(found, expected, strict=True):
        assert line == pytest.approx(reference, rel=1e-4)
    assert found != expected  # the later steps were computed anew, and round otherwise
