"""Runs steps on all devices, with `jax.jit` over a mesh or with `jax.pmap`.

`MeshParallel` runs a step under `jax.jit` over a mesh of all devices of all processes, optionally
with sharded parameters; `PmapParallel` runs it under `jax.pmap`. Both have the same methods and
give the same numbers: steps see one device's part of a batch, and their `axis_name` joins the
parts. With other devices, which may not exist, steps can only be compiled: from the
shapes that the `abstract` methods give.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError
from tokenvit_jax.kernels.platforms import platform_of, traced_for
from tokenvit_jax.tasks import Outcome
from tokenvit_jax.training.exchange import FSDP, WHOLE

_AXES = ("data", FSDP)
_BATCH_SPEC = P(_AXES)
_PMAP_AXIS = "devices"
# For a GPU: nothing is chosen by measured time, and scatters add in a fixed order.
_DETERMINISTIC = {"xla_gpu_deterministic_ops": True}


class MeshParallel:
    """`jax.jit` over a mesh of all devices with the axes "data" and "fsdp".

    The batch is split over both axes. With `fsdp` above 1, matrices (parameters, their averages and
    the optimizer's state) are sharded over the axis "fsdp"; a step gathers the parameters once, in
    the type of the computation, and updates each shard on its own device. With `deterministic`,
    steps on a GPU give the same bits in every run.

    Attributes:
      axis_name: the axes that a step sees; None: there is one device.
    """

    def __init__(
        self,
        fsdp: int = 1,
        devices: Sequence[jax.Device] | None = None,
        *,
        deterministic: bool = False,
    ):
        devices = jax.devices() if devices is None else devices
        self._mesh = jax.make_mesh(
            (len(devices) // fsdp, fsdp),
            _AXES,
            axis_types=(AxisType.Auto,) * 2,
            devices=devices,
        )
        self.axis_name = _AXES if len(devices) > 1 else None
        self._device = devices[0]  # all are of its kind
        on_gpu = platform_of(self._device) == "cuda"
        self._options = _DETERMINISTIC if deterministic and on_gpu else None
        self._replicated = NamedSharding(self._mesh, P())
        self._batch_sharding = NamedSharding(self._mesh, _BATCH_SPEC)

    def abstract(self, init_fn: Callable[[], Any]) -> Any:
        """Returns shapes, types and shardings of the state `init_fn()`, like :meth:`to_global`."""
        state = jax.eval_shape(init_fn)
        return jax.tree.map(_with_sharding, state, self._shardings(state))

    def abstract_batch(self, batch: Any) -> Any:
        """Returns shapes, types and shardings of a global batch, like :meth:`put_batch`."""
        return jax.tree.map(lambda x: _with_sharding(x, self._batch_sharding), batch)

    def abstract_variables(self, variables: Any) -> Any:
        """Returns shapes, types and shardings of variables, like :meth:`put_variables`."""
        return jax.tree.map(lambda x: _with_sharding(x, self._replicated), variables)

    def init(self, init_fn: Callable[[], Any]) -> Any:
        """Returns the state `init_fn()`, placed on the devices."""
        shardings = self._shardings(jax.eval_shape(init_fn))
        return jax.jit(init_fn, out_shardings=shardings, compiler_options=_quick_to_compile())()

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Moves this process's part of a batch to its devices, as part of the global batch."""
        return {
            name: jax.make_array_from_process_local_data(self._batch_sharding, values)
            for name, values in batch.items()
        }

    def put_variables(self, variables: Any) -> Any:
        """Copies arrays that every process holds in full to all devices."""
        return jax.device_put(variables, self._replicated)

    def train_step(self, step: Callable, abstract_state: Any) -> Callable:
        """Returns the compiled `step(state, batch) -> state, metrics`; the state is consumed."""

        specs = jax.tree.map(lambda x: x.sharding.spec, abstract_state)
        if self._mesh.shape[FSDP] > 1:
            dimensions = jax.tree.map(_sharded_dimension, specs.params)
            step = functools.wraps(step)(functools.partial(step, sharded=dimensions))
        return jax.jit(
            self._on_devices(step, (specs, _BATCH_SPEC), (specs, P())),
            donate_argnums=0,
            out_shardings=(self._named(specs), self._replicated),
            compiler_options=self._options,
        )

    def eval_step(self, step: Callable) -> Callable:
        """Returns the compiled `step(variables, batch) -> Outcome`."""
        return self._step_of_variables(step, Outcome(P(), _BATCH_SPEC))

    def fetch(self, outcome: Outcome) -> Outcome:
        """Returns the result of :meth:`eval_step` as numpy arrays, rows of the whole batch."""
        if jax.process_count() > 1:
            return Outcome(
                jax.device_get(outcome.sums),
                multihost_utils.process_allgather(outcome.rows, tiled=True),
            )
        return jax.device_get(outcome)

    def batch_step(self, step: Callable) -> Callable:
        """Returns the compiled `step(variables, x)`; the result is split like the batch x."""
        return self._step_of_variables(step, _BATCH_SPEC)

    def to_global(self, state: Any) -> Any:
        """Returns the state as arrays over all devices of all processes, to be saved."""
        return state

    def from_global(self, state: Any) -> Any:
        """Undoes :meth:`to_global`."""
        return state

    def _step_of_variables(self, step: Callable, specs: Any) -> Callable:
        """Returns the compiled `step(variables, batch)` with a result that is laid out by specs."""
        return jax.jit(
            self._on_devices(step, (P(), _BATCH_SPEC), specs),
            out_shardings=self._named(specs),
            compiler_options=self._options,
        )

    def _on_devices(self, step: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """Makes a step see one device's part of its arguments.

        So it exchanges what it says it does, and not what a partitioner makes of it; and kernels
        and sizes of chunks depend on the images of one device.
        """

        @functools.wraps(step)
        def on_devices(*args):
            mesh = jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh)
            with mesh, traced_for(self._device):
                return mapped(*args)

        mapped = step
        if self.axis_name is not None:
            specs = {"in_specs": in_specs, "out_specs": out_specs}
            mapped = jax.shard_map(step, mesh=self._mesh, check_vma=False, **specs)
        return on_devices

    def _named(self, specs: Any) -> Any:
        return jax.tree.map(lambda spec: NamedSharding(self._mesh, spec), specs)

    def _shardings(self, state: Any) -> Any:
        """Shardings of a state: everything that grows with the parameters is sharded."""
        shardings = jax.tree.map(lambda x: NamedSharding(self._mesh, self._fsdp_spec(x)), state)
        return shardings.replace(
            model_state=jax.tree.map(lambda _: self._replicated, state.model_state)
        )

    def _fsdp_spec(self, x: Any) -> P:
        """Shards the largest dimension that divides evenly; vectors are not worth a message."""
        fsdp = self._mesh.shape[FSDP]
        divisible = [axis for axis, size in enumerate(x.shape) if size % fsdp == 0]
        if fsdp == 1 or len(x.shape) < 2 or not divisible:
            return P()
        largest = max(divisible, key=lambda axis: x.shape[axis])
        return P(*[None] * largest, FSDP)


class PmapParallel:
    """`jax.pmap` over all devices; the state is not stacked, a batch is (devices, b, ...)."""

    axis_name = _PMAP_AXIS

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        self._devices = devices  # None: all, of which each process has a part
        local_mesh = Mesh(jax.local_devices() if devices is None else devices, (_PMAP_AXIS,))
        self._local_replicated = NamedSharding(local_mesh, P())
        self._global_mesh = Mesh(jax.devices() if devices is None else devices, (_PMAP_AXIS,))

    def abstract(self, init_fn: Callable[[], Any]) -> Any:
        """Returns shapes, types and shardings of the state `init_fn()`, like :meth:`to_global`."""
        replicated = NamedSharding(self._global_mesh, P())
        return jax.tree.map(lambda x: _with_sharding(x, replicated), jax.eval_shape(init_fn))

    def abstract_batch(self, batch: Any) -> Any:
        """Returns shapes and types of a global batch, like :meth:`put_batch`."""
        devices = self._global_mesh.size
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((devices, x.shape[0] // devices, *x.shape[1:]), x.dtype),
            batch,
        )

    def abstract_variables(self, variables: Any) -> Any:
        """Returns shapes and types of variables, like :meth:`put_variables`."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)

    def init(self, init_fn: Callable[[], Any]) -> Any:
        """Returns the state `init_fn()`, a copy on every device."""
        return self.put_variables(jax.jit(init_fn, compiler_options=_quick_to_compile())())

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Moves this process's part of a batch to its devices."""
        num_devices = self._local_replicated.mesh.size
        sharding = NamedSharding(self._local_replicated.mesh, P(_PMAP_AXIS))
        return jax.device_put(
            {name: x.reshape(num_devices, -1, *x.shape[1:]) for name, x in batch.items()}, sharding
        )

    def put_variables(self, variables: Any) -> Any:
        """Copies arrays that every process holds in full to all of its devices."""
        return jax.device_put(variables, self._local_replicated)

    def train_step(self, step: Callable, abstract_state: Any) -> Callable:
        """Returns the compiled `step(state, batch) -> state, metrics`; the state is consumed."""
        del abstract_state  # `out_axes` says the layout
        axes = {"in_axes": (None, 0), "out_axes": (None, None)}
        return self._pmap(step, donate_argnums=0, **axes)

    def eval_step(self, step: Callable) -> Callable:
        """Returns the compiled `step(variables, batch) -> Outcome`."""
        axes = {"in_axes": (None, 0), "out_axes": Outcome(None, 0)}
        return self._pmap(step, **axes)

    def fetch(self, outcome: Outcome) -> Outcome:
        """Returns the result of :meth:`eval_step` as numpy arrays, rows of the whole batch."""
        sums, rows = jax.device_get(outcome)
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
        if jax.process_count() > 1:
            rows = multihost_utils.process_allgather(rows, tiled=True)
        return Outcome(sums, rows)

    def batch_step(self, step: Callable) -> Callable:
        """Returns the compiled `step(variables, x)`; the result is split like the batch x."""
        return self._pmap(step, in_axes=(None, 0))

    def to_global(self, state: Any) -> Any:
        """Returns the state as arrays over all devices of all processes, to be saved."""
        return multihost_utils.host_local_array_to_global_array(state, self._global_mesh, P())

    def from_global(self, state: Any) -> Any:
        """Undoes :meth:`to_global`."""
        return multihost_utils.global_array_to_host_local_array(state, self._global_mesh, P())

    def _pmap(self, step: Callable, **options: Any) -> Callable:
        device = self._global_mesh.devices.flat[0]
        step = functools.wraps(step)(traced_for(device)(step))
        return jax.pmap(step, axis_name=_PMAP_AXIS, devices=self._devices, **options)


def _quick_to_compile() -> dict[str, int] | None:
    """Compiler options for code that runs once: on CPU, optimising many random draws takes long."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def _sharded_dimension(spec: P) -> int:
    """Returns the dimension of an array that the axis "fsdp" divides, or WHOLE."""
    return spec.index(FSDP) if FSDP in spec else WHOLE


def _with_sharding(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


Parallel = MeshParallel | PmapParallel


def make_parallel(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Parallel:
    """Returns the way to run on devices.

    Args:
      config: provides `parallel`, `mesh.fsdp` and `deterministic`.
      devices: the devices; None: all that are available.

    Raises:
      UserError: `mesh.fsdp` does not fit the number of devices, or the entries do not fit together.
    """
    count = jax.device_count() if devices is None else len(devices)
    fsdp = config.mesh.fsdp
    if fsdp < 1 or count % fsdp:
        raise UserError(f"config.mesh.fsdp={fsdp} does not divide the number of devices, {count}")
    if config.parallel == "pmap" and fsdp > 1:
        raise UserError(f"config.mesh.fsdp={fsdp} needs config.parallel='jit', not 'pmap'")
    if config.parallel == "pmap" and config.deterministic:  # which takes no compiler options
        raise UserError("config.deterministic=True needs config.parallel='jit', not 'pmap'")
    if config.parallel == "pmap":
        return PmapParallel(devices)
    return MeshParallel(fsdp, devices, deterministic=config.deterministic)
