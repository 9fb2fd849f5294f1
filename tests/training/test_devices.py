import collections
import functools
import os
import re
import signal
import socket
import types
from concurrent import futures

import jax
import numpy as np
import pytest
import started
from make_task import make_task
from sampled import sampled
from small_model import NUM_CLASSES, SmallModel, random_batch, small_config

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.kernels import platforms
from tokenvit_jax.ops.batch_norm import DeviceGroups
from tokenvit_jax.tasks import Outcome
from tokenvit_jax.training import devices, processes
from tokenvit_jax.training.batches import check_train_batch, prefetch
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.state import init_state
from tokenvit_jax.training.step import make_train_step

DEVICES = 8
KINDS = [devices.MeshParallel, devices.PmapParallel]


def mixing_config():
    config = small_config()
    config.mix.mixup = 0.8
    config.mix.cutmix = 1.0
    config.clip_norm = 1.0
    config.ema_decay = 0.9
    return config


def start(parallel, config, **model):
    """Returns the training step of the small model, and its first state."""
    model = SmallModel(axis_name=parallel.axis_name, **model)
    optimizer = make_optimizer(config)
    init_fn = functools.partial(init_state, model, optimizer, config)
    task = make_task(config, NUM_CLASSES, parallel.axis_name)
    make = make_train_step(task, model, optimizer)
    return parallel.train_step(make, parallel.abstract(init_fn)), parallel.init(init_fn)


def run_steps(parallel, config, num_steps=3):
    """Returns losses and the last state of a few steps, as numpy arrays."""
    step, state = start(parallel, config)
    losses = []
    for seed in range(num_steps):
        state, metrics = step(state, parallel.put_batch(random_batch(seed)))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state), state


@functools.cache
def on_eight_devices():
    return run_steps(devices.MeshParallel(), mixing_config())


def assert_same_run(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-5)
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(found[1]), jax.tree.leaves(expected[1]), strict=True
    )
    for (path, a), b in leaves:
        # The bias of keys has no effect, so its gradient is noise; Adam makes steps out of that.
        if not jax.tree_util.keystr(path).endswith("['qkv']['bias']"):
            name = jax.tree_util.keystr(path)
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_eight_devices_equal_one():
    assert jax.device_count() == DEVICES
    one = devices.MeshParallel(devices=jax.devices()[:1])
    assert_same_run(run_steps(one, mixing_config()), on_eight_devices())


@pytest.mark.slow
def test_pmap_equals_jit():
    assert_same_run(run_steps(devices.PmapParallel(), mixing_config()), on_eight_devices())


@pytest.mark.slow
def test_sharded_parameters_equal_replicated_ones():
    found = run_steps(devices.MeshParallel(fsdp=4), mixing_config())
    assert_same_run(found, on_eight_devices())
    kernel = found[2].params["patches"]["kernel"]  # (8, 8, 3, 8)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 8, 3, 8)}
    scale = found[2].params["norm"]["scale"]
    assert {shard.data.shape for shard in scale.addressable_shards} == {(8,)}


@pytest.mark.slow
def test_accumulation_gives_the_same_micro_batches_on_any_devices():
    config = mixing_config()
    config.accumulate_steps = 2
    jit = run_steps(devices.MeshParallel(), config, num_steps=2)
    pmap = run_steps(devices.PmapParallel(), config, num_steps=2)
    assert_same_run(pmap, jit)


def types_of(operation, program):
    """Counts the types of the arrays that an operation takes in a program before compilation."""
    calls = program.split(f'"stablehlo.{operation}"')[1:]
    ends = [r"\}\) : \((.*?)\) ->", r"\}> : \((.*?)\) ->"]  # with and without a region
    end = ends[operation == "all_gather"]
    calls = [re.search(end, call).group(1) for call in calls]
    return collections.Counter(re.findall(r"(b?f\d+)>", " ".join(calls)))


