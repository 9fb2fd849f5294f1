import errno
import gc
import json
import logging
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import largest_file
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tokenvit_jax.errors import UserError
from tokenvit_jax.training import quiet_orbax
from tokenvit_jax.training.checkpoint import (
    Checkpoints,
    check_same_variables,
    load_checkpoint,
    saved_steps,
)
from tokenvit_jax.training.digests import sealed, unsealed
from tokenvit_jax.training.state import TrainState


def state_at(step, *, width=4, size=3, ema=False):
    params = {"head": {"kernel": jnp.full((size, width), float(step)), "bias": jnp.zeros(width)}}
    return TrainState(
        step=jnp.int32(step),
        params=params,
        model_state={"batch_stats": {"mean": jnp.full(width, 10.0 * step)}},
        opt_state=(jax.tree.map(jnp.ones_like, params), jnp.int32(step)),
        ema={"params": jax.tree.map(lambda x: x + 0.5, params)} if ema else None,
        skipped=jnp.int32(7),
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def open_checkpoints(workdir, keep_last=2, keep_best=1):
    score = lambda metrics: metrics["eval/accuracy"]  # noqa: E731
    return Checkpoints(workdir, keep_last=keep_last, keep_best=keep_best, score=score)


@pytest.fixture
def workdir(tmp_path):
    """Checkpoints of the steps 10, 20 and 30, the best one first."""
    with open_checkpoints(tmp_path, keep_last=3) as checkpoints:
        for step, accuracy in ((10, 0.9), (20, 0.5), (30, None)):
            checkpoints.save(step, state_at(step), {"data": {"next_index": step}})
            if accuracy is not None:
                checkpoints.record(step, {"eval/accuracy": accuracy})
    return tmp_path


def assert_state(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_restores_the_latest_state_and_its_progress(workdir):
    with open_checkpoints(workdir) as checkpoints:
        state, progress = checkpoints.restore(abstract(state_at(0)))
    assert_state(state, state_at(30))
    assert progress == {"data": {"next_index": 30}}


def test_keeps_the_last_and_the_best(workdir):
    with open_checkpoints(workdir, keep_last=2, keep_best=1) as checkpoints:
        checkpoints.restore(abstract(state_at(0)))
        checkpoints.save(40, state_at(40), {})
        checkpoints.record(40, {"eval/accuracy": 0.7})
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["10", "30", "40"]
    assert load_checkpoint(workdir, "best").step == 10
    assert load_checkpoint(workdir, "last").step == 40


def test_no_best_is_kept_when_none_is_asked_for(workdir):
    with open_checkpoints(workdir, keep_last=1, keep_best=0):
        pass
    assert saved_steps(workdir) == [30]


def test_a_better_checkpoint_replaces_the_best(workdir):
    with open_checkpoints(workdir, keep_last=1, keep_best=1) as checkpoints:
        checkpoints.save(40, state_at(40), {})
        checkpoints.record(40, {"eval/accuracy": 0.9})  # of equal ones, the latest
        checkpoints.save(50, state_at(50), {})  # not evaluated: never the best
    assert saved_steps(workdir) == [40, 50]
    assert load_checkpoint(workdir, "best").step == 40


def test_a_run_that_ends_before_its_evaluation_keeps_the_checkpoint(workdir):
    with open_checkpoints(workdir, keep_last=1) as checkpoints:
        checkpoints.save(40, state_at(40), {})
    with open_checkpoints(workdir, keep_last=1) as checkpoints:
        assert_state(checkpoints.restore(abstract(state_at(0)))[0], state_at(40))
        checkpoints.record(40, {"eval/accuracy": 0.95})
    assert saved_steps(workdir) == [40]


def test_saved_values_are_those_before_the_state_was_consumed(tmp_path):
    consume = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    state = state_at(5, width=1024, size=512)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {})
        consume(state)
    with open_checkpoints(tmp_path) as checkpoints:
        expected = state_at(5, width=1024, size=512)
        assert_state(checkpoints.restore(abstract(expected))[0], expected)


def damaged(path, how):
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("how", ["truncate", "delete"])
@pytest.mark.parametrize("pattern", ["model/d/*", "optimizer/d/*", "progress/metadata"])
def test_damaged_checkpoint_is_named_and_the_previous_one_used(workdir, caplog, pattern, how):
    folder = workdir / "checkpoints" / "30"
    for path in folder.glob(pattern):
        damaged(path, how)
    with open_checkpoints(workdir, keep_last=3) as checkpoints:
        state, progress = checkpoints.restore(abstract(state_at(0)))
        assert_state(state, state_at(20))
        assert progress == {"data": {"next_index": 20}}
        assert f"checkpoint {folder} cannot be read" in caplog.text
        checkpoints.save(30, state_at(30), {})  # its name is free again
    assert load_checkpoint(workdir).step == 30
    assert (workdir / "checkpoints" / "unreadable-30").is_dir()


def test_damaged_metrics_are_named(tmp_path, caplog):
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_at(step), {})
            checkpoints.record(step, {"eval/accuracy": 0.5})
    file = tmp_path / "checkpoints" / "1" / "metrics" / "metrics"
    damaged(file, "truncate")
    assert load_checkpoint(tmp_path).step == 2
    with pytest.raises(UserError, match="is best is not known; valid: last, 1, 2") as error:
        load_checkpoint(tmp_path, "best")
    assert str(file) in str(error.value)
    with open_checkpoints(tmp_path, keep_last=1) as checkpoints:
        assert_state(checkpoints.restore(abstract(state_at(0)))[0], state_at(2))
        checkpoints.save(3, state_at(3), {})
        checkpoints.record(3, {"eval/accuracy": 0.6})
    assert f"{file} is damaged" in caplog.text
    assert saved_steps(tmp_path) == [1, 3]  # 1 may have been the best


