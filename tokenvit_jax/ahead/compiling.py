"""Compiles the steps of a configuration for devices that this machine does not have."""

import contextlib
import functools
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from tokenvit_jax import stopping
from tokenvit_jax.ahead import targets
from tokenvit_jax.ahead.hlo import Program, read_program
from tokenvit_jax.ahead.instructions import read_launches
from tokenvit_jax.ahead.quiet import without_alarms
from tokenvit_jax.ahead.targets import Device, Target
from tokenvit_jax.data import Spec
from tokenvit_jax.errors import UserError
from tokenvit_jax.kernels import cudnn
from tokenvit_jax.kernels.platforms import Misfit, noted_misfits
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.tasks import Task, create_task
from tokenvit_jax.training.batches import check_train_batch
from tokenvit_jax.training.devices import Parallel, make_parallel
from tokenvit_jax.training.initial import with_searched_keep
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.state import init_state
from tokenvit_jax.training.step import make_eval_step, make_train_step
from tokenvit_jax.training.validate import check_task

MODES = ("train", "evaluate", "predict")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NO_BLOCK = "in memory space vmem"
_OUT_OF_MEMORY = re.compile(r"(?:required for HLO temporaries \(|Used )([\d.]+)([KMGT])")


class Memory(NamedTuple):
    """Memory of one device while a step runs [bytes].

    Attributes:
      parameters: parameters of the model.
      optimizer: state of the optimizer.
      averages: moving averages of the parameters.
      statistics: other collections of the model and counters.
      batch: the examples.
      temporaries: activations, gradients and workspaces, as the compiler plans them.
      results: results that take no memory of an argument, and the program itself.
    """

    parameters: int = 0
    optimizer: int = 0
    averages: int = 0
    statistics: int = 0
    batch: int = 0
    temporaries: int = 0
    results: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self)

    @property
    def state(self) -> int:
        """The part that does not grow with the batch."""
        return self.parameters + self.optimizer + self.averages + self.statistics


class Compiled(NamedTuple):
    """A step that was compiled for a target.

    Attributes:
      target: the devices.
      mode: one of MODES.
      batch_per_device: images of a step on one device.
      memory: of one device.
      program: the compiled program; None: it does not fit into the memory.
      xla: the compiler's own counts of one device, "flops" and "bytes accessed"; loops count once.
      batch_norms: paths of the layers whose statistics span the global batch.
      misfits: kernels that could not take their arguments.
      trace_seconds: time to trace and lower the step.
      compile_seconds: time to compile it.
      processor_seconds: time that all processors spent on both.
    """

    target: Target
    mode: str
    batch_per_device: int
    memory: Memory
    program: Program | None
    xla: dict[str, float]
    batch_norms: frozenset[str]
    misfits: tuple[Misfit, ...]
    trace_seconds: float
    compile_seconds: float
    processor_seconds: float

    @property
    def batch_size(self) -> int:
        """Images of a step on all devices."""
        return self.batch_per_device * self.target.num_devices

    @property
    def fits(self) -> bool:
        """Whether a device has the memory that the step needs."""
        return self.program is not None and self.memory.total <= self.target.device.memory


