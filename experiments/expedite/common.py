"""What the experiments share: a trained run, settings inserted into it, and what they cost.

A setting is the overrides of a backbone's attributes, such as {"expedite": {...}}; {} is the model
as it was trained. Nothing is trained here.
"""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from tokenvit_jax.data import dataset_info, open_split
from tokenvit_jax.errors import UserError
from tokenvit_jax.expedite_similarity import mean_cosine
from tokenvit_jax.summary import summarize_model
from tokenvit_jax.tasks import segmentation
from tokenvit_jax.training.checkpoint import load_variables
from tokenvit_jax.training.step import normalize
from tokenvit_jax.training.workdir import read_config

FOLDER = Path(__file__).parent
BATCH = 20
DRAWS = 1000  # of the bootstrap
NOT_ADE20K = (
    "This is NOT ADE20K: 200 test scenes of 128 x 128 pixels, handwritten digits on photographs, "
    "five classes, one small network. Nothing is fine-tuned."
)
SPREAD = (
    "± is the standard deviation of the difference to the plain model over 1000 bootstrap samples "
    "of the test scenes, the same ones for all settings; that of another training is not in it."
)

# Of the Segmenter, near the published ones: 10 of 24 blocks before the clustering, 28 x 28 and
# 20 x 20 centres of 40 x 40 tokens.
ALPHA = 3
LARGE, SMALL = 11, 8  # sides of the map of centres, of 16 x 16 tokens
TEMPERATURE = 50.0  # settings.py chooses it on training scenes

Setting = dict[str, Any]


class Trained(NamedTuple):
    """A run: its configuration, its model, and variables after `step` steps."""

    config: ConfigDict
    model: segmentation.Segmenter
    variables: dict[str, Any]
    step: int


class Scenes(NamedTuple):
    """Images (N, H, W, 3) uint8 and label maps (N, H, W) uint8."""

    images: np.ndarray
    labels: np.ndarray


class Found(NamedTuple):
    """What a network gives.

    classes: of every pixel (N, H, W) uint8. features: a map of the backbone (N, h, w, C).
    """

    classes: np.ndarray
    features: np.ndarray


class Result(NamedTuple):
    """What a setting shows.

    mmacs: 10^6 multiply-adds of an image. confusion: of every image (N, K, K), labels in rows.
    similarity: cosine of its features and those of the plain model, mean over places and images.
    """

    mmacs: float
    confusion: np.ndarray
    similarity: float

    @property
    def miou(self) -> float:
        """In percent, as `evaluate` computes it."""
        return miou(self.confusion.sum(0))


def define_flags(*workdirs: str) -> flags.FlagValues:
    """Returns flags for folders of runs, and --quick.

    Args:
      *workdirs: names of the flags.
    """
    flag_values = flags.FlagValues()
    for name in workdirs:
        flags.DEFINE_string(name, None, "folder of a training run", flag_values=flag_values)
    flags.DEFINE_bool("quick", False, "20 scenes; writes nothing", flag_values=flag_values)
    return flag_values


def load(workdir: str, *, swin: bool = False) -> Trained:
    """Reads the last checkpoint of a run on the scenes.

    Args:
      workdir: its folder.
      swin: whether its backbone should be a Swin Transformer, else a plain host.
    """
    config = read_config(Path(workdir))
    if config.dataset != "scenes" or config.model.startswith("swin") != swin:
        wanted = "swin_scenes.py of this folder" if swin else "configs/segmenter_ti.py:scenes"
        raise UserError(
            f"{workdir} is a run of {config.model!r} on {config.dataset!r}; valid: one of {wanted}"
        )
    model = segmentation.make_model(config, dataset_info(config.dataset).num_classes)
    loaded = load_variables(model, config.image_size, Path(workdir))
    return Trained(config, model, loaded.variables, loaded.step)


def read_scenes(split: str, number: int) -> Scenes:
    """Reads the first scenes of a split, "train" or "test"."""
    source = open_split("scenes", split, "")
    records = [source.read(index) for index in range(number)]
    images = np.stack([np.asarray(record["image"]) for record in records])
    return Scenes(images, np.stack([record["label_map"] for record in records]))


def test_scenes(quick: bool) -> Scenes:
    """Reads all test scenes, or a few."""
    return read_scenes("test", BATCH if quick else 200)


def expedited(side: int, **changes: Any) -> Setting:
    """Returns the setting of the Segmenter that clusters after ALPHA of 8 blocks.

    Args:
      side: rows and columns of the centres.
      **changes: other attributes of `Expedite`.
    """
    default = {"alpha": ALPHA, "where": "logits", "temperature": TEMPERATURE}
    changed = default | changes
    beta = {"beta": 8 - changed["alpha"]}
    return {"expedite": beta | changed | {"clusters": (side, side)}}


def last_map(backbone: nn.Module, images: jax.Array) -> jax.Array:
    """Returns the last map of a backbone, (B, h, w, C)."""
    return backbone.features(images, False)[-1]


