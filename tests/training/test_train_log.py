import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import default_config
from tokenvit_jax.training.train_log import Profile, TrainLog, read_metrics
from tokenvit_jax.training.workdir import check_same_run, read_config, write_config


def open_log(workdir, steps_done=0, enabled=True):
    return TrainLog(
        workdir,
        steps_done=steps_done,
        num_steps=100,
        batch_size=8,
        every_steps=2,
        enabled=enabled,
    )


def metrics(loss):
    return {"loss": np.float32(loss), "grad_norm": np.float32(1.0)}


def events(path):
    """Scalars of an event file, a series of length (8), checksum (4), event, checksum (4)."""
    data, position = path.read_bytes(), 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 8], "little")
        event = Event.FromString(data[position + 12 : position + 12 + length])
        position += 16 + length
        for value in event.summary.value:
            yield event.step, value.tag, value.simple_value


def test_logs_every_other_step_to_json_and_tensorboard(tmp_path, capsys):
    with open_log(tmp_path) as log:
        log.write_steps([(1, metrics(3.0))])
        log.restart_clock(1)
        log.write_steps([(2, metrics(2.5)), (3, metrics(2.25))])
        log.write(3, {"eval/accuracy": 0.5})
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 3]
    assert lines[0]["loss"] == 2.5
    assert lines[0]["images_per_second"] > 0
    assert lines[1] == {"step": 3, "eval/accuracy": 0.5}
    found = list(events(next(tmp_path.glob("events.out.tfevents.*"))))
    assert (2, "loss", 2.5) in found
    assert (3, "eval/accuracy", 0.5) in found
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("step 2  loss 2.5  grad_norm 1  images_per_second ")
    assert out[1] == "step 3  eval/accuracy 0.5"


def test_resuming_drops_later_steps_and_a_line_that_was_cut_off(tmp_path):
    lines = [{"step": step, "loss": 0.1 * step} for step in (2, 4, 6)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 8, "lo')
    assert read_metrics(tmp_path) == lines
    with open_log(tmp_path, steps_done=5) as log:
        log.write_steps([(6, metrics(1.0))])
    assert read_metrics(tmp_path) == [*lines[:2], {"step": 6, "loss": 1.0, "grad_norm": 1.0}]


def test_a_terminal_shows_one_bar_and_the_evaluations(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with open_log(tmp_path) as log:
        log.restart_clock(0)
        log.write_steps([(2, metrics(2.5))])
        log.write(2, {"eval/accuracy": 0.5})
    shown = capsys.readouterr()
    assert shown.out == "step 2  eval/accuracy 0.5\n"
    assert "2/100" in shown.err
    assert "loss=2.5" in shown.err
    assert "images_per_second=" in shown.err


def test_other_processes_write_nothing(tmp_path, capsys):
    with open_log(tmp_path, enabled=False) as log:
        log.write_steps([(2, metrics(2.5))])
        log.write(2, {"eval/accuracy": 0.5})
        log.note("text")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("last_step", [2, 9])
def test_profile_of_some_steps(tmp_path, last_step):
    with Profile(tmp_path, 2, last_step) as profile:
        for step in (1, 2, 3):
            profile.before(step)
            assert (tmp_path / "profile").exists() == (step > last_step)
            profile.after(step, jnp.ones(3) * step)
    assert list((tmp_path / "profile").glob("plugins/profile/*/*"))
    # The trace has ended, so another one can start.
    with jax.profiler.trace(str(tmp_path / "again")):
        pass


def test_configuration_is_read_back_as_it_was_written(tmp_path):
    config = default_config("classification")
    config.model_overrides.depths = (1, 2)
    config.augment.crop_scale = (0.5, 1.0)
    write_config(tmp_path / "run", config)
    found = read_config(tmp_path / "run")
    assert found.to_dict() == config.to_dict()
    check_same_run(tmp_path / "run", config, 0)
    config.seed = 3
    with pytest.raises(UserError, match=r"config\.seed=0, now it is 3"):
        check_same_run(tmp_path / "run", config, 0)


def test_missing_or_damaged_configuration_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config\.json is not readable"):
        read_config(tmp_path)