class Step(NamedTuple):
    """A step that can be compiled.

    Attributes:
      function: the step, as `training.devices` makes it.
      arguments: shapes, types and shardings of its arguments.
      memory: memory of the arguments on one device.
      batch_norms: see :class:`Compiled`.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    memory: Memory
    batch_norms: frozenset[str]


def with_batch(config: ConfigDict, mode: str, batch_size: int) -> ConfigDict:
    """Returns a configuration whose steps see a number of images on all devices."""
    config = config.copy_and_resolve_references()
    if mode == "train":
        config.batch_size = batch_size
    else:
        config.data.eval_batch_size = batch_size
    return config


def batch_per_device(config: ConfigDict, mode: str, target: Target) -> int:
    """Returns the images that a step of a configuration sees on each device.

    Predictions see one image at a time, as in `predict`.

    Raises:
      UserError: the devices do not divide the batch.
    """
    devices = target.num_devices
    if mode == "predict":
        return 1
    if mode == "evaluate":
        return -(-config.data.eval_batch_size // devices)
    check_train_batch(create_task(config), devices)
    return config.batch_size // devices


def smallest_batch(config: ConfigDict, mode: str, target: Target) -> int:
    """Returns the smallest number of images per device; its multiples are possible, too."""
    if mode != "train":
        return 1
    for batch in range(1, 2 * config.accumulate_steps + 1):
        with contextlib.suppress(UserError):
            changed = with_batch(config, mode, batch * target.num_devices)
            check_train_batch(create_task(changed), target.num_devices)
            return batch
    return 2 * config.accumulate_steps


def check(config: ConfigDict, target: Target, mode: str) -> None:
    """Raises UserError if a step cannot be compiled, before anything is traced.

    Args:
      config: configuration; `batch_size` or `data.eval_batch_size` is the global batch.
      target: the devices.
      mode: one of MODES.
    """
    task = create_task(with_searched_keep(config, None))
    check_task(task, training=mode == "train")
    task.make_model()
    targets.prepare_jax()
    make_parallel(config, targets.devices_of(target))
    if mode == "train":
        check_train_batch(task, target.num_devices)


def compile_step(config: ConfigDict, target: Target, mode: str, batch: int) -> Compiled:
    """Compiles a step.

    Args:
      config: configuration.
      target: the devices.
      mode: one of MODES.
      batch: images per device.

    Raises:
      UserError: a value of the configuration is not valid, the devices do not divide the batch, or
        a package is missing.
    """
    targets.prepare_jax()
    config = with_searched_keep(config, None)
    config = with_batch(config, mode, batch * target.num_devices)
    devices = targets.devices_of(target)
    jax.clear_caches()  # what was traced for another target may have other forms
    start, processor_start = time.perf_counter(), time.process_time()
    with _assumed(target.device):
        step = make_step(config, devices, mode)
        with noted_misfits() as misfits:  # not those of the initialisation, which sees one image
            lowered = step.function.lower(*step.arguments)
    traced = time.perf_counter()
    facts = {
        "target": target,
        "mode": mode,
        "batch_per_device": batch,
        "batch_norms": step.batch_norms,
        "misfits": tuple(dict.fromkeys(misfits)),
        "trace_seconds": traced - start,
    }
    done, program, missing = _compile(lowered, target, step.memory)
    memory = step.memory._replace(temporaries=missing)
    return Compiled(
        memory=memory if done is None else _memory(done.memory_analysis(), step.memory),
        program=program,
        xla={} if done is None else _counts(done),
        compile_seconds=time.perf_counter() - traced,
        processor_seconds=time.process_time() - processor_start,
        **facts,
    )


def _compile(lowered: Any, target: Target, arguments: Memory) -> tuple[Any, Program | None, int]:
    """Compiles and reads the program.

    Returns:
      The result of jax and the program, or None, None and the temporaries [bytes] if the compiler
      lacks memory for them.
    """
    options = targets.compiler_options(target.device)
    with stopping.temporary_folder() as folder, _uncached(), without_alarms():
        if target.device.platform == "cuda":  # the compiler's files show what kernels execute
            options |= {"xla_dump_to": folder}
        try:
            done = _with_blocks(lowered, options)
        except jax.errors.JaxRuntimeError as error:  # of a TPU's compiler
            return None, None, _missing_memory(error, arguments)
        return done, read_program(done.as_text(), read_launches(Path(folder))), 0


def _with_blocks(lowered: Any, options: dict[str, Any]) -> Any:
    """Compiles, without options if they leave a TPU's compiler too little memory for a block."""
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if _NO_BLOCK not in str(error):
            raise
    return lowered.compile()


# ------------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------------


def make_step(config: ConfigDict, devices: list[jax.Device], mode: str) -> Step:
    """Returns a step of a configuration for devices that may not exist.

    Args:
      config: configuration; `batch_size` or `data.eval_batch_size` is the global batch.
      devices: the devices.
      mode: one of MODES.
    """
    check_task(create_task(config), training=mode == "train")
    parallel = make_parallel(config, devices)
    task = create_task(config, parallel.axis_name)
    if mode == "train":
        return _train_step(task, parallel, devices)
    return _inference_step(task, parallel, mode, len(devices))


