"""A classifier with a token head that compiles in a second, and runs with this model."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from tokenvit_jax.models.backbone import Trainable
from tokenvit_jax.tasks import default_config
from tokenvit_jax.tasks.classification import Classification
from tokenvit_jax.training.checkpoint import Checkpoints
from tokenvit_jax.training.state import init_state
from tokenvit_jax.training.workdir import write_config


class TokenModel(Trainable):
    """Patches of 32 pixels, a tanh, a classifier of the patches' mean and one of each patch."""

    num_classes: int
    token_head: bool = True

    def setup(self):
        self.patches = nn.Conv(6, (32, 32), strides=32, padding="SAME")
        self.classifier = nn.Dense(self.num_classes)
        self.token_classifier = nn.Dense(self.num_classes)

    def __call__(self, images, train=False):
        return self.token_logits(images, train)[0]

    def token_logits(self, images, train, box=None):
        x = self.patches(images)
        if box is not None:
            rows, columns = jnp.arange(x.shape[1])[:, None], jnp.arange(x.shape[2])
            inside = (rows >= box[0]) & (rows < box[1]) & (columns >= box[2]) & (columns < box[3])
            neighbours = x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)
            x = jnp.where(inside[..., None], neighbours, x)
        x = jnp.tanh(x)
        return self.classifier(x.mean((1, 2))), self.token_classifier(x)

    def dense_logits(self, images, train=False):
        return self.classifier(jnp.tanh(self.patches(images)))


def use_token_model(monkeypatch):
    """Makes the token model the model of every configuration."""

    monkeypatch.setattr(
        Classification, "make_model", lambda task: TokenModel(task.info.num_classes)
    )


def token_config():
    """Returns a configuration for the token model, with a last map of 3 x 3 cells."""
    config = default_config("classification")
    config.image_size = 96
    config.batch_size = 16
    config.num_steps = 10
    config.data.eval_batch_size = 8
    config.optimizer.learning_rate = 1e-2
    return config


def write_run(workdir: Path, seed: int = 0, normalization: str = "imagenet"):
    """Writes a run with a checkpoint of its initial parameters, and returns them."""
    config = token_config()
    config.seed = seed
    config.data.normalization = normalization
    model = TokenModel(num_classes=10)
    state = jax.jit(lambda: init_state(model, optax.sgd(0.1), config))()
    write_config(workdir, config)
    score = lambda metrics: metrics["eval/accuracy"]  # noqa: E731
    with Checkpoints(workdir, keep_last=1, keep_best=1, score=score) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.record(1, {"eval/accuracy": 0.5})
    return state.params
