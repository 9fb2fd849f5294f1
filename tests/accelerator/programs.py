"""Compiles programs side by side: on an accelerator, compilation is most of the time of a test."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from tokenvit_jax.kernels.platforms import traced_for

MAX_AT_ONCE = 6


def lower(function: Callable, inputs: Any, device: jax.Device, dtype: str) -> jax.stages.Lowered:
    """Lowers a function for a device, with products in full precision if the type is float32."""
    precision = "highest" if dtype == "float32" else None
    placed = jax.device_put(inputs, device)
    place, products = jax.default_device(device), jax.default_matmul_precision(precision)
    with place, products, traced_for(device):
        return jax.jit(function).lower(*placed)


def compile_all(lowered: Mapping[Any, jax.stages.Lowered]) -> dict[Any, jax.stages.Compiled]:
    """Compiles lowered programs, at most six at once."""
    with ThreadPoolExecutor(MAX_AT_ONCE) as pool:
        compiled = pool.map(lambda program: program.compile(), lowered.values())
        return dict(zip(lowered, compiled, strict=True))
