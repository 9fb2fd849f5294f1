"""The contract of a task: everything that training and the commands need from a task."""

import abc
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.config import Entry, Need, input_shape
from tokenvit_jax.data import (
    DatasetInfo,
    Examples,
    eval_image,
    mean_and_std,
    with_channels,
)
from tokenvit_jax.models import model_settings

if TYPE_CHECKING:  # matplotlib takes long to import; training draws nothing
    from matplotlib.figure import Figure

Batch = dict[str, jax.Array]
Inputs = dict[str, jax.Array]
Rngs = dict[str, jax.Array]
Picture: TypeAlias = "Figure | Image.Image"

NUM_NAMED = 5  # number of classes that the text of a prediction names


class Aux(NamedTuple):
    """Results of a loss function besides the loss.

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
      rows: tree of arrays with a leading axis B; the host receives one row per image.
    """

    sums: Any
    rows: Any = ()


class Meter(Protocol):
    """Turns the outcomes of an evaluation pass into metrics, on the host."""

    def add(self, outcome: Outcome) -> None:
        """Adds the outcome of a batch, in numpy arrays."""

    def result(self) -> dict[str, float]:
        """Returns the metrics by their names in the logs, such as "eval/accuracy"."""

    def per_class(self) -> dict[str, np.ndarray]:
        """Returns metrics of every class by name, (num_classes,); nan: not defined."""

    def results(self) -> list[dict[str, Any]]:
        """Returns the predictions in the form that the dataset's own code evaluates."""


class Prediction(NamedTuple):
    """A model's prediction for one image.

    Attributes:
      arrays: the result by name, such as "probabilities" (num_classes,) or "labels" (H, W).
      row: the result for a table: texts, numbers, dictionaries or lists of numbers, and lists of
        objects, which are dictionaries.
      text: the result in one line.
      draw: function from a caption to pictures by name.
    """

    arrays: dict[str, np.ndarray]
    row: dict[str, Any]
    text: str
    draw: Callable[[str], dict[str, Picture]]


Predictor = Callable[[Image.Image], Prediction]


class Teacher(NamedTuple):
    """A run that labels the training images of another one.

    Attributes:
      workdir: folder of the run.
      checkpoint: "last", "best" or a step.
      key: entry of the configuration that names the folder, such as "distillation.teacher".
    """

    workdir: str
    checkpoint: str
    key: str