@pytest.mark.parametrize("kind", sampled(KINDS))
def test_gradients_travel_once_with_the_metrics(kind):
    config, parallel = mixing_config(), kind()
    config.accumulate_steps = 2
    step, state = start(parallel, config)
    lowered = step.lower(state, parallel.put_batch(random_batch(0)))
    assert types_of("all_reduce", lowered.as_text()).keys() == {"f32"}
    text = lowered.compile().as_text()
    all_reduce = r" all-reduce(-start)?\("
    # BatchNorm forward and backward, for every micro-batch; then, once per step, gradients, metrics
    # and the sums of the centroids.
    assert len(re.findall(all_reduce, text)) == 3
    assert len(re.findall(all_reduce, text[text.index("\nENTRY ") :])) == 1


@pytest.mark.parametrize("kind", sampled(KINDS))
def test_gradients_travel_in_the_type_of_the_config(kind):
    config, parallel = mixing_config(), kind()
    config.gradient_reduce_dtype = "bfloat16"
    step, state = start(parallel, config)
    types = types_of("all_reduce", step.lower(state, parallel.put_batch(random_batch(0))).as_text())
    matrices = [x for x in jax.tree.leaves(state.params) if x.ndim > 1]
    # All vectors are one array. In float32: statistics of BatchNorm, loss, skipped images, sums and
    # counts of the centroids.
    assert types == {"bf16": len(matrices) + 1, "f32": 6}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_gpus_gradients_travel_as_one_vector(monkeypatch, dtype):
    monkeypatch.setattr(platforms, "platform_of", lambda _: "cuda")
    config, parallel = mixing_config(), devices.MeshParallel()
    config.gradient_reduce_dtype = dtype
    step, state = start(parallel, config)
    traced = step.trace(state, parallel.put_batch(random_batch(0)))
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    # In float32 also: statistics of BatchNorm, sums and counts of the centroids.
    joined = {"float32": {"f32": 5}, "bfloat16": {"bf16": 1, "f32": 5}}[dtype]
    assert types_of("all_reduce", program) == joined


def test_sharded_weights_are_gathered_in_the_type_of_the_computation():
    config = small_config()
    config.model, config.dtype = "deit_ti", "bfloat16"
    config.model_overrides = {
        "dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 1, "patch_size": 16,
        "position_size": (32, 32),
    }  # fmt: skip
    parallel = devices.MeshParallel(fsdp=2)
    task = make_task(config, axis_name=parallel.axis_name)
    model, optimizer = task.make_model(), make_optimizer(config)
    state = parallel.abstract(functools.partial(init_state, model, optimizer, config))
    step = parallel.train_step(make_train_step(task, model, optimizer), state)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in random_batch(0).items()}
    program = step.lower(state, parallel.abstract_batch(shapes)).as_text()
    sharded = [x for x in jax.tree.leaves(state.params) if "fsdp" in x.sharding.spec]
    # The class token and the position embeddings, which are small, and the classifier, which
    # computes in float32, are gathered in float32. In bfloat16: the convolution of the patches,
    # qkv, projection, two layers of the MLP.
    assert types_of("all_gather", program) == {"bf16": 5, "f32": 3}
    assert len(sharded) == 8
    assert {x.dtype for x in sharded} == {np.dtype("float32")}
    assert types_of("reduce_scatter", program) == {"f32": len(sharded)}


def test_options_of_a_deterministic_step_are_for_gpus(monkeypatch):
    given = []
    monkeypatch.setattr(
        jax, "jit", lambda *args, compiler_options, **kw: given.append(compiler_options)
    )
    for platform, expected in (("cpu", None), ("gpu", {"xla_gpu_deterministic_ops": True})):
        client = types.SimpleNamespace(platform_version="")
        device = types.SimpleNamespace(platform=platform, client=client)
        with monkeypatch.context() as patch:
            mesh = types.SimpleNamespace(shape={"fsdp": 1})
            patch.setattr(jax, "make_mesh", lambda *args, mesh=mesh, **kw: mesh)
            patch.setattr(devices, "NamedSharding", lambda *args: None)
            parallel = devices.MeshParallel(devices=[device], deterministic=True)
            for make in (parallel.eval_step, parallel.batch_step):
                make(len)
            parallel.train_step(len, None)
        assert given == 3 * [expected]
        given.clear()


def test_batch_stays_divided_over_the_devices():
    config = mixing_config()
    parallel = devices.MeshParallel()
    step, state = start(parallel, config)
    program = step.lower(state, parallel.put_batch(random_batch(0))).compile().as_text()
    assert re.findall(r"(?:all-gather|all-to-all|collective-permute)\(.*", program) == []
    assert "all-reduce" in program


