"""Trains for a short time without a workdir, and loads runs and test images for the scripts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tokenvit_jax.data import eval_batches, open_split, train_batches
from tokenvit_jax.data.workers import Batches
from tokenvit_jax.memory import keep_pages
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.tasks import create_task
from tokenvit_jax.training.devices import make_parallel
from tokenvit_jax.training.evaluation import evaluate_batches
from tokenvit_jax.training.initial import Initial, start_from
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.run import Run
from tokenvit_jax.training.run import load_run as load_any_run
from tokenvit_jax.training.state import TrainState, eval_variables, init_state
from tokenvit_jax.training.step import make_eval_step, make_train_step
from tokenvit_jax.training.workdir import for_inference, read_config

Variables = dict[str, Any]


class ShortRun(NamedTuple):
    """Result of a short training without a workdir.

    Attributes:
      loss: training loss of every step (num_steps,).
      metrics: metrics on the test images after training, as `evaluate` names them.
      model: the trained module.
      variables: variables of the module after training.
    """

    loss: np.ndarray
    metrics: dict[str, float]
    model: nn.Module
    variables: Variables

    @property
    def accuracy(self) -> float:
        """Accuracy on the test images: share of the images, or of the pixels."""
        return self.metrics["eval/accuracy"]

    @property
    def test_loss(self) -> float:
        """Loss on the test images [nats]."""
        return self.metrics["eval/loss"]


def load_run(workdir: Path, checkpoint: str = "last", data_dir: str | None = None) -> Run:
    """Loads a checkpoint of a training run, configured for the devices of this machine.

    Args:
      workdir: folder of the run.
      checkpoint: "last", "best" or a step.
      data_dir: folder of the prepared dataset; None: the folder that the run read.

    Raises:
      UserError: there is no such run or checkpoint, or the checkpoint belongs to another model.
    """
    config = for_inference(read_config(workdir), data_dir)
    return load_any_run(workdir, checkpoint, config=config)


def make_model(config: ConfigDict) -> nn.Module:
    """Returns the model of a configuration, for the classes of its dataset."""
    return create_task(config).make_model()


def random_variables(model: nn.Module, images: jax.Array) -> Variables:
    """Returns variables with random values without `model.init`, which takes long to compile."""
    draw = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(draw.normal(size=x.shape).astype(np.float32) * 0.02),
        variable_shapes(model, images),
    )


def normalize_images(config: ConfigDict, images: jax.Array) -> jax.Array:
    """Returns uint8 images (B, H, W, 3) normalised for the models of a configuration, float32."""
    return create_task(config).normalize(images)


def test_data(config: ConfigDict, devices: int = 1) -> Batches:
    """Returns the batches of a configuration's evaluation split."""
    task = create_task(config)
    source = open_split(config, task.info.eval_split)
    return eval_batches(source, task.examples(train=False), config, devices=devices)


def test_images(config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first batch of test images (B, S, S, 3) uint8, and their labels (B,)."""
    batch = next(iter(test_data(config)))
    return batch["image"], batch["label"]


def test_batches(config: ConfigDict) -> list[np.ndarray]:
    """Returns all test images in batches (B, S, S, 3) uint8."""
    return [batch["image"] for batch in test_data(config)]


def observe(config: ConfigDict, model: nn.Module) -> Callable[[Variables, jax.Array], tuple]:
    """Returns a compiled function that applies a model and keeps its intermediates.

    Args:
      config: configuration of the model.
      model: the module.

    Returns:
      A function of variables and images (B, H, W, 3) uint8 that returns the model's output and its
      collection "intermediates".
    """

    @jax.jit
    def apply(variables, images):
        images = normalize_images(config, images)
        output, state = model.apply(variables, images, train=False, mutable=["intermediates"])
        return output, state.get("intermediates", {})

    return apply


def make_evaluate(config: ConfigDict, model: nn.Module) -> Callable[[Variables], dict[str, float]]:
    """Returns a function of a model's variables that returns its metrics on the test images.

    The evaluation step is compiled once for all variables.
    """
    parallel = make_parallel(config)
    task = create_task(config)
    step = parallel.eval_step(make_eval_step(task, model))

    def evaluate(variables):
        placed = parallel.put_variables(variables)
        batches = test_data(config, jax.device_count())
        return evaluate_batches(task, step, placed, batches, parallel)

    return evaluate


def train(
    config: ConfigDict,
    watch: Callable[[nn.Module, int, TrainState], None] | None = None,
    initial: Variables | None = None,
) -> ShortRun:
    """Trains a model in this process, without a workdir.

    Args:
      config: configuration of the training; see `tokenvit_jax.config`.
      watch: function that is called with the model, the number of finished steps and the state,
        before every step and after the last one.
      initial: variables from which training starts; None: random variables.
    """
    keep_pages()
    task = create_task(config)
    model = task.make_model()
    optimizer = make_optimizer(config, model)
    parallel = make_parallel(config)

    def init_fn():
        return init_state(model, optimizer, config)

    state = parallel.init(init_fn)
    if initial is not None:
        state, _ = start_from(state, Initial(Path("memory"), initial), task)
    train_step = make_train_step(task, model, optimizer)
    train_step = parallel.train_step(train_step, parallel.abstract(init_fn))
    source = open_split(config, task.info.train_split)
    batches = iter(train_batches(source, task.examples(train=True), config))
    loss = []
    for step, batch in zip(range(config.num_steps), batches, strict=False):
        if watch:
            watch(model, step, state)
        state, metrics = train_step(state, batch)
        loss.append(float(metrics["loss"]))
    if watch:
        watch(model, config.num_steps, state)
    variables = eval_variables(state.params, state.model_state, state.ema)
    metrics = make_evaluate(config, model)(variables)
    return ShortRun(np.array(loss), metrics, model, variables)