def test_unfinished_checkpoint_is_named_and_removed(workdir, caplog):
    folder = workdir / "checkpoints"
    unfinished = folder / "40.orbax-checkpoint-tmp"
    (folder / "30").rename(unfinished)
    with open_checkpoints(workdir) as checkpoints:
        assert_state(checkpoints.restore(abstract(state_at(0)))[0], state_at(20))
    assert f"checkpoint {unfinished} was not finished" in caplog.text
    assert not unfinished.exists()


def test_nothing_is_lost_when_no_checkpoint_can_be_read(workdir):
    for path in workdir.glob("checkpoints/*/model/manifest.ocdbt"):
        path.unlink()
    with (
        open_checkpoints(workdir) as checkpoints,
        pytest.raises(UserError, match=r"none of the checkpoints \[30, 20, 10\]"),
    ):
        checkpoints.restore(abstract(state_at(0)))
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["10", "20", "30"]


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"width": 5}, r"head/bias is float32\(4,\) there, float32\(5,\) here"),
        (
            {"ema": True},
            r"another model \(config.ema_decay was 0 there\); .* ema/params/head/bias is missing",
        ),
    ],
)
def test_checkpoint_of_another_model_is_named(workdir, other, difference):
    with open_checkpoints(workdir) as checkpoints, pytest.raises(UserError, match=difference) as e:
        checkpoints.restore(abstract(state_at(0, **other)))
    assert str(workdir / "checkpoints" / "30") in str(e.value)


def test_checkpoint_with_averages_names_the_entry(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(1, ema=True), {})
    refused = pytest.raises(UserError, match=r"\(config.ema_decay was above 0 there\)")
    with open_checkpoints(tmp_path) as checkpoints, refused:
        checkpoints.restore(abstract(state_at(1)))


def test_checkpoint_of_another_optimizer_names_the_entry(workdir):
    other = abstract(state_at(0).replace(opt_state=(jnp.int32(0),)))
    with (
        open_checkpoints(workdir) as checkpoints,
        pytest.raises(
            UserError, match=r"30 belongs to another optimizer \(config.optimizer\); 4 en"
        ),
    ):
        checkpoints.restore(other)
    assert saved_steps(workdir) == [10, 20, 30]


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_restores_on_another_number_of_devices(tmp_path, fsdp):
    kernel = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)

    def sharded(devices, spec):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",))
        state = state_at(1).replace(params={"kernel": kernel}, model_state={"mean": kernel[0]})
        return jax.device_put(state, NamedSharding(mesh, P())).replace(
            params={"kernel": jax.device_put(kernel, NamedSharding(mesh, spec))}
        )

    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, sharded(4, P("fsdp")), {})
    here = sharded(fsdp, P(None, "fsdp"))
    with open_checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(abstract(here))
    assert_state(restored, here)
    assert restored.params["kernel"].sharding == here.params["kernel"].sharding
    np.testing.assert_array_equal(load_checkpoint(tmp_path).variables["params"]["kernel"], kernel)


