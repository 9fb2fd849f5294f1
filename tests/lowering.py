"""Lowers functions for accelerators on a host without accelerators."""

import jax
import jax.numpy as jnp
from make_task import make_task

from tokenvit_jax.kernels import cudnn
from tokenvit_jax.kernels.platforms import kernels_traced_once
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.state import init_state
from tokenvit_jax.training.step import make_train_step


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


def step_lowers(config, side=224, label=(2,)):
    """Asserts that the training step of a configuration lowers, for two images."""
    config.batch_size = 2
    lowers(*training_step(config, side, label))


def training_step(config, side=224, label=()):
    """Returns the training step of a configuration, and shapes of its arguments."""
    batch_size = config.batch_size
    task = make_task(config, 1000)
    model, optimizer = task.make_model(), make_optimizer(config)
    state = jax.eval_shape(lambda: init_state(model, optimizer, config))
    batch = {
        "image": array(batch_size, side, side, 3, dtype=jnp.uint8),
        "label": array(*(label or (batch_size,)), dtype=jnp.int32),
        "skipped": array(batch_size, dtype=jnp.int32),
    }
    return make_train_step(task, model, optimizer), state, batch