def row_step(axis_name):
    """An evaluation step whose rows are the batch, and whose sums add up the batch."""

    def step(variables, batch):
        total = (variables["factor"] * batch["x"]).sum()
        total = total if axis_name is None else jax.lax.psum(total, axis_name)
        return Outcome({"total": total}, {"x": batch["x"], "y": 2 * batch["y"]})

    return step


def norm_step(axis_name, size):
    """An evaluation step whose rows are normalized over groups of devices."""

    def step(variables, batch):
        group = DeviceGroups(axis_name, size)
        affine = variables["scale"], variables["bias"]
        y, mean, _ = ops.batch_norm(batch["x"], *affine, epsilon=1e-5, axis_name=group)
        return Outcome({}, {"y": y, "mean": jax.numpy.broadcast_to(mean, y.shape)})

    return step


def norm_rows(images):
    """Returns what :func:`norm_step` gives if a group of devices has a number of images."""
    x = row_batch()["x"].astype(np.float32)
    parts = x.reshape(-1, images, 2)
    mean, std = parts.mean(1, keepdims=True), np.sqrt(parts.var(1, keepdims=True) + 1e-5)
    return ((parts - mean) / std).reshape(x.shape), (mean + 0 * parts).reshape(x.shape)


def assert_normalized_in_groups(parallel, size, images, batch):
    step = parallel.eval_step(norm_step(parallel.axis_name, size))
    variables = {"scale": np.ones(2, np.float32), "bias": np.zeros(2, np.float32)}
    variables = parallel.put_variables(variables)
    rows = parallel.fetch(step(variables, parallel.put_batch(batch))).rows
    y, mean = norm_rows(images)
    np.testing.assert_allclose(rows["y"], y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows["mean"], mean, rtol=1e-5)


