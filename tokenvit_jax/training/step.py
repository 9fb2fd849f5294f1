"""One training step and one evaluation step, as pure functions of a state and a batch.

With one device, the batch is the global batch. With several, it is one device's part of the global
batch, under `jax.jit` over a mesh as under `jax.pmap`, and the task's `axis_name` joins the parts.
Gradients are added over devices once per step, after all micro-batches.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax

from tokenvit_jax.ops.packed import map_packed
from tokenvit_jax.tasks import Aux, Outcome, Task
from tokenvit_jax.training.exchange import Exchange
from tokenvit_jax.training.freezing import Frozen, map_paths
from tokenvit_jax.training.optimizer import learning_rate_factors, learning_rate_schedule
from tokenvit_jax.training.state import TrainState, averaged_variables, step_rngs

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def add_sown(loss: jax.Array, aux: Aux) -> tuple[jax.Array, Aux]:
    """Adds the losses that modules sowed to the loss of a task, and takes them out of the state."""
    model_state = dict(aux.model_state)
    sown = jax.tree.leaves(model_state.pop("losses", ()))
    return loss + sum(sown), aux._replace(model_state=model_state)


def make_train_step(
    task: Task, model: nn.Module, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns `train_step(state, batch, sharded=None) -> state, metrics`.

    Args:
      task: prepares the batch and computes the loss; its configuration is read.
      model: model of the task, a `models.backbone.Backbone` or a model that wraps one.
      optimizer: optax transformation; see :func:`tokenvit_jax.training.optimizer.make_optimizer`.

    Returns:
      A function of the state and a training batch of the task, which contains "skipped" (B,) int32.
      With `sharded`, the state holds this device's shards of the parameters; see
      :attr:`tokenvit_jax.training.exchange.Exchange.dimensions`.
      The metrics are scalars: "loss", "grad_norm" (without frozen parameters, before clipping),
      "learning_rate", "data/skipped" (unreadable images skipped since the first step), and the
      metrics that the task and the model log.
    """
    config = task.config
    schedule = learning_rate_schedule(config)
    frozen = Frozen(config.optimizer.freeze, model)
    optimizer = optax.with_extra_args_support(optimizer)
    group = task.images_per_group

    def train_step(state, batch, sharded=None):
        layers = map_paths(lambda path, _: model.layer_of(path), state.params)
        exchange = Exchange(task.axis_name, sharded, layers)
        batch_rng, model_rng = step_rngs(config.seed, state.step)
        inputs = task.prepare(batch, batch_rng)

        def loss_fn(weights, model_state, inputs, rng):
            rngs = {"batch": batch_rng, **_model_rngs(rng)}
            with frozen.statistics():
                trained = frozen.stop_gradient(weights)
                return add_sown(*task.loss(model, trained, model_state, inputs, rngs))

        # Cast before they are gathered, and once for all micro-batches.
        cast = model.cast_weights(state.params, convolutions=sharded is not None)
        weights = exchange.gather(cast)
        loss, logged, grads, model_state = _accumulate(
            loss_fn, config.accumulate_steps, weights, state, inputs, model_rng, group
        )
        # In float32, which holds it exactly, to travel with the gradients in one reduction.
        skipped = batch["skipped"].astype(jnp.float32).sum()
        statistics = model_state["batch_stats"] if model.local_statistics else {}
        grads, norm, (loss, logged, statistics), skipped = exchange.reduce(
            grads, (loss, logged, statistics), skipped, config.gradient_reduce_dtype
        )
        if model.local_statistics:
            model_state = {**model_state, "batch_stats": statistics}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, norm=norm)
        factors = learning_rate_factors(config, model, state.params)
        if factors is not None:
            updates = jax.tree.map(jnp.multiply, updates, factors)
        params = map_packed(jnp.add, state.params, updates)

        # Once per step, after all micro-batches have changed the model state.
        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        variables = dict(model.after_step({"params": params, **model_state}, learning_rate))
        variables = frozen.hold(variables, {"params": state.params, **state.model_state})
        params, model_state, ema = variables.pop("params"), variables, state.ema
        if ema is not None:
            averaged = averaged_variables(params, model_state)
            step_size = 1.0 - config.ema_decay
            averaged = map_packed(
                lambda new, old: step_size * new + (1.0 - step_size) * old, averaged, ema
            )
            ema = frozen.hold(averaged, ema)

        state = TrainState(
            step=state.step + 1,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            ema=ema,
            skipped=state.skipped + skipped.astype(jnp.int32),
        )
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "data/skipped": state.skipped,
        }
        return state, metrics | logged | model.monitor(params)

    return train_step


def make_eval_step(task: Task, model: nn.Module) -> Callable[[dict, Batch], Outcome]:
    """Returns `eval_step(variables, batch) -> Outcome`, with sums over the global batch.

    Args:
      task: evaluates the batch.
      model: model of the task.
    """

    def eval_step(variables, batch):
        outcome = task.evaluate(model, variables, batch)
        if task.axis_name is not None:
            outcome = outcome._replace(sums=lax.psum(outcome.sums, task.axis_name))
        return outcome

    return eval_step


def _model_rngs(rng):
    """Returns the random keys of the model and the loss."""
    dropout, routing = jax.random.split(rng)
    return {"dropout": dropout, "routing": routing, "sample": jax.random.fold_in(rng, 2)}


def _accumulate(loss_fn, num_micro_batches, weights, state, inputs, rng, group):
    """Returns the loss, metrics, gradient and new model state of a batch computed part by part.

    Loss, metrics and gradient are means over the parts; each part passes the model state on to the
    next. The weights are the parameters, some in the type of the computation; the gradient has the
    types of the parameters. Consecutive images of a group stay together.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def widened(grads):
        return jax.tree.map(lambda x, param: x.astype(param.dtype), grads, state.params)

    if num_micro_batches == 1:
        (loss, aux), grads = value_and_grad(weights, state.model_state, inputs, rng)
        return loss, aux.metrics, widened(grads), aux.model_state

    def micro_step(carry, part):
        loss_sum, grads_sum, model_state = carry
        index, inputs = part
        (loss, aux), grads = value_and_grad(
            weights, model_state, inputs, jax.random.fold_in(rng, index)
        )
        sums = loss_sum + loss, jax.tree.map(jnp.add, grads_sum, widened(grads))
        return (*sums, aux.model_state), aux.metrics

    def split(x):
        # A micro-batch holds every n-th group, not a contiguous slice, so that micro-batches do not
        # depend on the number of devices.
        parts = x.reshape(-1, num_micro_batches, group, *x.shape[1:]).swapaxes(0, 1)
        return parts.reshape(num_micro_batches, -1, *x.shape[1:])

    zeros = jax.tree.map(lambda x, param: jnp.zeros(x.shape, param.dtype), weights, state.params)
    (loss, grads, model_state), metrics = lax.scan(
        micro_step,
        (jnp.zeros(()), zeros, state.model_state),
        (jnp.arange(num_micro_batches), jax.tree.map(split, inputs)),
    )
    loss, grads = jax.tree.map(lambda x: x / num_micro_batches, (loss, grads))
    return loss, jax.tree.map(lambda x: x.mean(0), metrics), grads, model_state
