"""Evaluates settings of Expedite in a trained run, on scenes.

A setting is a dictionary of overrides of a backbone's attributes, such as {"expedite": {...}}; {}
is the model as it was trained. Nothing is trained here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import pages, plots
from experiments.costs import count_macs
from experiments.runs import Run, Variables, load_run, normalize_images
from tokenvit_jax.data.datasets.scenes import ScenesSource
from tokenvit_jax.errors import UserError
from tokenvit_jax.expediting.similarity import mean_cosine
from tokenvit_jax.metrics.confusion import ConfusionMeter
from tokenvit_jax.tasks import Outcome
from tokenvit_jax.tasks.segmentation.model import Segmenter

BATCH = 20
NUM_TEST_SCENES = 200
DRAWS = 1000  # samples of the bootstrap
NOT_ADE20K = (
    f"This is NOT ADE20K: {NUM_TEST_SCENES} test scenes of 128 x 128 pixels, handwritten digits on "
    "photographs, five classes, one small network. Nothing is fine-tuned."
)

# Settings of the Segmenter, similar to the published ones (10 of 24 blocks before the clustering,
# 28 x 28 and 20 x 20 centres for 40 x 40 tokens).
DEPTH = 8
ALPHA = 3
LARGE, SMALL = 11, 8  # sides of the map of centres, for 16 x 16 tokens
TEMPERATURE = 50.0  # settings.py measures it on training scenes
BASELINES = {
    "pooling, reconstruction": {"iterations": 0},
    "clustering, bilinear": {"mode": "bilinear"},
    "pooling, bilinear": {"iterations": 0, "mode": "bilinear"},
}

Setting = dict[str, Any]


class Scenes(NamedTuple):
    """Images (N, H, W, 3) uint8 and label maps (N, H, W) uint8."""

    images: np.ndarray
    labels: np.ndarray


class Output(NamedTuple):
    """Output of a network.

    Attributes:
      classes: class of every pixel (N, H, W) uint8.
      features: a map of the backbone (N, h, w, C).
    """

    classes: np.ndarray
    features: np.ndarray


class Result(NamedTuple):
    """Cost and quality of a setting.

    Attributes:
      mmacs: 10^6 multiply-adds of one image.
      confusion: confusion matrix of every image (N, K, K), labels in rows.
      similarity: cosine between its features and the plain model's, averaged over positions and
        images.
    """

    mmacs: float
    confusion: np.ndarray
    similarity: float

    @property
    def miou(self) -> float:
        """Mean intersection over union [%], as `evaluate` computes it."""
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


def load(workdir: str, *, swin: bool = False) -> Run:
    """Loads the last checkpoint of a run on the scenes.

    Args:
      workdir: folder of the run.
      swin: whether the backbone should be a Swin Transformer instead of a plain host.
    """
    run = load_run(Path(workdir))
    config = run.config
    if config.dataset != "scenes" or config.model.startswith("swin") != swin:
        valid = "experiments/expedite/swin_scenes.py" if swin else "configs/segmenter_ti.py:scenes"
        raise UserError(
            f"{workdir} is a run of {config.model!r} on {config.dataset!r}; valid: a run of {valid}"
        )
    return run


def read_scenes(split: str, number: int) -> Scenes:
    """Reads the first scenes of a split, "train" or "test"."""
    source = ScenesSource(split)
    records = [source.read(index) for index in range(number)]
    images = np.stack([np.asarray(record["image"]) for record in records])
    return Scenes(images, np.stack([record["label_map"] for record in records]))


def test_scenes(quick: bool) -> Scenes:
    """Reads all test scenes, or with --quick a few."""
    return read_scenes("test", BATCH if quick else NUM_TEST_SCENES)


def clustered(depth: int, side: int, default: dict[str, Any], changes: dict[str, Any]) -> Setting:
    """Returns a setting that clusters tokens until the last block unless `beta` is given.

    Args:
      depth: number of blocks; in a hierarchical backbone, blocks of the expedited stage.
      side: rows and columns of the centres.
      default: attributes of `Expedite`, including `alpha`.
      changes: attributes that replace or extend the default ones.
    """
    changed = default | changes
    beta = {"beta": depth - changed["alpha"]}
    return {"expedite": beta | changed | {"clusters": (side, side)}}


def expedited(side: int, **changes: Any) -> Setting:
    """Returns the setting of the Segmenter that clusters after ALPHA of its 8 blocks.

    Args:
      side: rows and columns of the centres.
      **changes: other attributes of `Expedite`.
    """
    default = {"alpha": ALPHA, "where": "logits", "temperature": TEMPERATURE}
    return clustered(DEPTH, side, default, changes)


def last_map(backbone: nn.Module, images: jax.Array) -> jax.Array:
    """Returns the last map of a backbone (B, h, w, C)."""
    return backbone.features(images, False)[-1]


class Bench:
    """Evaluates settings of one trained run on the same scenes."""

    def __init__(
        self,
        trained: Run,
        scenes: Scenes,
        read: Callable[[nn.Module, jax.Array], jax.Array] = last_map,
    ):
        """Evaluates the plain model.

        Args:
          trained: the run.
          scenes: images and labels of the evaluation.
          read: function of a backbone and images that returns the map to compare.
        """
        self.trained = trained
        self.scenes = scenes
        self._read = read
        plain = self.run({})
        self._features = plain.features
        self.plain = self._compare({}, plain)

    def model(self, setting: Setting) -> Segmenter:
        """Returns the network with a setting."""
        model = self.trained.model
        return model.clone(backbone=model.backbone.clone(**setting))

    def mmacs(self, setting: Setting) -> float:
        """Counts 10^6 multiply-adds of one image."""
        return count_macs(self.model(setting), self.scenes.images.shape[1:3]) / 1e6

    def run(self, setting: Setting, variables: Variables | None = None) -> Output:
        """Returns the output of the network with a setting; see :meth:`evaluate`."""
        model = self.model(setting)
        variables = self.trained.variables if variables is None else variables

        def forward(model, images):
            images = normalize_images(self.trained.config, images)
            classes = jnp.argmax(model(images, False), -1).astype(jnp.uint8)
            return Output(classes, self._read(model.backbone, images))

        return map_scenes(jax.jit(nn.apply(forward, model)), variables, self.scenes.images)

    def evaluate(self, setting: Setting, variables: Variables | None = None) -> Result:
        """Returns cost and quality of a setting.

        Args:
          setting: the setting.
          variables: variables of the network; None: those of the run.
        """
        return self._compare(setting, self.run(setting, variables))

    def _compare(self, setting, output):
        num_classes = self.trained.model.head.num_classes
        confusion = confusions(output.classes, self.scenes.labels, num_classes)
        similarity = float(mean_cosine(output.features, self._features))
        return Result(self.mmacs(setting), confusion, similarity)

    def evaluate_all(
        self, settings: dict[str, Setting], variables: dict[str, Variables] | None = None
    ) -> dict[str, Result]:
        """Evaluates settings by name, and prints each result.

        Args:
          settings: name -> setting.
          variables: name -> variables of the network, where they are not the run's.
        """
        results = {}
        for name, setting in settings.items():
            results[name] = self.evaluate(setting, (variables or {}).get(name))
            print(f"{name}: {' | '.join(self.cells(results[name]))}", flush=True)
        return results

    def cells(self, result: Result) -> list[str]:
        """Formats cost, mIoU, its difference to the plain model, and similarity, for a table."""
        return [
            f"{result.mmacs:.1f}",
            f"{result.mmacs / self.plain.mmacs:.1%}",
            f"{result.miou:.2f}",
            difference(result, self.plain),
            f"{result.similarity:.3f}",
        ]

    def table(self, results: dict[str, Result], column: str) -> list[str]:
        """Returns the lines of results, the plain model first.

        Args:
          results: results of settings, by name.
          column: heading of the names.
        """
        return pages.table(
            [column, "MMACs", "% of plain", "mIoU", "difference", "similarity"],
            (
                [name, *self.cells(result)]
                for name, result in {"plain": self.plain, **results}.items()
            ),
        )


def map_scenes(fn: Callable, variables: dict[str, Any], images: np.ndarray) -> Any:
    """Returns `fn(variables, images)`, a tree of arrays, computed in batches."""
    batches = [
        jax.device_get(fn(variables, images[start : start + BATCH]))
        for start in range(0, len(images), BATCH)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)


def confusions(classes: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the confusion matrix of every image (N, K, K), labels in rows."""
    image = np.arange(len(labels))[:, None, None]
    cell = (image * num_classes + labels) * num_classes + classes
    counts = np.bincount(cell.ravel(), minlength=len(labels) * num_classes**2)
    return counts.reshape(len(labels), num_classes, num_classes)