@pytest.mark.parametrize(("kind", "size"), [(k, size) for k in KINDS for size in (1, 4)])
def test_statistics_of_groups_of_devices(kind, size):
    assert_normalized_in_groups(kind(), size, size * 16 // DEVICES, row_batch())


def test_running_statistics_of_groups_are_averaged():
    """Each half of the devices normalizes its half of the batch; the state is the mean of both."""
    parallel, config = devices.MeshParallel(), small_config()
    step, state = start(parallel, config, norm_group=4)
    batch = random_batch(0)
    params = jax.device_get(state.params)  # the step consumes the state
    after, _ = step(state, parallel.put_batch(batch))
    kernel = params["patches"]["kernel"]
    images = make_task(config).normalize(batch["image"])
    patches = np.asarray(images).reshape(2, 8, 4, 8, 4, 8, 3)
    x = np.einsum("gbhiwjc,ijcd->gbhwd", patches, kernel).reshape(2, -1, 8)
    found = after.model_state["batch_stats"]["norm"]
    np.testing.assert_allclose(found["mean"], 0.1 * x.mean((0, 1)), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * x.var(1).mean(0), rtol=1e-4)
    shards = [np.asarray(shard.data) for shard in found["var"].addressable_shards]
    assert len(shards) == DEVICES
    for shard in shards[1:]:
        np.testing.assert_array_equal(shard, shards[0])


def row_batch():
    return {"x": np.arange(32.0).reshape(16, 2), "y": np.arange(16)}


@pytest.mark.parametrize("parallel", [devices.MeshParallel, devices.PmapParallel])
def test_rows_of_an_outcome_come_back_image_by_image(parallel):
    parallel, batch = parallel(), row_batch()
    step = parallel.eval_step(row_step(parallel.axis_name))
    variables = parallel.put_variables({"factor": np.float32(3)})
    sums, rows = parallel.fetch(step(variables, parallel.put_batch(batch)))
    assert float(sums["total"]) == 3 * batch["x"].sum()
    np.testing.assert_array_equal(rows["x"], batch["x"])
    np.testing.assert_array_equal(rows["y"], 2 * batch["y"])
    assert isinstance(rows["x"], np.ndarray)


TWO_PROCESSES = """
import sys
import jax, numpy as np
sys.path.insert(0, "tests/training")
from tokenvit_jax.training import devices, processes
processes.connect(sys.argv[1], 2, int(sys.argv[2]))
from test_devices import assert_normalized_in_groups, row_batch, row_step
from tokenvit_jax.data.cores import own_cores, share_of_cores
from tokenvit_jax.training.batches import cores_of_process
own = own_cores()
assert cores_of_process() == share_of_cores(own, [own, own])
part = {name: x[8 * jax.process_index() :][:8] for name, x in row_batch().items()}
for parallel in (devices.MeshParallel(), devices.PmapParallel()):
    step = parallel.eval_step(row_step(parallel.axis_name))
    variables = parallel.put_variables({"factor": np.float32(3)})
    sums, rows = parallel.fetch(step(variables, parallel.put_batch(part)))
    assert float(sums["total"]) == 3 * row_batch()["x"].sum(), sums
    np.testing.assert_array_equal(rows["x"], row_batch()["x"])
    np.testing.assert_array_equal(rows["y"], 2 * row_batch()["y"])
    for size in (1, 2):
        assert_normalized_in_groups(parallel, size, 4 * size, part)
print("equal")
"""


@pytest.mark.slow
def test_rows_of_two_processes_are_those_of_the_whole_batch(tmp_path):
    env = started.environment(tmp_path, devices=2) | {"PYTHONPATH": "tests:."}
    command = ["-c", TWO_PROCESSES, started.free_address()]
    for process in [started.start([*command, number], env) for number in range(2)]:
        assert "equal" in started.finish(process)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 12}, "batch_size=12 is not a multiple of 8 devices x 1"),
        ({"batch_size": 24, "accumulate_steps": 2}, "batch_size=24 is not a multiple of 8 devices"),
        ({"batch_size": 8, "mix.cutmix": 1.0}, "batch_size=8 gives each of 8 devices an odd"),
        (
            {"model_overrides": {"batch_norm": 3}},
            "model_overrides.batch_norm=3 does not divide the number of devices, 8",
        ),
    ],
)
def test_training_batches_that_do_not_fit_are_named(changes, message):
    config = small_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=re.escape(message)):
        check_train_batch(make_task(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.fsdp": 3}, "mesh.fsdp=3 does not divide the number of devices, 8"),
        ({"mesh.fsdp": 2, "parallel": "pmap"}, "mesh.fsdp=2 needs config.parallel='jit'"),
        (
            {"deterministic": True, "parallel": "pmap"},
            "deterministic=True needs config.parallel='jit'",
        ),
    ],
)
def test_devices_that_do_not_fit_are_named(changes, message):
    config = small_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=re.escape(message)):
        devices.make_parallel(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 2, None), "also need --process_id"),
        ((None, 2, 1), "also need --coordinator"),
        (("host:1", 2, 2), "--process_id=2 is not valid; with --num_processes=2 it is 0 to 1"),
        (("host", 2, 1), "--coordinator='host' is not valid; it has the form host:port"),
    ],
)
def test_wrong_process_flags_are_named(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        processes.connect(*arguments)


def test_unreachable_coordinator_is_named(monkeypatch):
    monkeypatch.setattr(processes, "CONNECT_TIMEOUT_SECONDS", 0.2)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but without a listener
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UserError, match=f"--coordinator={address} cannot be reached"):
            processes.connect(address, 2, 1)


def test_prefetched_batches_carry_the_state_of_their_own_position():
    class Counter:
        position = 0

        def __next__(self):
            self.position += 1
            return self.position

        def get_state(self):
            return {"next_index": self.position}

    batches = prefetch(Counter(), lambda batch: batch, size=3)
    assert [next(batches) for _ in range(3)] == [(n, {"next_index": n}) for n in (1, 2, 3)]


def test_sigterm_asks_to_stop():
    """In a notebook: a second signal and those afterwards have their former effect."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with processes.StopRequest() as stop:
            assert not stop.received()
            os.kill(os.getpid(), number)
            assert stop.received()
            assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
        assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_another_thread_handles_no_signals():
    with futures.ThreadPoolExecutor() as executor, processes.StopRequest() as outer:
        handler = signal.getsignal(signal.SIGINT)

        def inner():
            with processes.StopRequest() as stop:
                assert signal.getsignal(signal.SIGINT) is handler
                return stop.received()

        assert not executor.submit(inner).result()
        assert not outer.received()