@dataclasses.dataclass(frozen=True, eq=False)
class Task(abc.ABC):
    """The configuration, examples, model, loss, metrics and pictures of one task.

    A loss is a mean over images, or it is divided by a count that :meth:`prepare` computes and sums
    over `axis_name`. Otherwise jit, pmap and different numbers of devices and micro-batches would
    give different numbers.

    Attributes:
      config: configuration of this task, see `tokenvit_jax.tasks.default_config`.
      info: facts about the dataset.
      axis_name: axis of `jax.pmap` over which a batch is split; None under `jax.jit`.
    """

    config: ConfigDict
    info: DatasetInfo
    axis_name: str | None = None

    reads: ClassVar[frozenset[str]]  # fields of a Record from which the examples are made
    entries: ClassVar[Mapping[str, Entry]]  # the entries of a configuration that only this task has
    needs: ClassVar[Sequence[Need]] = ()  # conditions under which some of them change something
    has_results: ClassVar[bool] = False  # whether the meter has a method `results`
    takes_boxes: ClassVar[bool] = False  # whether the predictor takes the boxes of persons, too

    @staticmethod
    def overridable(config: ConfigDict) -> dict[str, Any]:
        """Returns the dataclasses, or instances of them, whose fields the overrides replace.

        Args:
          config: configuration of this task.

        Returns:
          By group, such as "model_overrides".

        Raises:
          UserError: there is no such model or head.
        """
        return {"model_overrides": model_settings(config.model)}

    @abc.abstractmethod
    def check(self) -> None:
        """Raises UserError for the first entry of this task that does not go with others.

        The value of every entry is valid; see `tokenvit_jax.tasks.check_values`.
        """

    def check_devices(self, devices: int) -> None:
        """Raises UserError unless a training batch can be divided over this number of devices."""
        del devices  # most tasks take any batch

    @abc.abstractmethod
    def examples(self, *, train: bool) -> Examples:
        """Returns the object that turns records into examples."""

    @abc.abstractmethod
    def make_model(self) -> nn.Module:
        """Returns the model; ``model(images, train=False)`` touches every parameter.

        Raises:
          UserError: the model or an override is unknown.
        """

    @abc.abstractmethod
    def prepare(self, batch: Batch, rng: jax.Array) -> Inputs:
        """Returns the inputs of :meth:`loss` from a whole training batch, on the device.

        Args:
          batch: the entries of a training batch; see :meth:`examples`.
          rng: random key for draws that concern the whole batch.

        Returns:
          Arrays with a leading axis B, including the normalised images.
        """

    @abc.abstractmethod
    def loss(
        self, model: nn.Module, params: Any, model_state: Any, inputs: Inputs, rngs: Rngs
    ) -> tuple[jax.Array, Aux]:
        """Returns the loss () of a part of a batch, differentiable in the parameters.

        The step adds the losses that modules sow; see :class:`Aux`.

        Args:
          model: result of :meth:`make_model`.
          params: parameters of the model.
          model_state: other collections of the model.
          inputs: result of :meth:`prepare`, or some of its rows.
          rngs: random keys by name: "batch" (the key that :meth:`prepare` received, the same for
            all parts of a batch), "dropout", "routing" and "sample".
        """

    @abc.abstractmethod
    def evaluate(self, model: nn.Module, variables: Any, batch: Batch) -> Outcome:
        """Returns the outcome of an evaluation batch; records with "mask" 0 do not count."""

    def grouped(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Returns evaluation batches for :meth:`evaluate`, on the host.

        Args:
          batches: this process's batches, one shape for all; their records may come in any order.
        """
        return batches

    @abc.abstractmethod
    def meter(self) -> Meter:
        """Returns an empty meter."""

    @abc.abstractmethod
    def score(self, metrics: dict[str, float]) -> float:
        """Returns the number that selects the best checkpoint: the highest is best."""

    @abc.abstractmethod
    def predictor(self, model: nn.Module, variables: Any) -> Predictor:
        """Returns a function from an image of any size to its prediction."""

    @abc.abstractmethod
    def outputs(self, model: nn.Module, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        """Returns the outputs of the exported model by name, each with a leading axis B.

        Args:
          model: result of :meth:`make_model`.
          variables: variables of the model.
          images: (B, H, W, 3), normalised, with the sides of `view_size`; B may be symbolic.
        """

    @property
    def images_per_group(self) -> int:
        """Consecutive images of a batch whose losses belong together, on one device."""
        return 1

    @property
    def teacher(self) -> Teacher | None:
        """The run that labels the training images; None: no run does."""
        return None

    def misfit(self, teacher: "Task", model: nn.Module) -> str:
        """Returns why a model cannot be the teacher of this task; "" if it can.

        Args:
          teacher: task of the teacher's run.
          model: its model.
        """
        del teacher, model
        return ""

    def teach(
        self, teacher: "Task", model: nn.Module, variables: Any, batch: Batch, rng: jax.Array
    ) -> Batch:
        """Returns the entries that a teacher adds to a training batch, on the device.

        The default adds none.

        Args:
          teacher: task of the teacher's run.
          model: its model.
          variables: variables of the model.
          batch: a whole training batch, as :meth:`prepare` receives it.
          rng: the key that :meth:`prepare` receives.
        """
        del teacher, model, variables, batch, rng
        return {}

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of the images that the model is trained on, (H, W, C), from the configuration."""
        return input_shape(self.config)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the images that the model is trained on [pixels]."""
        return self.input_shape[:2]

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width of the images that the model sees at a time [pixels]."""
        return self.input_size

    def view(self, image: Image.Image) -> np.ndarray:
        """Returns the view of an image that the model sees, (*view_size, C) uint8."""
        image = with_channels(image, self.config.in_channels)
        return eval_image(image, self.view_size, crop=1.0)

    def normalize(self, images: jax.Array) -> jax.Array:
        """Returns images normalised for the model.

        Args:
          images: (B, H, W, C), from 0 to 255.

        Returns:
          (B, H, W, C) float32. With `data.normalization` "imagenet" they have about zero mean and
          unit variance; with "inception" they are in [-1, 1]. Alpha is in [-1, 0].

        Raises:
          UserError: the normalization is unknown.
        """
        mean, std = mean_and_std(self.config.data.normalization, self.config.in_channels)
        return (images.astype(jnp.float32) / 255.0 - jnp.array(mean)) / jnp.array(std)

    def pixels(self, images: jax.Array) -> jax.Array:
        """Undoes :meth:`normalize`, without rounding: (B, H, W, C) float32, from 0 to 255."""
        mean, std = mean_and_std(self.config.data.normalization, self.config.in_channels)
        return (images * jnp.array(std) + jnp.array(mean)) * 255.0

    def class_names(self) -> Sequence[str]:
        """Returns a name for every class: "class 0" and so on if the dataset gives none."""
        return self.info.classes or [f"class {label}" for label in range(self.info.num_classes)]


def middle_window(image: np.ndarray, size: Sequence[int], window: tuple[int, int]) -> np.ndarray:
    """Returns the window in the middle of an image that lies at the top left of a buffer.

    Args:
      image: the buffer (H, W, C), at least as large as a window.
      size: height and width of the image in the buffer.
      window: height h and width w of the window.

    Returns:
      (h, w, C); a window larger than the image also shows the buffer's padding.
    """
    top, left = (max(side - room, 0) // 2 for side, room in zip(size, window, strict=True))
    return image[top : top + window[0], left : left + window[1]]


def apply_in_training(
    model: nn.Module, params: Any, model_state: Any, images: jax.Array, rngs: Rngs, **kwargs: Any
) -> tuple[Any, Any]:
    """Runs the forward pass of a training step.

    Args:
      model: linen module, called as ``model(images, train=True, **kwargs)``.
      params: parameters of the model.
      model_state: other collections of the model.
      images: (B, H, W, C), normalised.
      rngs: random keys by name, as in :meth:`Task.loss`.
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


def by_class(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Returns numbers by class, rounded to 6 digits.

    Args:
      names: names of the classes. Classes of the same name get their number: "crane (134)".
      values: one number per class.
    """
    counts = Counter(names)
    pairs = enumerate(zip(names, values, strict=True))
    return {
        name if counts[name] == 1 else f"{name} ({label})": float(f"{value:.6g}")
        for label, (name, value) in pairs
    }


def describe_shares(shares: Sequence[tuple[str, float]]) -> str:
    """Returns a line with the first few of (class, share) pairs, shares in percent."""
    return ", ".join(f"{name} {share:.1%}" for name, share in shares[:NUM_NAMED])