def miou(confusion: np.ndarray) -> float:
    """Returns the mean intersection over union [%] of a confusion matrix (K, K)."""
    meter = ConfusionMeter(len(confusion))
    meter.add(Outcome({"confusion": confusion, "loss": 0.0}))
    return 100 * meter.result()["eval/miou"]


def bootstrap(result: Result) -> np.ndarray:
    """Returns the mIoU [%] of samples of the images (DRAWS,); all results use the same samples."""
    number, classes, _ = result.confusion.shape
    counts = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), DRAWS)
    sums = (counts @ result.confusion.reshape(number, -1)).reshape(DRAWS, classes, classes)
    return np.array([miou(confusion) for confusion in sums])


def difference(result: Result, other: Result) -> str:
    """Formats the difference between two mIoU and its spread over samples of the images."""
    if result is other:
        return ""
    return f"{result.miou - other.miou:+.2f} ± {spread(result, other):.2f}"


def spread(result: Result, other: Result) -> float:
    """Returns the standard deviation of the difference over samples of the images."""
    return float(np.std(bootstrap(result) - bootstrap(other)))


def heading(title: str, script: str, trained: Run, about: str) -> list[str]:
    """Returns the first lines of a page.

    Args:
      title: title of the page.
      script: `__file__` of the script that writes it.
      trained: the run that was evaluated.
      about: paragraph on this page's own content.
    """
    general = f"""
    The run was trained for {trained.step} steps. {NOT_ADE20K} MMACs are 10^6 multiply-adds of one
    image, and mIoU is in percent. Similarity is the cosine between the features and the plain
    model's features. ± is the standard deviation of the difference to the plain model over {DRAWS}
    bootstrap samples of the test scenes, the same samples for all settings; it does not include the
    variation between trainings.
    """
    return [*pages.heading(title, script, general), "", *pages.paragraph(about), ""]


def plot_over_cost(bench: Bench, curves: dict[str, list[Result]], features: str) -> Figure:
    """Draws mIoU and similarity over the cost.

    Args:
      bench: bench whose plain model is also drawn.
      curves: results of each method.
      features: label of the similarity.
    """
    figure, axes = plots.panels(2, width=10.4, height=3.8, grid=True)
    fields = {"miou": "mIoU, %", "similarity": features}
    for axis, (field, label) in zip(axes, fields.items(), strict=True):
        for number, (name, results) in enumerate(curves.items()):
            points = [(result.mmacs, getattr(result, field)) for result in results]
            marker, own = "os^vDP*X"[number % 8], plots.color(number)
            axis.plot(*zip(*points, strict=True), f"{marker}-", color=own, ms=5, label=name)
        axis.plot(bench.plain.mmacs, getattr(bench.plain, field), "k*", ms=9, label="plain")
        axis.set(xlabel="10^6 multiply-adds", ylabel=label)
    axes[0].legend(frameon=False, fontsize=8)
    return figure
