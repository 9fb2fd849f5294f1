"""Devices and processes. No other file knows about meshes, pmap or processes.

`MeshParallel` runs a step under `jax.jit` over a mesh of all devices of all processes, optionally
with sharded parameters; `PmapParallel` runs it under `jax.pmap`. Both have the same methods and
give the same numbers.
"""

import contextlib
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError

CONNECT_TIMEOUT_SECONDS = 120  # to wait for the process that coordinates the others

_BATCH_SPEC = P(("data", "fsdp"))
_PMAP_AXIS = "devices"


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a run; to be called before anything else touches a device.

    Without arguments: found automatically on TPU pods and under SLURM, else one process.

    Args:
      coordinator: "host:port" of process 0.
      num_processes: number of processes.
      process_id: of this process, from 0.

    Raises:
      UserError: some arguments are missing or wrong, or the coordinator cannot be reached.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if _in_cluster():
            jax.distributed.initialize()
        return
    if missing:
        raise UserError(f"several processes also need {' and '.join(missing)}")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} is not valid; with --num_processes={num_processes} it is "
            f"0 to {num_processes - 1}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={coordinator!r} is not valid; it has the form host:port")
    if process_id:
        # jax itself would abort the process with a stack trace.
        _wait_for(host, int(port))
    jax.distributed.initialize(coordinator, num_processes, process_id)


def _in_cluster() -> bool:
    """Whether jax can find the processes of this run by itself."""
    # jax's condition for SLURM; a job of one task needs no coordinator.
    slurm = "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1
    # Set by `import jax` on a Cloud TPU machine.
    tpu = os.environ.get("TPU_ML_PLATFORM") == "JAX"
    return slurm or tpu


def _wait_for(host: str, port: int) -> None:
    deadline = time.monotonic() + CONNECT_TIMEOUT_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--coordinator={host}:{port} cannot be reached for {CONNECT_TIMEOUT_SECONDS} "
                    f"seconds ({error}); process 0 must be running there"
                ) from error
        time.sleep(0.5)