class Bench:
    """Evaluates settings of one trained run on the same scenes."""

    def __init__(
        self,
        trained: Trained,
        scenes: Scenes,
        read: Callable[[nn.Module, jax.Array], jax.Array] = last_map,
    ):
        """Evaluates the plain model.

        Args:
          trained: the run.
          scenes: what is evaluated.
          read: backbone, images -> the map whose similarity counts.
        """
        self.trained = trained
        self.scenes = scenes
        self._read = read
        plain = self.run({})
        self._features = plain.features
        self.plain = self._compare({}, plain)

    def model(self, setting: Setting) -> segmentation.Segmenter:
        """Returns the network with a setting."""
        model = self.trained.model
        return model.clone(backbone=model.backbone.clone(**setting))

    def mmacs(self, setting: Setting) -> float:
        """Counts 10^6 multiply-adds of one image."""
        size, name = self.scenes.images.shape[1:3], self.trained.config.model
        return summarize_model(self.model(setting), size, name).macs / 1e6

    def run(self, setting: Setting) -> Found:
        """Returns what the network gives with a setting."""
        model = self.model(setting)

        def forward(model, images):
            images = normalize(images, self.trained.config.data.normalization)
            classes = jnp.argmax(model(images, False), -1).astype(jnp.uint8)
            return Found(classes, self._read(model.backbone, images))

        return map_scenes(
            jax.jit(nn.apply(forward, model)), self.trained.variables, self.scenes.images
        )

    def evaluate(self, setting: Setting) -> Result:
        """Returns what a setting shows."""
        return self._compare(setting, self.run(setting))

    def _compare(self, setting, found):
        confusion = confusions(
            found.classes, self.scenes.labels, self.trained.model.head.num_classes
        )
        return Result(
            self.mmacs(setting), confusion, float(mean_cosine(found.features, self._features))
        )

    def evaluate_all(self, settings: dict[str, Setting]) -> dict[str, Result]:
        """Evaluates settings by name, and prints each."""
        results = {}
        for name, setting in settings.items():
            results[name] = self.evaluate(setting)
            print(f"{name}: {self.cells(results[name])}", flush=True)
        return results

    def cells(self, result: Result) -> str:
        """Formats cost, mIoU, its difference to the plain model, and similarity, for a table."""
        change = difference(result, self.plain)
        part = result.mmacs / self.plain.mmacs
        return (
            f"{result.mmacs:.1f} | {part:.1%} | {result.miou:.2f} | {change} | "
            f"{result.similarity:.3f}"
        )

    def table(self, results: dict[str, Result], column: str) -> list[str]:
        """Returns the lines of results, the plain model first.

        Args:
          results: of settings, by name.
          column: heading of the names.
        """
        lines = [
            f"| {column} | MMACs | of plain | mIoU | difference | similarity |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        named = {"plain": self.plain, **results}
        return lines + [f"| {name} | {self.cells(result)} |" for name, result in named.items()]


def map_scenes(fn: Callable, variables: dict[str, Any], images: np.ndarray) -> Any:
    """Returns the tree of arrays that a function of variables and images gives for all images."""
    batches = [
        jax.device_get(fn(variables, images[start : start + BATCH]))
        for start in range(0, len(images), BATCH)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)


def confusions(classes: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the confusion of every image (N, K, K), labels in rows."""
    image = np.arange(len(labels))[:, None, None]
    place = (image * num_classes + labels) * num_classes + classes
    counts = np.bincount(place.ravel(), minlength=len(labels) * num_classes**2)
    return counts.reshape(len(labels), num_classes, num_classes)


def miou(confusion: np.ndarray) -> float:
    """Returns the mean intersection over union, percent, of a confusion (K, K)."""
    return 100 * segmentation.mean_metrics([{"confusion": confusion, "loss": 0.0}])["eval/miou"]


def bootstrap(result: Result) -> np.ndarray:
    """Returns the mIoU of samples of the images (DRAWS,), percent; the same samples for all."""
    number, classes, _ = result.confusion.shape
    counts = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), DRAWS)
    sums = (counts @ result.confusion.reshape(number, -1)).reshape(DRAWS, classes, classes)
    return np.array([miou(confusion) for confusion in sums])


def difference(result: Result, other: Result) -> str:
    """Formats the difference of two mIoU and its spread over samples of the images."""
    if result is other:
        return ""
    return f"{result.miou - other.miou:+.2f} ± {spread(result, other):.2f}"


def spread(result: Result, other: Result) -> float:
    """Returns the standard deviation of the difference over samples of the images."""
    return float(np.std(bootstrap(result) - bootstrap(other)))


def heading(title: str, script: str, trained: Trained) -> list[str]:
    """Returns the first lines of a page.

    Args:
      title: of the page.
      script: that writes it.
      trained: the run that it is about.
    """
    return [
        f"# {title}",
        "",
        *paragraph(
            f"Written by `python -m experiments.expedite.{script}`, after step {trained.step}. "
            f"{NOT_ADE20K} MACs: 10^6 multiply-adds of one image. mIoU: percent. Similarity: "
            f"cosine of the features and those of the plain model. {SPREAD}"
        ),
        "",
    ]


def paragraph(text: str) -> list[str]:
    """Returns the lines of a text."""
    return textwrap.wrap(text, 96, break_on_hyphens=False)


def axes(count: int) -> tuple[Figure, Sequence[Axes]]:
    """Returns a figure of plots side by side."""
    figure = Figure(figsize=(5.2 * count, 3.8), layout="constrained")
    plots = figure.subplots(1, count, squeeze=False)[0]
    for axis in plots:
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    return figure, plots


def row(cells: Iterable) -> str:
    """Returns the line of a row of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def write(name: str, lines: Sequence[str], figure: Figure | None = None) -> None:
    """Writes the page NAME.md and the figure NAME.png."""
    (FOLDER / f"{name}.md").write_text("\n".join(lines) + "\n")
    if figure is not None:
        figure.savefig(FOLDER / f"{name}.png", dpi=100)