def test_other_values_than_those_saved_are_named(workdir, caplog):
    file = workdir / "checkpoints" / "30" / "digests" / "metadata"
    digests = unsealed(json.loads(file.read_text()))
    digests["model"]["params/head/bias"][1] = "0123456789abcdef"
    file.write_text(json.dumps(sealed(digests)))
    message = "1 of 5 arrays are not what was saved, such as params/head/bias"
    with pytest.raises(UserError, match=f"30 cannot be read: {message}; there are: 10, 20, 30"):
        load_checkpoint(workdir)
    with open_checkpoints(workdir) as checkpoints:
        assert_state(checkpoints.restore(abstract(state_at(0)))[0], state_at(20))
    assert f"30 cannot be read: {message}" in caplog.text


def test_run_of_an_earlier_version_has_no_digests(workdir):
    for step in (10, 20, 30):
        folder = workdir / "checkpoints" / str(step)
        shutil.rmtree(folder / "digests")
        metrics = unsealed(json.loads((folder / "metrics" / "metrics").read_text()))
        (folder / "metrics" / "metrics").write_text(json.dumps(metrics))
    shutil.rmtree(workdir / "checkpoints" / "30" / "metrics")
    assert load_checkpoint(workdir, "best").step == 10
    with open_checkpoints(workdir, keep_last=1) as checkpoints:
        assert_state(checkpoints.restore(abstract(state_at(0)))[0], state_at(30))
        with pytest.raises(UserError, match=r"another model; 2 entries"):
            checkpoints.restore(abstract(state_at(0).replace(params={"head": {}})))
    assert saved_steps(workdir) == [10, 30]


def test_strange_names_are_no_checkpoints(workdir, caplog):
    folder = workdir / "checkpoints"
    for name in (
        "²",
        "٣١",
        "007",
        "1e3",
        "-5",
        "40 (copy)",
        ".50",
        "60.orbax",
        "latest",
        "x.deleted",
    ):
        (folder / name).mkdir()
    (folder / "31").write_text("a file")
    (folder / "32").symlink_to("nowhere")
    (folder / "33").symlink_to("20")
    before = sorted(folder.iterdir())
    assert saved_steps(workdir) == [10, 20, 30, 33]
    assert load_checkpoint(workdir).step == 33  # a link to a checkpoint is one
    (folder / "33").unlink()
    (folder / "40").mkdir()  # empty: unreadable
    with open_checkpoints(workdir, keep_last=4) as checkpoints:
        assert_state(checkpoints.restore(abstract(state_at(0)))[0], state_at(30))
        checkpoints.save(31, state_at(31), {})
    assert "checkpoints/31 is renamed to unreadable-31" in caplog.text
    assert saved_steps(workdir) == [10, 20, 30, 31]
    assert {path.name for path in before} - {path.name for path in folder.iterdir()} == {"33"}


def test_checkpoints_that_are_deleted_while_it_runs(workdir, caplog):
    folder = workdir / "checkpoints"
    with open_checkpoints(workdir, keep_last=1, keep_best=1) as checkpoints:
        shutil.rmtree(folder / "30")
        checkpoints.record(30, {"eval/accuracy": 0.5})
        assert f"checkpoint {folder / '30'} was deleted" in caplog.text
        shutil.rmtree(folder)
        checkpoints.save(40, state_at(40), {})
        checkpoints.record(40, {"eval/accuracy": 0.5})
    assert load_checkpoint(workdir, "best").step == 40


