"""The contract of a task: all that training and the commands need to know of a kind of label."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data import DatasetInfo, Examples, eval_image, mean_and_std

if TYPE_CHECKING:  # matplotlib takes long to import; training draws nothing
    from matplotlib.figure import Figure

Batch = dict[str, jax.Array]
Inputs = dict[str, jax.Array]
Rngs = dict[str, jax.Array]
Picture: TypeAlias = "Figure | Image.Image"

NUM_NAMED = 5  # classes that the text of a prediction names


class Aux(NamedTuple):
    """What a loss gives beside its value.

    Attributes:
      model_state: the model's collections after the forward pass, without "params". The step takes
        out "losses", which modules sowed, and adds their sum to the loss.
      metrics: scalars to log by name, such as "loss/box".
    """

    model_state: Any
    metrics: dict[str, jax.Array]


class Outcome(NamedTuple):
    """The result of evaluating one batch.

    Attributes:
      sums: tree of arrays that are added over devices and batches.
      rows: tree of arrays with a leading B; they come back image by image.
    """

    sums: Any
    rows: Any = ()


class Meter(Protocol):
    """Turns the outcomes of a pass into metrics, on the host."""

    def add(self, outcome: Outcome) -> None:
        """Adds the outcome of a batch, as numpy arrays."""

    def result(self) -> dict[str, float]:
        """Returns the metrics by the name they are logged with, such as "eval/accuracy"."""


class Prediction(NamedTuple):
    """What a model says about one image.

    Attributes:
      arrays: the result by name, such as "probabilities" (num_classes,) or "labels" (H, W).
      text: the result in one line.
      draw: takes a caption and returns pictures by kind.
    """

    arrays: dict[str, np.ndarray]
    text: str
    draw: Callable[[str], dict[str, Picture]]


Predictor = Callable[[Image.Image], Prediction]


@dataclasses.dataclass(frozen=True, eq=False)
class Task(abc.ABC):
    """A kind of label: its configuration, examples, model, loss, metrics and pictures.

    A loss is a mean over images, or it is divided by a count that :meth:`prepare` knows and has
    summed over `axis_name`. Only so do jit, pmap and any number of devices and micro-batches give
    the same numbers.

    Attributes:
      config: a configuration of this task, see `tokenvit_jax.tasks.default_config`.
      info: facts about its dataset.
      axis_name: axis of `jax.pmap` over which a batch is split; None under `jax.jit`.
    """

    config: ConfigDict
    info: DatasetInfo
    axis_name: str | None = None

    reads: ClassVar[frozenset[str]]  # the fields of a Record that the examples are made from

    @staticmethod
    @abc.abstractmethod
    def defaults() -> ConfigDict:
        """Returns the entries that only this task has, with their defaults."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raises UserError for the first entry of this task that is not valid."""

    def check_devices(self, devices: int) -> None:
        """Raises UserError unless a training batch can be divided over so many devices."""
        del devices  # most tasks take any batch

    @abc.abstractmethod
    def examples(self, *, train: bool) -> Examples:
        """Returns what makes the examples of a batch from records."""

    @abc.abstractmethod
    def make_model(self) -> nn.Module:
        """Returns the model; ``model(images, train=False)`` touches every parameter.

        Raises:
          UserError: unknown model or override.
        """

    @abc.abstractmethod
    def prepare(self, batch: Batch, rng: jax.Array) -> Inputs:
        """Returns what :meth:`loss` reads, from a whole training batch on the device.

        Args:
          batch: the entries of a training batch; see :meth:`examples`.
          rng: key for what is drawn for the batch as a whole.

        Returns:
          Arrays that lead with B, normalised images among them.
        """

    @abc.abstractmethod
    def loss(
        self, model: nn.Module, params: Any, model_state: Any, inputs: Inputs, rngs: Rngs
    ) -> tuple[jax.Array, Aux]:
        """Returns the loss () of a part of a batch, differentiable in the parameters.

        The step adds the losses that modules sow; see :class:`Aux`.

        Args:
          model: of :meth:`make_model`.
          params: its parameters.
          model_state: its other collections.
          inputs: of :meth:`prepare`, or a part of their rows.
          rngs: keys by name: "batch" (the same for all parts of a batch, and the one that
            :meth:`prepare` got), "dropout", "routing" and "sample".
        """

    @abc.abstractmethod
    def evaluate(self, model: nn.Module, variables: Any, batch: Batch) -> Outcome:
        """Returns the outcome of an evaluation batch; records with "mask" 0 do not count."""

    @abc.abstractmethod
    def meter(self) -> Meter:
        """Returns a meter without outcomes."""

    @abc.abstractmethod
    def score(self, metrics: dict[str, float]) -> float:
        """Returns the number that the best checkpoint has the highest value of."""

    @abc.abstractmethod
    def predictor(self, model: nn.Module, variables: Any) -> Predictor:
        """Returns a function from an RGB image of any size to its prediction."""

    @property
    def view_size(self) -> int:
        """Side in pixels of the square images that the model sees at a time."""
        return self.config.image_size

    def view(self, image: Image.Image) -> np.ndarray:
        """Returns an image as one view of the model, (S, S, 3) uint8, S being `view_size`."""
        return eval_image(image, self.view_size, crop=1.0)

    def normalize(self, images: jax.Array) -> jax.Array:
        """Returns images as the model takes them.

        Args:
          images: (B, H, W, 3) uint8.

        Returns:
          (B, H, W, 3) float32: with `data.normalization` "imagenet" of about zero mean and unit
          variance, with "inception" in [-1, 1].

        Raises:
          UserError: unknown normalization.
        """
        mean, std = mean_and_std(self.config.data.normalization)
        return (images.astype(jnp.float32) / 255.0 - jnp.array(mean)) / jnp.array(std)

    def class_names(self) -> Sequence[str]:
        """Returns a name for every class; where the dataset has none, "class 0" and so on."""
        return self.info.classes or [f"class {label}" for label in range(self.info.num_classes)]


def apply_in_training(
    model: nn.Module, params: Any, model_state: Any, images: jax.Array, rngs: Rngs, **kwargs: Any
) -> tuple[Any, Any]:
    """Runs the forward pass of a training step.

    Args:
      model: linen module, called as ``model(images, train=True, **kwargs)``.
      params: its parameters.
      model_state: its other collections.
      images: (B, H, W, 3), normalised.
      rngs: as in :meth:`Task.loss`.
      **kwargs: further arguments of the model, or ``method``.

    Returns:
      The output and the new model state, with the collection "losses" if modules sowed any.
    """
    return model.apply(
        {"params": params, **model_state},
        images,
        train=True,
        rngs={name: rngs[name] for name in ("dropout", "routing", "sample")},
        mutable=[*model_state, "losses"],
        **kwargs,
    )


def describe_shares(shares: Sequence[tuple[str, float]]) -> str:
    """Returns a line with the first few of (class, share) pairs, shares in percent."""
    return ", ".join(f"{name} {share:.1%}" for name, share in shares[:NUM_NAMED])
