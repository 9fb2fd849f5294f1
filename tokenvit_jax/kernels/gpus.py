"""The NVIDIA GPU that programs are traced for: the one of this process, or one that is assumed."""

import functools
import importlib
from typing import NamedTuple

import jax

# The module of jax that asks for the GPU and its cuDNN.
LIBRARY = "jax._src.cudnn.fused_attention_stablehlo"
MIN_CAPABILITY = (8, 0)  # of GPUs that kernels are compiled for


class Gpu(NamedTuple):
    """An NVIDIA GPU.

    Attributes:
      kind: name of its kind, as of a `jax.Device`.
      capability: its compute capability.
      cudnn: version of cuDNN, such as 91200 for 9.12; None: there is none.
    """

    kind: str
    capability: tuple[int, int]
    cudnn: int | None


# Shared memory of a program [KiB] by capability, and the least of all others.
_SHARED_MEMORY = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
_LEAST_SHARED_MEMORY = 99

HOPPER = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 91200)

# A user context is part of the keys of jax's caches: what was traced without it is traced again.
assumed_gpu = jax.make_user_context(None)


def traced_gpu() -> Gpu | None:
    """Returns the GPU that programs are traced for.

    None: the default backend is no NVIDIA GPU, and none is assumed.
    """
    if assumed_gpu.value is not None:
        return assumed_gpu.value
    return _own_gpu() if jax.default_backend() == "gpu" else None


def shared_memory() -> int:
    """Returns the shared memory of a program [bytes] on the GPU that programs are traced for.

    Without one, it is what every GPU has that kernels are compiled for.
    """
    gpu = traced_gpu()
    known = None if gpu is None else _SHARED_MEMORY.get(gpu.capability)
    return (known or _LEAST_SHARED_MEMORY) * 1024


@functools.cache
def _own_gpu():
    """Returns the GPU of this process, or None."""
    device = jax.local_devices(backend="gpu")[0]
    if "cuda" not in device.client.platform_version:  # AMD's GPUs have the same backend name
        return None
    try:
        version = importlib.import_module(LIBRARY).check_cudnn_version()
    except (ImportError, AttributeError, RuntimeError):
        version = None
    return Gpu(device.device_kind, capability_of(device.compute_capability), version)


def capability_of(text: str) -> tuple[int, ...]:
    """Returns a compute capability such as "9.0" as numbers."""
    return tuple(int(part) for part in text.split("."))
