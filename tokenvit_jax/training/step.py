"""One training step and one evaluation step, as pure functions of a state and a batch.

Both know nothing of devices. Under `jax.jit` over a mesh the batch is the global one; under
`jax.pmap` it is one device's part of it and `axis_name` joins the parts: the numbers agree.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax
from ml_collections import ConfigDict

from tokenvit_jax.data import NORMALIZATIONS
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import advance_centroids
from tokenvit_jax.models.reducers import clip_retention, retention_mass
from tokenvit_jax.tasks import task_of
from tokenvit_jax.training.objective import make_objective
from tokenvit_jax.training.optimizer import learning_rate_schedule
from tokenvit_jax.training.state import TrainState, averaged_variables, step_rng

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    num_classes: int,
    *,
    axis_name: str | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns `train_step(state, batch) -> state, metrics`.

    Args:
      model: of the dataset's task, called as `model(images, train=True)`; with `mix.mixtoken` or
        `token_labels.weight` a model with a token head, through its method `token_logits`.
      optimizer: optax transformation.
      config: training configuration.
      num_classes: number of classes of the dataset.
      axis_name: axis of `jax.pmap`; None under `jax.jit`.

    Returns:
      A function of the state and a batch {"image" (B, H, W, 3) uint8, "label" (B,) int32 or, of
      segmentation, (B, H, W) uint8, "skipped" (B,) int32}, and with `token_labels.weight` what
      `classification.token_labels` reads. Its metrics are scalars: "loss", "grad_norm" (before
      clipping), "learning_rate", "data/skipped" (unreadable images passed over since the first
      step) and, of a search for tokens, "retention/tokens" (sum of the retention parameters).

    Raises:
      UserError: the model has no token head, but needs one.
    """
    schedule = learning_rate_schedule(config)

    def mean(tree):
        return tree if axis_name is None else lax.pmean(tree, axis_name)

    objective = make_objective(model, config, num_classes)

    def train_step(state, batch):
        mix_rng, model_rng = jax.random.split(step_rng(config.seed, state.step))
        images = normalize(batch["image"], config.data.normalization)
        loss_fn, inputs = objective(images, batch, mix_rng)
        loss, grads, model_state = _accumulate(
            loss_fn, config.accumulate_steps, state, inputs, model_rng
        )
        loss, grads = mean((loss, grads))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if config.retention.penalty:
            params = clip_retention(params)

        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        if "centroids" in model_state:
            # Once per step, after all micro-batches have added their sums (Eq. 4 of DGT).
            old_weight = centroid_old_weight(config.centroids, learning_rate)
            model_state["centroids"] = advance_centroids(
                model_state["centroids"], old_weight, axis_name=axis_name
            )
        ema = state.ema
        if ema is not None:
            variables = averaged_variables(params, model_state)
            ema = optax.incremental_update(variables, ema, 1.0 - config.ema_decay)

        skipped = batch["skipped"].sum()
        if axis_name is not None:
            skipped = lax.psum(skipped, axis_name)
        state = TrainState(
            step=state.step + 1,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            ema=ema,
            skipped=state.skipped + skipped,
        )
        metrics = {
            "loss": loss,
            "grad_norm": optax.global_norm(grads),
            "learning_rate": learning_rate,
            "data/skipped": state.skipped,
        }
        if config.retention.penalty:
            metrics["retention/tokens"] = retention_mass(params).sum()
        return state, metrics

    return train_step


def make_eval_step(
    model: nn.Module, config: ConfigDict, *, axis_name: str | None = None
) -> Callable[[dict, Batch], Metrics]:
    """Returns `eval_step(variables, batch) -> sums` over the global batch.

    Args:
      model: of the dataset's task, called as `model(images, train=False)`.
      config: reads `dataset`, `data.normalization` and what the task reads.
      axis_name: axis of `jax.pmap`; None under `jax.jit`.

    Returns:
      A function of the variables and a batch of `data.eval_dataset`; its sums are those of the
      task's `batch_sums`.
    """

    task = task_of(config.dataset)

    def eval_step(variables, batch):
        images = normalize(batch["image"], config.data.normalization)
        sums = task.batch_sums(model, config, variables, images, batch)
        return sums if axis_name is None else lax.psum(sums, axis_name)

    return eval_step


def normalize(images: jax.Array, normalization: str) -> jax.Array:
    """Returns the images as a model takes them.

    Args:
      images: (B, H, W, 3) uint8.
      normalization: `config.data.normalization` of the model's run.

    Returns:
      (B, H, W, 3) float32: for "imagenet" of about zero mean and unit variance, for "inception"
      in [-1, 1].

    Raises:
      UserError: unknown normalization.
    """
    # Here too: predict and a teacher take the config of a workdir as it is.
    if normalization not in NORMALIZATIONS:
        raise UserError(
            f"config.data.normalization={normalization!r} is not valid; valid: "
            f"{', '.join(NORMALIZATIONS)}"
        )
    mean, std = NORMALIZATIONS[normalization]
    return (images.astype(jnp.float32) / 255.0 - jnp.array(mean)) / jnp.array(std)


def centroid_old_weight(config: ConfigDict, learning_rate: jax.Array) -> jax.Array | float:
    """Returns the weight of the old centroid in Eq. 4 of DGT, by `config.centroids.rule`."""
    match config.rule:
        case "literal":
            return 0.1 * learning_rate
        case "swapped":
            return 1.0 - 0.1 * learning_rate
        case "constant":
            return config.old_weight


def _accumulate(loss_fn, num_micro_batches, state, inputs, rng):
    """Loss, gradient and new model state of a batch that is computed in parts, one by one.

    Loss and gradient are the means over the parts; the model state goes from part to part.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if num_micro_batches == 1:
        (loss, model_state), grads = value_and_grad(state.params, state.model_state, inputs, rng)
        return loss, grads, model_state

    def micro_step(carry, part):
        loss_sum, grads_sum, model_state = carry
        index, inputs = part
        (loss, model_state), grads = value_and_grad(
            state.params, model_state, inputs, jax.random.fold_in(rng, index)
        )
        return (loss_sum + loss, jax.tree.map(jnp.add, grads_sum, grads), model_state), None

    def split(x):
        # Every n-th image, not n-th slices: each device of a mesh then finds its part of a
        # micro-batch among its own images, and so does pmap.
        return x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (loss, grads, model_state), _ = lax.scan(
        micro_step,
        (jnp.zeros(()), zeros, state.model_state),
        (jnp.arange(num_micro_batches), jax.tree.map(split, inputs)),
    )
    loss, grads = jax.tree.map(lambda x: x / num_micro_batches, (loss, grads))
    return loss, grads, model_state
