import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import default_config
from tokenvit_jax.training import train_log
from tokenvit_jax.training.batches import WaitWarning
from tokenvit_jax.training.train_log import Profile, TrainLog, read_metrics
from tokenvit_jax.training.workdir import check_same_run, read_config, write_config


class Waits(WaitWarning):
    """A warning that keeps what it is told."""

    def __init__(self):
        super().__init__(0, 1)
        self.told = []

    def add(self, waited, elapsed):
        self.told.append((waited, elapsed))


def open_log(workdir, steps_done=0, enabled=True, waited=lambda: 0.0, warning=None):
    return TrainLog(
        workdir,
        steps_done=steps_done,
        num_steps=100,
        batch_size=8,
        every_steps=2,
        waited=waited,
        warning=warning or Waits(),
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


@pytest.mark.parametrize("enabled", [True, False])
def test_the_share_of_the_time_without_data(tmp_path, monkeypatch, enabled):
    """Every process tells its own warning; the main one logs its share."""
    now, waited, warning = 100.0, 3.0, Waits()
    monkeypatch.setattr(train_log.time, "monotonic", lambda: now)
    with open_log(tmp_path, enabled=enabled, waited=lambda: waited, warning=warning) as log:
        log.write_steps([(1, metrics(3.0))])  # the clock has not been started
        log.restart_clock(1)
        now, waited = 104.0, 4.0
        log.write_steps([(2, metrics(2.5))])
        now, waited = 105.0, 4.0
        log.write_steps([(3, metrics(2.5))])
        now, waited = 112.0, 10.0
        log.write_steps([(4, metrics(2.5))])
    assert warning.told == [(1.0, 4.0), (6.0, 8.0)]
    if enabled:
        shares = [(line["data/wait"], line["images_per_second"]) for line in read_metrics(tmp_path)]
        assert shares == [(0.25, 2.0), (0.75, 2.0)]


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
    assert "images_per_second=" in shown.err and "data/wait=0" in shown.err


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


def test_damaged_lines_are_set_aside_and_the_run_goes_on(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    good = [b'{"step": 1, "loss": 0.50}', b'{"step": 2, "loss": NaN}', b'{"step": 3, "loss": 1}']
    bad = [
        bytes(64), b'{"st', b"", b"[]", b"3", b'{"loss": 1.0}', b'{"step": "2", "loss": 1.0}',
        b'{"step": true}', b'{"step": 1.5}', b'{"step": null}', b'{"step": 2, "loss": "x"}',
        b'{"step": 2, "\xff": 1}', b"[" * 100_000,
    ]  # fmt: skip
    path.write_bytes(b"\n".join([good[0], *bad, good[1], good[2] + b"\r", b'{"step": 4, "lo']))
    content = path.read_bytes()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert f"{path}: 13 of 16 lines cannot be read and are left out: line 2, 3" in caplog.text
    assert path.read_bytes() == content
    for repeated in (1, 2):
        with open_log(tmp_path, steps_done=2) as log:
            log.write(3, {"loss": 2.0})
        assert path.read_bytes() == b"\n".join([*good[:2], b'{"step": 3, "loss": 2.0}', b""])
        aside = (tmp_path / "metrics.jsonl.damaged").read_bytes()
        assert aside == b"".join(line + b"\n" for line in bad) * repeated
        path.write_bytes(content)
    caplog.clear()
    path.write_bytes(good[0])  # only the line end is missing
    assert [line["loss"] for line in read_metrics(tmp_path)] == [0.5]
    assert caplog.text == ""
    path.write_bytes(bytes(64))
    assert not read_metrics(tmp_path)
    assert f"{path}: 1 of 1 lines cannot be read" in caplog.text


def test_metrics_that_cannot_be_read_are_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read: Is a directory"):
        open_log(tmp_path)
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/zero")  # would never end
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read: not a regular file"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("gone", ["metrics.jsonl", "events", "run"])
def test_logs_that_are_deleted_while_training_are_written_again(tmp_path, gone, caplog):
    workdir = tmp_path / "run"
    write_config(workdir, default_config("classification"))
    with open_log(workdir) as log:
        log.write(1, {"loss": 1.0})
        for path in [workdir] if gone == "run" else workdir.glob(f"{gone}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        log.write(2, {"loss": 0.5})
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2]
    assert read_config(workdir).seed == 0
    found = list(events(next(workdir.glob("events.out.tfevents.*"))))
    assert found == [(1, "loss", 1.0), (2, "loss", 0.5)]
    assert "was deleted while it is written: written again" in caplog.text


def test_a_profile_that_cannot_be_written_does_not_end_the_training(tmp_path, caplog):
    (tmp_path / "profile").write_text("")
    with jax.profiler.trace(str(tmp_path / "other")), Profile(tmp_path, 1, 1) as profile:
        profile.before(1)
        profile.after(1, jnp.ones(3))
    assert "profile cannot be written: " in caplog.text


# ------------------------------------------------------------------------------------------------
# The configuration
# ------------------------------------------------------------------------------------------------


def test_missing_or_damaged_configuration_is_named(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"holds no config\.json"):
        read_config(tmp_path)
    contents = (b'{"seed": ', b"", bytes(9), b"\xff", b"[" * 100_000, b'{"seed": ' + b"1" * 9999)
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path} is not readable: "):
            read_config(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=rf"{path} cannot be read: Is a directory"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], r"holds \[\]; valid: the entries of a configuration"),
        (None, "holds None; valid: the entries of a configuration"),
        ({"optimizer": 3}, "entry 'optimizer' is 3; valid: entries by name"),
        ({"optimizer": None}, "entry 'optimizer' is None; valid: entries by name"),
        ({"optimizer": {"name": 3}}, "entry 'optimizer.name' is 3; valid: such as 'adamw'"),
        ({"optimizer": {"zzz": 3}}, r"it has an unknown entry 'optimizer\.zzz'"),
        ({"model_overrides": [1]}, "entry 'model_overrides' is .1.; valid: entries by name"),
        ({"model_overrides": {"a.b": 1}}, "entry 'model_overrides' is {'a.b': 1}; valid"),
        ({"batch_size": "abc"}, "entry 'batch_size' is 'abc'; valid: such as 128"),
        ({"batch_size": None}, "entry 'batch_size' is None; valid: such as 128"),
        ({"zzz": 1}, "it has an unknown entry 'zzz'"),
        ({"task": "cooking"}, "config.task='cooking' is not valid; valid: classification"),
        ({"task": ["x"]}, "config.task=.* is not valid"),
        ({"task": None}, "config.task='None' is not valid"),
    ],
)
def test_a_configuration_that_is_none_names_file_and_entry(tmp_path, change, message):
    path = tmp_path / "config.json"
    write_config(tmp_path, default_config("classification"))
    stored = json.loads(path.read_text())
    digest = stored.pop("digest")
    if not isinstance(change, dict):
        path.write_text(json.dumps(change))
    else:
        for key, value in change.items():
            is_group = isinstance(value, dict) and isinstance(stored[key], dict)
            stored[key] = stored[key] | value if is_group else value
        path.write_text(json.dumps(stored | {"digest": digest}))
        edited = f"{path} was damaged or edited after it was written: .*{message}.*'digest'"
        with pytest.raises(UserError, match=edited):
            read_config(tmp_path)
        path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=f"{path}.*{message}"):
        read_config(tmp_path)


def test_no_damage_of_the_configuration_is_read(tmp_path):
    """Every cut, and one flipped bit in every byte, gives one line or the same values."""
    config = default_config("segmentation")
    write_config(tmp_path, config)
    path = tmp_path / "config.json"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damages = [whole[:size] for size in range(0, len(whole), 50)]
    for place in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        damages.append(bytes(flipped))
    refused = 0
    for damaged in damages:
        path.write_bytes(damaged)
        try:
            assert read_config(tmp_path).to_dict() == config.to_dict()
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 0.9 * len(damages)


def test_an_edit_on_purpose_is_read_without_its_digest(tmp_path):
    config = default_config("classification")
    write_config(tmp_path, config)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["seed"] = 7
    (tmp_path / "config.json").write_text(json.dumps(stored))
    for function in (read_config, lambda workdir: check_same_run(workdir, config, 0)):
        with pytest.raises(UserError, match="its values do not match its digest; if the edit is"):
            function(tmp_path)
    del stored["digest"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert read_config(tmp_path).seed == 7
