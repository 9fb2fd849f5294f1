"""Lowers functions for accelerators on a host without accelerators."""

import jax
import jax.numpy as jnp

from tokenvit_jax.kernels import cudnn
from tokenvit_jax.kernels.platforms import kernels_traced_once


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def lowers(fn, *args):
    """Asserts that fn lowers for GPUs and for TPUs, each in a separate lowering of one trace."""
    with cudnn.assumed(), kernels_traced_once():
        traced = jax.jit(fn).trace(*args)
        programs = [traced.lower(lowering_platforms=("cuda",))]
    programs.append(traced.lower(lowering_platforms=("tpu",)))
    for program in programs:
        assert "func.func public @main" in program.as_text()
