"""Runs the kernels for GPUs on a CPU, from the modules that the GPU's compiler would get.

Interpreted by Pallas, a kernel shows that its algorithm is right. It hides what the lowering for
GPUs makes of it: see :mod:`triton_program` and :mod:`triton_memory`.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax._src.pallas import pallas_call
from jax._src.pallas.triton import lowering
from jax.experimental.pallas import triton as plt
from jax.interpreters import mlir
from triton_memory import DeviceArray, Memory
from triton_program import Launch, TritonProgram

_CAPABILITY = 90
_NEVER_WRITTEN = 0xFF  # NaN, or -1


class Kernel:
    """A kernel that was lowered for a GPU.

    Attributes:
      name: its name.
      inputs: shapes and types of its inputs.
      outputs: the same of its outputs.
      num_programs: programs of its grid.
    """

    def __init__(
        self, lowered: lowering.LoweringResult, grid_mapping: Any, num_warps: int | None = None
    ) -> None:
        self.name = str(lowered.module.operation.attributes["sym_name"]).strip('"')
        arrays, num_inputs = _arrays(grid_mapping), grid_mapping.num_inputs
        self.inputs, self.outputs = arrays[:num_inputs], arrays[num_inputs:]
        self.num_programs = int(np.prod(lowered.grid))
        self._num_threads = 32 * (num_warps or 4)  # Pallas' default
        self._grid = (*lowered.grid, 1, 1)[:3]
        self._program = TritonProgram(lowered.module)

    def run(
        self,
        inputs: Sequence[np.ndarray],
        aliases: Sequence[tuple[int, int]] = (),
        programs: Iterable[int] | None = None,
    ) -> tuple[list[np.ndarray], list[str]]:
        """Returns the outputs and the faults that were found.

        Args:
          inputs: arrays.
          aliases: pairs of an input and the output that shares its memory.
          programs: programs of the grid that run, without notes of who reads and writes; None:
            all, and results that none of them writes are NaN or -1.
        """
        follow = programs is None
        input_of = {output: number for number, output in aliases}
        arrays = [
            DeviceArray(np.array(x) if follow else x, i, True, follow) for i, x in enumerate(inputs)
        ]
        outputs = []
        for i, output in enumerate(self.outputs):
            if i in input_of:
                outputs.append(arrays[input_of[i]])
                continue
            values = np.empty(output.shape, output.dtype)
            if follow:
                values.reshape(-1).view(np.uint8)[:] = _NEVER_WRITTEN
            outputs.append(DeviceArray(values, len(arrays), False, follow))
            arrays.append(outputs[-1])
        memory = Memory(arrays, self._num_threads)
        launch = Launch(memory)
        addresses = [x.base for x in [*arrays[: len(inputs)], *outputs]]
        for program in range(self.num_programs) if follow else programs:
            memory.start(program)
            launch.program_ids = np.unravel_index(program, self._grid, order="F")
            self._program.run(addresses, launch)
        return [x.values for x in outputs], [f"{self.name}: {line}" for line in memory.faults]


class Simulation:
    """What a simulated GPU did.

    Attributes:
      ran: names of the kernels that ran.
      faults: what was wrong.
    """

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.faults: list[str] = []


def noted_kernels(monkeypatch: Any) -> list[Kernel]:
    """Returns a list that receives the kernels that are lowered for GPUs, equal ones once."""
    kernels: list[Kernel] = []
    lower, known = lowering.lower_jaxpr_to_triton_module, set()

    def noted(jaxpr, grid_mapping, *args, **settings):
        lowered = lower(jaxpr, grid_mapping, *args, **settings)
        identity = str((lowered.grid, _arrays(grid_mapping), lowered.module))
        if identity not in known:
            known.add(identity)
            kernels.append(Kernel(lowered, grid_mapping))
        return lowered

    monkeypatch.setattr(lowering, "lower_jaxpr_to_triton_module", noted)
    return kernels


_running: ContextVar[Simulation | None] = ContextVar("running", default=None)


@contextlib.contextmanager
def simulated_gpu() -> Iterator[Simulation]:
    """Makes the CPU run the kernels for GPUs in all that is compiled in the context."""
    simulation = Simulation()
    token = _running.set(simulation)
    try:
        yield simulation
    finally:
        _running.reset(token)


def _lowering(ctx, *operands, **params):
    simulation = _running.get()
    if simulation is None or not isinstance(params["compiler_params"], plt.CompilerParams):
        return pallas_call._pallas_call_lowering(ctx, *operands, **params)
    grid_mapping = params["grid_mapping"]
    lowered = lowering.lower_jaxpr_to_triton_module(
        params["jaxpr"], grid_mapping, "cuda", _CAPABILITY, mlir_ctx=ctx.module_context
    )
    kernel = Kernel(lowered, grid_mapping, params["compiler_params"].num_warps)

    def run(*inputs):
        arrays = [np.asarray(x) for x in inputs]
        outputs, faults = kernel.run(arrays, params["input_output_aliases"])
        simulation.ran.append(kernel.name)
        simulation.faults.extend(faults)
        return tuple(outputs)

    def called(*inputs):
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in ctx.avals_out)
        return jax.pure_callback(run, shapes, *inputs)

    return mlir.lower_fun(called, multiple_results=True)(ctx, *operands)


mlir.register_lowering(pallas_call.pallas_call_p, _lowering, platform="cpu")


def _arrays(grid_mapping):
    return [x.array_aval for x in grid_mapping.block_mappings]