class MeshParallel:
    """`jax.jit` over a mesh of all devices with the axes "data" and "fsdp".

    The batch is split over both axes. With `fsdp` above 1, the matrices among the parameters, their
    averages and the optimizer's state are kept split over the axis "fsdp"; a step gathers the
    parameters once and updates each part where it is kept.
    """

    axis_name = None

    def __init__(self, fsdp: int = 1):
        shape = (jax.device_count() // fsdp, fsdp)
        self._mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        self._replicated = NamedSharding(self._mesh, P())
        self._batch_sharding = NamedSharding(self._mesh, _BATCH_SPEC)

    def abstract(self, init_fn: Callable[[], Any]) -> Any:
        """Returns shapes, types and shardings of the state `init_fn()`, as :meth:`to_global`."""
        state = jax.eval_shape(init_fn)
        return jax.tree.map(_with_sharding, state, self._shardings(state))

    def init(self, init_fn: Callable[[], Any]) -> Any:
        """Returns the state `init_fn()`, laid out over the devices."""
        shardings = self._shardings(jax.eval_shape(init_fn))
        return jax.jit(init_fn, out_shardings=shardings, compiler_options=_quick_to_compile())()

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Moves this process's part of a batch to its devices, as part of the global batch."""
        return {
            name: jax.make_array_from_process_local_data(self._batch_sharding, values)
            for name, values in batch.items()
        }

    def put_variables(self, variables: Any) -> Any:
        """Moves arrays that every process has in full to all devices."""
        return jax.device_put(variables, self._replicated)

    def train_step(self, step: Callable, abstract_state: Any) -> Callable:
        """Returns the compiled `step(state, batch) -> state, metrics`; the state is consumed."""

        def gathering_step(state, batch):
            # Left to itself, the partitioner would rather gather the activations of some layers.
            params = jax.lax.with_sharding_constraint(state.params, self._replicated)
            return step(state.replace(params=params), batch)

        shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
        out_shardings = (shardings, self._replicated)
        return jax.jit(gathering_step, donate_argnums=0, out_shardings=out_shardings)

    def eval_step(self, step: Callable) -> Callable:
        """Returns the compiled `step(variables, batch) -> sums`."""
        return jax.jit(step, out_shardings=self._replicated)

    def batch_step(self, step: Callable) -> Callable:
        """Returns the compiled `step(variables, x)`, divided over the devices as the batch x is."""
        return jax.jit(step, out_shardings=self._batch_sharding)

    def to_global(self, state: Any) -> Any:
        """Returns the state as arrays over all devices of all processes, to be saved."""
        return state

    def from_global(self, state: Any) -> Any:
        """Undoes :meth:`to_global`."""
        return state

    def _shardings(self, state: Any) -> Any:
        """Shardings of a state: all of it is replicated but what grows with the parameters."""
        shardings = jax.tree.map(lambda x: NamedSharding(self._mesh, self._fsdp_spec(x)), state)
        return shardings.replace(
            model_state=jax.tree.map(lambda _: self._replicated, state.model_state)
        )

    def _fsdp_spec(self, x: Any) -> P:
        """Splits the largest dimension that divides evenly; vectors are not worth a message."""
        fsdp = self._mesh.shape["fsdp"]
        divisible = [axis for axis, size in enumerate(x.shape) if size % fsdp == 0]
        if fsdp == 1 or len(x.shape) < 2 or not divisible:
            return P()
        largest = max(divisible, key=lambda axis: x.shape[axis])
        return P(*[None] * largest, "fsdp")


class PmapParallel:
    """`jax.pmap` over all devices; the state is not stacked, a batch is (devices, b, ...)."""

    axis_name = _PMAP_AXIS

    def __init__(self):
        local_mesh = Mesh(jax.local_devices(), (_PMAP_AXIS,))
        self._local_replicated = NamedSharding(local_mesh, P())
        self._global_mesh = Mesh(jax.devices(), (_PMAP_AXIS,))

    def abstract(self, init_fn: Callable[[], Any]) -> Any:
        """Returns shapes, types and shardings of the state `init_fn()`, as :meth:`to_global`."""
        replicated = NamedSharding(self._global_mesh, P())
        return jax.tree.map(lambda x: _with_sharding(x, replicated), jax.eval_shape(init_fn))

    def init(self, init_fn: Callable[[], Any]) -> Any:
        """Returns the state `init_fn()`, a copy on every device."""
        return self.put_variables(jax.jit(init_fn, compiler_options=_quick_to_compile())())

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Moves this process's part of a batch to its devices."""
        num_devices = jax.local_device_count()
        sharding = NamedSharding(self._local_replicated.mesh, P(_PMAP_AXIS))
        return jax.device_put(
            {name: x.reshape(num_devices, -1, *x.shape[1:]) for name, x in batch.items()}, sharding
        )

    def put_variables(self, variables: Any) -> Any:
        """Moves arrays that every process has in full to all of its devices."""
        return jax.device_put(variables, self._local_replicated)

    def train_step(self, step: Callable, abstract_state: Any) -> Callable:
        """Returns the compiled `step(state, batch) -> state, metrics`; the state is consumed."""
        del abstract_state  # its layout is that of `out_axes`
        axes = {"in_axes": (None, 0), "out_axes": (None, None)}
        return jax.pmap(step, axis_name=_PMAP_AXIS, donate_argnums=0, **axes)

    def eval_step(self, step: Callable) -> Callable:
        """Returns the compiled `step(variables, batch) -> sums`."""
        return jax.pmap(step, axis_name=_PMAP_AXIS, in_axes=(None, 0), out_axes=None)

    def batch_step(self, step: Callable) -> Callable:
        """Returns the compiled `step(variables, x)`, divided over the devices as the batch x is."""
        return jax.pmap(step, axis_name=_PMAP_AXIS, in_axes=(None, 0))

    def to_global(self, state: Any) -> Any:
        """Returns the state as arrays over all devices of all processes, to be saved."""
        return multihost_utils.host_local_array_to_global_array(state, self._global_mesh, P())

    def from_global(self, state: Any) -> Any:
        """Undoes :meth:`to_global`."""
        return multihost_utils.global_array_to_host_local_array(state, self._global_mesh, P())


def _quick_to_compile() -> dict[str, int] | None:
    """Options for code that runs once: on CPU, a hundred random draws take a minute to optimise."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def _with_sharding(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


Parallel = MeshParallel | PmapParallel


def make_parallel(config: ConfigDict) -> Parallel:
    """Returns how to run on the devices there are.

    Args:
      config: reads `parallel`, `mesh.fsdp` and `data.eval_batch_size`.

    Raises:
      UserError: `mesh.fsdp` or the evaluation batch does not fit the number of devices.
    """
    devices = jax.device_count()
    fsdp = config.mesh.fsdp
    if fsdp < 1 or devices % fsdp:
        raise UserError(f"config.mesh.fsdp={fsdp} does not divide the number of devices, {devices}")
    if config.parallel == "pmap" and fsdp > 1:
        raise UserError(f"config.mesh.fsdp={fsdp} needs config.parallel='jit', not 'pmap'")
    if config.data.eval_batch_size % devices:
        raise UserError(
            f"config.data.eval_batch_size={config.data.eval_batch_size} is not a multiple of "
            f"{devices} devices"
        )
    return PmapParallel() if config.parallel == "pmap" else MeshParallel(fsdp)


def check_train_batch(config: ConfigDict) -> None:
    """Raises UserError unless a training batch can be divided over the devices.

    Args:
      config: reads `batch_size`, `accumulate_steps` and `mix`.
    """
    devices = jax.device_count()
    parts = devices * config.accumulate_steps
    what = f"{devices} devices x {config.accumulate_steps} accumulate_steps"
    if config.batch_size % parts:
        raise UserError(f"config.batch_size={config.batch_size} is not a multiple of {what}")
    if (config.mix.mixup or config.mix.cutmix) and config.batch_size % (2 * devices):
        raise UserError(
            f"config.batch_size={config.batch_size} gives each of {devices} devices an odd number "
            "of images; config.mix pairs them, so it must be even"
        )
    if config.mix.mixtoken and config.batch_size % (2 * parts):
        raise UserError(
            f"config.batch_size={config.batch_size} gives each of {what} an odd number of images; "
            "config.mix.mixtoken pairs them, so it must be even"
        )


def prefetch(iterator: Any, put: Callable, *, size: int = 2) -> Iterator[tuple[Any, dict]]:
    """Keeps batches ready on the devices.

    Args:
      iterator: of batches, with `get_state()`.
      put: moves a batch to the devices.
      size: number of batches to hold.

    Yields:
      Each batch and the state of the iterator just after that batch, which is not the one that
      the iterator has by now.
    """
    ready = deque()
    while True:
        while len(ready) < size:
            batch = put(next(iterator))
            ready.append((batch, iterator.get_state()))
        yield ready.popleft()


def map_batches(step: Callable, batches: Iterable, put: Callable) -> list[dict[str, float]]:
    """Returns `step(put(batch))` of all batches, on the host."""
    results = []
    with contextlib.closing(iter(batches)) as iterator:
        for batch in iterator:
            results.append(step(put(batch)))
            # Two batches in flight keep the devices busy without filling their memory.
            if len(results) > 2:
                results[-3] = jax.device_get(results[-3])
    return jax.device_get(results)


class StopRequest:
    """Notices SIGTERM (sent before a machine is taken away) and SIGINT (Ctrl-C)."""

    def __init__(self):
        self._received = False
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._receive)
            signal.signal(signal.SIGINT, self._receive)
        else:
            # jax has its own handler of SIGTERM there, which tells the other processes.
            signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    def received(self, step: int) -> bool:
        """Whether to stop after a step; to be called after each, alike in all processes."""
        if jax.process_count() == 1:
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)

    def _receive(self, signum: int, _frame: Any) -> None:
        logging.warning("%s: stopping after this step", signal.Signals(signum).name)
        self._received = True
        signal.signal(signum, signal.SIG_DFL)  # a second one stops at once


def is_main_process() -> bool:
    """Whether this is the process that writes logs."""
    return jax.process_index() == 0


def on_main_process(action: Callable[[], None]) -> None:
    """Runs an action on the main process; the others wait for it."""
    if is_main_process():
        action()
    multihost_utils.sync_global_devices("on_main_process")