def test_what_a_killed_deletion_left_is_removed(workdir):
    (workdir / "checkpoints" / "10").rename(workdir / "checkpoints" / "10.deleted")
    with open_checkpoints(workdir):
        pass
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["20", "30"]


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}/checkpoints cannot be written: .*File exists"):
        open_checkpoints(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoints"):
        load_checkpoint(tmp_path)


def test_metrics_that_cannot_be_written_leave_the_checkpoint(workdir):
    folder = workdir / "checkpoints" / "30"
    with open_checkpoints(workdir, keep_last=3) as checkpoints:
        with (
            largest_file(20),
            pytest.raises(UserError, match=f"{folder}/metrics.* cannot be written"),
        ):
            checkpoints.record(30, {"eval/accuracy": 0.5})
        assert_state(checkpoints.restore(abstract(state_at(0)))[0], state_at(30))
        assert load_checkpoint(workdir, "best").step == 10
        checkpoints.record(30, {"eval/accuracy": 0.95})
    assert load_checkpoint(workdir, "best").step == 30


@pytest.mark.parametrize("name", ["[a] b", "a*", "a?b", "a\\b", "gs:", "\udcff"])
def test_paths_that_the_storage_misreads_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"cannot hold checkpoints, because .*; valid: "):
        open_checkpoints(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_run_in_a_path_like_a_pattern_is_read(workdir):
    assert load_checkpoint(workdir.rename(workdir.with_name("[a]*?, ü"))).step == 30


@pytest.mark.filterwarnings("error")
def test_an_event_loop_without_files_leaves_nothing_to_close(monkeypatch):
    def fails(_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(quiet_orbax.PatientLoop, "_make_self_pipe", fails)
    with pytest.raises(OSError, match="Too many open files"):
        quiet_orbax.PatientLoop()
    gc.collect()


def test_failing_write_names_the_checkpoint_and_keeps_the_previous(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(1), {})
    large = state_at(2)
    noise = jax.random.normal(jax.random.key(0), (1024, 1024))  # does not compress
    large = large.replace(params={"kernel": noise})
    message = r"cannot be written: .*; complete checkpoints: 1$"
    refused = pytest.raises(UserError, match=message)
    with refused as error, largest_file(100_000), open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, large, {})
    assert str(tmp_path / "checkpoints" / "2") in str(error.value)
    with open_checkpoints(tmp_path) as checkpoints:
        assert_state(checkpoints.restore(abstract(state_at(0)))[0], state_at(1))


def test_loads_averaged_parameters_for_inference(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state_at(3, ema=True), {})
    loaded = load_checkpoint(tmp_path, "3")
    assert loaded.step == 3
    assert isinstance(loaded.variables["params"]["head"]["kernel"], np.ndarray)
    np.testing.assert_array_equal(loaded.variables["params"]["head"]["kernel"], 3.5)
    np.testing.assert_array_equal(loaded.variables["batch_stats"]["mean"], 30.0)


def test_state_without_other_collections(tmp_path):
    state = state_at(3).replace(model_state={})
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
    with open_checkpoints(tmp_path) as checkpoints:
        assert_state(checkpoints.restore(abstract(state))[0], state)
    assert set(load_checkpoint(tmp_path).variables) == {"params"}


@pytest.mark.parametrize(
    ("which", "message"),
    [("40", "no checkpoint '40' in .*valid: last, best, 10, 20, 30"), ("first", "valid: last")],
)
def test_missing_checkpoint_is_named_with_those_there_are(workdir, which, message):
    with pytest.raises(UserError, match=message):
        load_checkpoint(workdir, which)


def test_missing_workdir_and_best_are_named(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoints"):
        load_checkpoint(tmp_path / "nowhere")
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state_at(3), {})
    with pytest.raises(UserError, match="none of the checkpoints 3 in"):
        load_checkpoint(tmp_path, "best")


def test_damaged_checkpoint_cannot_be_loaded_for_inference(workdir):
    for path in workdir.glob("checkpoints/30/model/d/*"):
        damaged(path, "truncate")
    with pytest.raises(UserError, match=r"30 cannot be read.*there are: 10, 20, 30"):
        load_checkpoint(workdir)


def test_same_variables_pass():
    check_same_variables(state_at(1).params, state_at(2).params, "somewhere")


def test_orbax_does_not_repeat_the_errors_in_the_log():
    assert not logging.getLogger("absl").isEnabledFor(logging.ERROR)


def test_numbers_of_numpy_are_saved(tmp_path):
    """Converted weights can hold some beside arrays."""
    state = state_at(5)
    state = state.replace(params={**state.params, "alpha": np.float32(0.5)})
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {})
    assert load_checkpoint(tmp_path).variables["params"]["alpha"] == 0.5


def test_arrays_with_copies_on_all_devices_are_saved_as_they_are(tmp_path, caplog):
    """Cutting them into parts, as orbax does, compiles a program for each shape and device."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    state = jax.device_put(state_at(5, size=8 * mesh.size), NamedSharding(mesh, P()))
    with jax.log_compiles(), caplog.at_level(logging.WARNING), open_checkpoints(tmp_path) as saved:
        saved.save(5, state, {})
        saved.wait()
        assert not [line for line in caplog.messages if "XLA compilation" in line]
        restored, _ = saved.restore(abstract(state))
    chex.assert_trees_all_equal(restored, state)


@pytest.mark.parametrize("error", [MemoryError("no"), RuntimeError("RESOURCE_EXHAUSTED: 9 GiB")])
def test_a_lack_of_memory_sets_no_checkpoint_aside(workdir, monkeypatch, error):
    def fails(*_, **__):
        raise error

    with open_checkpoints(workdir) as checkpoints:
        monkeypatch.setattr(checkpoints._checkpointer, "restore", fails)
        with pytest.raises(UserError, match=rf"there is no memory, .*/30: {error}"):
            checkpoints.restore(abstract(state_at(0)))
    assert saved_steps(workdir)[-1] == 30