def _train_step(task: Task, parallel: Parallel, devices: list[jax.Device]) -> Step:
    check_train_batch(task, len(devices))
    config, model = task.config, task.make_model()
    optimizer = make_optimizer(config, model)
    state = parallel.abstract(functools.partial(init_state, model, optimizer, config))
    batch = _shapes(task.examples(train=True).specs | _NUMBERS, config.batch_size)
    if task.teacher is not None:  # whose labels have the same shapes, whichever model it is
        teach = functools.partial(task.teach, task, model)
        variables = variable_shapes(model, _images(task, 1))
        batch |= jax.eval_shape(teach, variables, batch, jax.random.key(0))
    batch = parallel.abstract_batch(batch)
    memory = Memory(
        parameters=_bytes(state.params),
        optimizer=_bytes(state.opt_state),
        averages=_bytes(state.ema),
        statistics=_bytes((state.model_state, state.step, state.skipped)),
        batch=_batch_bytes(batch, len(devices)),
    )
    step = parallel.train_step(make_train_step(task, model, optimizer), state)
    return Step(step, (state, batch), memory, _batch_norms(state.model_state))


def _inference_step(task: Task, parallel: Parallel, mode: str, devices: int) -> Step:
    model, size = task.make_model(), task.config.data.eval_batch_size
    variables = parallel.abstract_variables(variable_shapes(model, _images(task, 1)))
    if mode == "evaluate":
        batch = _shapes(task.examples(train=False).specs | _NUMBERS | _MASK, size)
        step = parallel.eval_step(make_eval_step(task, model))
    else:
        view = Spec((*task.view_size, task.config.in_channels), np.uint8)
        batch = _shapes({"image": view}, size)

        def predict(variables, batch):
            return task.outputs(model, variables, task.normalize(batch["image"]))

        step = parallel.batch_step(predict)
    batch = parallel.abstract_batch(batch)
    statistics = {key: value for key, value in variables.items() if key != "params"}
    memory = Memory(
        parameters=_bytes(variables["params"]),
        statistics=_bytes(statistics),
        batch=_batch_bytes(batch, devices),
    )
    return Step(step, (variables, batch), memory, frozenset())


# Entries of every batch, and of evaluation batches; see `data.pipeline`.
_NUMBERS = {"index": Spec((), np.int32), "skipped": Spec((), np.int32)}
_MASK = {"mask": Spec((), np.float32)}


def _shapes(specs: dict[str, Spec], size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct((size, *spec.shape), spec.dtype) for name, spec in specs.items()
    }


def _images(task: Task, size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *task.input_shape), np.float32)


def _batch_norms(model_state: Any) -> frozenset[str]:
    return frozenset(
        "/".join(path[:-1]) for path in flatten_dict(model_state.get("batch_stats", {}))
    )


def _assumed(device: Device) -> contextlib.AbstractContextManager[None]:
    """Traces as on a device that is not here: kernels and cuDNN ask which GPU there is."""
    return cudnn.assumed(device.gpu) if device.gpu else contextlib.nullcontext()


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Compiles anew: a program from the compilation cache would take no time."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------


def _bytes(tree: Any) -> int:
    """Returns the bytes of arrays on one device; those without a sharding have copies on all."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def _batch_bytes(batch: dict[str, jax.ShapeDtypeStruct], devices: int) -> int:
    whole = (math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in batch.values())
    return sum(whole) // devices


def _memory(found: Any, arguments: Memory) -> Memory:
    """Returns the memory of a compiled step; the arguments include what it does not read."""
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return arguments._replace(
        temporaries=found.temp_size_in_bytes, results=results + found.generated_code_size_in_bytes
    )


def _missing_memory(error: Exception, arguments: Memory) -> int:
    """Returns the temporaries of a program that does not fit, from the compiler's message."""
    found = _OUT_OF_MEMORY.search(str(error))
    if not found:
        raise error
    size = int(float(found[1]) * _UNITS[found[2]])
    return size if "temporaries" in found[0] else max(0, size - arguments.total)


def _counts(done: Any) -> dict[str, float]:
    found = done.cost_analysis() or {}
    return {key: found[key] for key in ("flops", "bytes accessed") if key in found}
