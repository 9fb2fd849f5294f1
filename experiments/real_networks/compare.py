"""Compares Expedite with token reducers and a smaller image on networks from Python packages.

    python -m experiments.real_networks.compare --network=vit_s14_dinov2 --cache=FOLDER

--network is a function of experiments.real_networks.networks. Results of each setting are kept in
--cache, so that a run that was stopped continues. Writes NETWORK.md and NETWORK.png here.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from absl import flags

from experiments import pages, plots, predictors
from experiments.real_networks import networks, photographs
from experiments.real_networks.methods import NEIGHBORS, REDUCERS, Method, at_cost_of
from tokenvit_jax import cli
from tokenvit_jax.data import NORMALIZATIONS
from tokenvit_jax.expediting.candidates import macs_of, with_expedite
from tokenvit_jax.expediting.search import FACTORS
from tokenvit_jax.expediting.similarity import Comparison, measured
from tokenvit_jax.models.expedite import FACTOR, Expedite
from tokenvit_jax.models.vit import VisionTransformer

BATCH = 8
DRAWS = 10000  # samples of the bootstrap
# Predictors that learned from the photographs of one fold are evaluated with those of the other.
FOLDS = 2
PER_IMAGE = ("cosine", "second", "nearest")


class Plan(NamedTuple):
    """What is compared on a network.

    Attributes:
      title: name of the network.
      second: name of the second figure.
      main: the figure that is drawn and over which the temperature is varied: "cosine" | "second".
      settings: (side of the image [pixels], setting of Expedite, reducers) of every table; the
        temperature of the first one is varied.
    """

    title: str
    second: str
    main: str
    settings: list[tuple[int, Expedite, list[str]]]


CARRY = ["ToMe, carry", "weighted K-Medoids, carry"]
MOST = [
    *CARRY, "EViT", "EViT, reconstructed", "DynamicViT", "DynamicViT, reconstructed", "ToMe",
    "weighted K-Medoids", "random", "ACT",
]  # fmt: skip
ALL = list(REDUCERS)
PLANS = {
    "vit_s14_dinov2": Plan(
        "ViT-S/14 (DINOv2, fine-tuned for saliency)",
        "saliency",
        "cosine",
        [
            (224, Expedite(4, 8, (11, 11)), ALL),
            (224, Expedite(6, 6, (11, 11)), ["ToMe, carry"]),
            (448, Expedite(4, 8, (22, 22)), ["ToMe, carry"]),
        ],
    ),
    "clip_vit_b16": Plan(
        "CLIP ViT-B/16", "embedding", "second", [(224, Expedite(4, 8, (10, 10)), MOST)]
    ),
    "swin_b": Plan("Swin-B", "pooled features", "cosine", [(224, Expedite(4, 14, (5, 5)), [])]),
}
FLAGS = flags.FlagValues()
flags.DEFINE_enum("network", None, list(PLANS), "network", flag_values=FLAGS)
flags.DEFINE_string("cache", None, "folder that keeps the results", flag_values=FLAGS)
flags.DEFINE_integer(
    "crops",
    1,
    "crops of every photograph",
    lower_bound=1,
    upper_bound=photographs.NUM_CROPS,
    flag_values=FLAGS,
)
flags.DEFINE_list("sides", ["224", "448"], "sides of the images [pixels]", flag_values=FLAGS)


# ------------------------------------------------------------------------------------------------
# Features
# ------------------------------------------------------------------------------------------------


class Features(NamedTuple):
    """Features of N images.

    Attributes:
      patches: the last map after its LayerNorm, on the grid of the full image (N, h, w, C).
      second: what the second figure compares (N, D).
    """

    patches: np.ndarray
    second: np.ndarray


class Bench:
    """Measures methods on one network, and keeps the results in a folder."""

    def __init__(self, name: str, cache: Path):
        self.name, self.cache = name, cache
        self.model, self.variables = getattr(networks, name)()
        self.variables = jax.device_put(self.variables)
        self.second = SECOND[name]()
        self.swept = "pooled" if PLANS[name].main == "second" else "features"
        cache.mkdir(parents=True, exist_ok=True)

    @functools.cache  # noqa: B019 - one bench per process
    def images(self, side: int, crop: int) -> np.ndarray:
        """Returns normalised crops of all photographs (P, side, side, 3)."""
        found = photographs.read_photographs().values()
        pixels = [photographs.crop(image, crop, side) for image in found]
        mean, std = NORMALIZATIONS[networks.NORMALIZATION[self.name]]
        return ((np.stack(pixels) / 255 - mean) / std).astype(np.float32)

    @functools.cache  # noqa: B019 - one bench per process
    def plain(self, side: int, crop: int) -> Features:
        """Returns the features of the plain network."""
        return self.features(Method(self.model, (side, side), ""), self.images(side, crop))

    @functools.cache  # noqa: B019 - one bench per process
    def comparison(self, side: int) -> Comparison:
        """Returns the comparison of features on the first crops."""
        return Comparison(self.model, self.variables, self.images(side, 0), self.swept)

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """Returns what a function without arguments computes, from the folder if it is there."""
        words = f"{self.name} {name}".replace(",", "").split()
        path = self.cache / f"{'_'.join(words)}.json"
        if not path.exists():
            path.write_text(json.dumps(compute()))
        return json.loads(path.read_text())

    def distance(self, side: int, alpha: int) -> float:
        """Returns the distance of neighbouring tokens."""
        name = f"{side} distance {alpha}"
        return self.remember(name, lambda: self.comparison(side).distance(alpha))

    def features(self, method: Method, images: np.ndarray) -> Features:
        """Returns the features of a method for full images, one of each photograph."""
        if method.keep is None:
            return self._apply(method, self.variables, images)
        # Of every fold, by the predictors that have not seen it.
        parts = []
        for fold in range(FOLDS):
            found = self._predictors(method, images.shape[1], fold)
            parts.append(self._apply(method, found, images[fold::FOLDS]))
        order = np.argsort(np.argsort(np.arange(len(images)) % FOLDS, kind="stable"))
        return Features(*(np.concatenate(part)[order] for part in zip(*parts, strict=True)))

    def _predictors(self, method: Method, side: int, fold: int) -> dict[str, Any]:
        """Returns the network's variables with predictors for a fold of the photographs."""
        words = f"{self.name} {side} predictors {predictors.STEPS} {fold}".split()
        path = self.cache / f"{'_'.join([*words, *map(str, method.keep)])}.npz"
        if not path.exists():
            crops = range(photographs.NUM_CROPS)
            own = [self.images(side, crop) for crop in crops]
            plain = [self.plain(side, crop).patches for crop in crops]
            others = [i for i in range(len(own[0])) if i % FOLDS != fold]
            seen = predictors.Images(
                *(np.concatenate([x[others] for x in y]) for y in (own, plain))
            )
            found = predictors.train(self.model, self.variables, method.keep, seen, fold)
            np.savez(path, **found)
        with np.load(path) as found:
            return jax.device_put(predictors.add(self.variables, found))

    def _apply(self, method, variables, images):
        full = images.shape[1:3]
        grid = tuple(-(-side // method.model.strides[-1]) for side in full)

        @jax.jit
        def run(variables, images):
            shape = (len(images), *method.image_size, 3)
            images = jax.image.resize(images, shape, "bilinear")
            patches, front = nn.apply(read, method.model)(variables, images)
            shape = (len(patches), *grid, patches.shape[-1])
            return jax.image.resize(patches, shape, "bilinear"), front

        parts = []
        for start in range(0, len(images), BATCH):
            patches, front = jax.device_get(run(variables, images[start : start + BATCH]))
            parts.append(Features(patches, self.second(patches, front)))
        return Features(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def rate(self, name: str, method: Method, side: int, crops: int) -> dict[str, Any]:
        """Returns cost and similarities of every image to the plain network's; cached.

        Args:
          name: name of the result.
          method: the network with a setting.
          side: side of the full images [pixels].
          crops: number of crops of every photograph.

        Returns:
          "macs", "about", and lists with one number per image, crop by crop.
        """
        parts = [
            self.remember(
                f"{side} {crop} {name}", functools.partial(self._rate, method, side, crop)
            )
            for crop in range(crops)
        ]
        joined = {key: [x for part in parts for x in part[key]] for key in PER_IMAGE}
        print(name, f"{parts[0]['macs']:.3f} {np.mean(joined['cosine']):.3f}", flush=True)
        return parts[0] | joined

    def _rate(self, method, side, crop):
        found, own = self.features(method, self.images(side, crop)), self.plain(side, crop)
        plain = macs_of(self.model, (side, side))
        return {
            "macs": macs_of(method.model, method.image_size) / plain,
            "about": method.about,
            "cosine": cosines(found.patches, own.patches).mean((1, 2)).tolist(),
            "second": SIMILARITY[self.name](found.second, own.second).tolist(),
            "nearest": nearest(found.second, own.second).tolist(),
        }

    def sweep(self, side: int, expedite: Expedite) -> dict[float, tuple[float, list[float]]]:
        """Returns the temperature and the cosines of all images for every factor."""
        scale, found = self.distance(side, expedite.alpha), {}
        for factor in sorted(FACTORS):
            setting = measured(expedite, scale, factor)
            find = functools.partial(self._similar, side, setting)
            similar = self.remember(f"{side} {self.swept} factor {factor:g}", find)
            found[factor] = setting.temperature, similar
            print(f"factor {factor:g} {np.mean(similar):.3f}", flush=True)
        return found

    def _similar(self, side, setting):
        compare = self.comparison(side)
        found = np.asarray(cosines(compare.features(setting), compare.features(None)))
        return found.reshape(len(found), -1).mean(1).tolist()


def read(model: nn.Module, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the normed patches of the last map, and what the second figure starts from."""
    if not isinstance(model, VisionTransformer):
        patches = model.features(images)[-1]
        return patches, model.pooled(images)
    patches, front = model.taps(images, False, [model.settings.depth - 1])[0]
    front = model.norm(front)
    return model.norm(patches), model.projection(front) if model.settings.projection else front


def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the cosines of vectors (..., C)."""
    return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)


def correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the correlations of vectors (N, D)."""
    return cosines(x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True))


def nearest(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns for every x (N, D) whether its nearest y by cosine is its own (N,)."""
    return cosines(x[:, None], y[None]).argmax(1) == np.arange(len(x))


def class_tokens() -> Callable:
    """Returns the function from patches and tokens in front to the class tokens (N, D)."""
    return lambda patches, front: front.reshape(len(front), -1)


def saliency() -> Callable:
    """Returns the function from normed patches and class token to saliency maps (N, D).

    The saliency decoder of the package runs in onnxruntime, up to its last convolution.
    """
    import onnx
    import onnxruntime

    graph = networks.read_graph(networks.vit_s14_file())
    decoder = [node for node in graph.graph.node if "backbone" not in node.name]
    first = next(node for node in decoder if node.op_type == "Slice").input[0]
    last = [node for node in decoder if node.op_type == "Conv"][-1].output[0]
    for name in (first, last):
        info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        graph.graph.value_info.append(info)
    inputs = [graph.graph.input[0].name, first]
    extracted = onnx.utils.Extractor(graph).extract_model(inputs, [last])
    # The shape of the images is fixed in the file.
    extracted.graph.input[0].type.tensor_type.ClearField("shape")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        extracted.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def run(patches, front):
        tokens = np.concatenate([front, patches.reshape(len(patches), -1, patches.shape[-1])], 1)
        sides = [14 * side for side in patches.shape[1:3]]
        pixels = np.zeros((len(tokens), 3, *sides), np.float32)
        values = [pixels, tokens.astype(np.float32)]
        used = {value.name for value in session.get_inputs()}
        feed = {n: v for n, v in zip(inputs, values, strict=True) if n in used}
        (logits,) = session.run([last], feed)
        return 1 / (1 + np.exp(-logits.reshape(len(logits), -1)))

    return run


SECOND = {"vit_s14_dinov2": saliency, "clip_vit_b16": class_tokens, "swin_b": class_tokens}
SECOND_TEXT = {
    "vit_s14_dinov2": "Saliency is the correlation of the saliency maps of the package's decoder.",
    "clip_vit_b16": "Embedding is the cosine of the projected class token; nearest is the share of "
    "images whose nearest embedding of the plain network belongs to the same image.",
    "swin_b": "Pooled features are compared by their cosine.",
}
PREDICTOR_TEXT = (
    f"DynamicViT's predictors, which it lacks, were trained in {predictors.STEPS} steps of "
    f"{predictors.BATCH} images for similar patch features, on all crops of the half of the "
    "photographs that is not evaluated with them."
)
SIMILARITY = {"vit_s14_dinov2": correlations, "clip_vit_b16": cosines, "swin_b": cosines}


# ------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------


def interval(values: Sequence[float], crops: int) -> tuple[float, float]:
    """Returns the 95 % interval of the mean over samples of the photographs."""
    means = np.mean(np.reshape(values, (crops, -1)), 0)
    index = np.random.default_rng(0).integers(len(means), size=(DRAWS, len(means)))
    return tuple(np.percentile(means[index].mean(1), [2.5, 97.5]))


def cell(values: Sequence[float], crops: int, sign: str = "") -> str:
    """Formats a mean and its interval."""
    low, high = interval(values, crops)
    return f"{np.mean(values):{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------


def compare(
    bench: Bench, side: int, crops: int, expedite: Expedite, reducers: list[str]
) -> dict[str, dict[str, Any]]:
    """Returns the results of all methods at the cost of a setting, by name."""
    setting = measured(expedite, bench.distance(side, expedite.alpha))
    key = f"{expedite.alpha} {expedite.beta} {expedite.clusters[0]}"
    methods = at_cost_of(
        bench.model, setting, (side, side), reducers,
        lambda name, find: bench.remember(f"{side} size {key} {name}", find),
    )  # fmt: skip
    fixed = with_expedite(bench.model, dataclasses.replace(setting, temperature=50.0))
    methods["Expedite, temperature 50"] = methods["Expedite"]._replace(model=fixed)
    return {
        name: bench.rate(f"{key} {name}", method, side, crops) for name, method in methods.items()
    }


def table(results: dict[str, Any], crops: int, plan: Plan) -> list[str]:
    """Returns the lines of a comparison, best first."""
    own = results["Expedite"]
    embeds = plan.second == "embedding"
    columns = [
        "method", "alpha, beta, centres; size; tokens", "cost", "cosine", "- Expedite", plan.second,
        "- Expedite", *(["nearest"] if embeds else []),
    ]  # fmt: skip

    def row(name, result):
        cells = [name, result["about"], f"{result['macs']:.3f}"]
        for field in ("cosine", "second"):
            difference = np.subtract(result[field], own[field])
            cells.append(cell(result[field], crops))
            cells.append("" if result is own else cell(difference, crops, "+"))
        return [*cells, *([f"{np.mean(result['nearest']):.2f}"] if embeds else [])]

    ordered = sorted(results.items(), key=lambda item: -np.mean(item[1][plan.main]))
    return pages.table(columns, (row(*item) for item in ordered))


def compared(plan: Plan) -> str:
    """Returns the name of the features that the main figure compares."""
    return "patch features" if plan.main == "cosine" else f"{plan.second}s"


def plot(tables: list, swept: dict[float, Any], plan: Plan) -> Any:
    """Draws the main figure of all methods, and over the factor."""
    number = len(tables) + 1
    figure, axes = plots.panels(number, width=4.2 * number, height=3.6, grid=True)
    for axis, (heading, results, crops) in zip(axes, tables, strict=False):
        ordered = sorted(results.items(), key=lambda item: np.mean(item[1][plan.main]))
        for at, (name, result) in enumerate(ordered):
            own = plots.color(1 if name.startswith("Expedite") else 0)
            axis.plot(interval(result[plan.main], crops), [at, at], color=own, linewidth=2)
            axis.plot(np.mean(result[plan.main]), at, "o", color=own, markersize=5)
        axis.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=8)
        axis.set_xlabel(f"cosine of {compared(plan)}, 95 % interval", fontsize=9)
        axis.set_title(heading, fontsize=9)
    axis = axes[-1]
    means = [np.mean(similar) for _, similar in swept.values()]
    axis.semilogx(list(swept), means, "o-", color=plots.color(1))
    axis.axvline(FACTOR, color="0.3", linestyle="--", linewidth=1)
    axis.set_xlabel("temperature / distance of neighbours", fontsize=9)
    axis.set_title("cosine over the temperature; dashed: auto", fontsize=9)
    return figure


def about(network: str, crops: int) -> str:
    """Returns the text below the title."""
    images = (
        f"{crops} x {photographs.NUM_PHOTOGRAPHS}" if crops > 1 else photographs.NUM_PHOTOGRAPHS
    )
    predicts = any("DynamicViT" in reducers for *_, reducers in PLANS[network].settings)
    trained = PREDICTOR_TEXT if predicts else ""
    return f"""
    The options are --network={network} and --crops={crops}: {images} images, from photographs of
    scikit-image, scikit-learn and matplotlib. The network is not trained. {trained} Cost is a
    fraction of the plain network's multiply-adds. Methods other than pooling use the most tokens or
    pixels whose cost does not exceed Expedite's; ACT saves only attention: where it cannot cost so
    little, it has as many prototypes per head as Expedite has centres. Cosine compares patch
    features with the plain network's, averaged over positions and images; features of a smaller
    image are resized bilinearly. "Reconstructed" means that each patch is a weighted mean of the
    {NEIGHBORS} remaining tokens that were nearest before the first reduction; otherwise a patch
    copies its nearest token. Brackets hold 95 % intervals over {DRAWS} bootstrap samples of the
    photographs; differences are paired. The temperature is {FACTOR} times the median squared
    distance of neighbouring tokens.
    {SECOND_TEXT[network]}
    """


def main(flag_values: flags.FlagValues) -> None:
    """Runs the comparison."""
    network, crops = flag_values.network, flag_values.crops
    plan, bench = PLANS[network], Bench(network, Path(flag_values.cache).expanduser())
    page = Path(__file__).with_name(f"{network}.py")  # results are in NETWORK.md
    lines = pages.heading(plan.title, __file__, about(network, crops))
    lines += ["", f"![cosines of all methods]({network}.png)"]
    tables = []
    for side, expedite, reducers in plan.settings:
        if str(side) in flag_values.sides:
            results = compare(bench, side, crops, expedite, reducers)
            text = "{}, {}, {} x {}".format(expedite.alpha, expedite.beta, *expedite.clusters)
            tables.append((f"Expedite {text}, {side} pixels", results, crops))
            lines += ["", f"## {tables[-1][0]}", "", *table(results, crops, plan)]
    side, expedite, _ = plan.settings[0]
    swept = bench.sweep(side, expedite)
    distance = bench.distance(side, expedite.alpha)
    text = f"""
    The median squared distance of neighbouring tokens after block {expedite.alpha} is
    {distance:.3g}. The {compared(plan)} of the first crops are compared, with the setting of the
    first table.
    """
    rows = [[f"{f:g}", f"{t:g}", cell(values, 1)] for f, (t, values) in swept.items()]
    lines += ["", "## Temperature", "", *pages.paragraph(text), ""]
    lines += pages.table(["temperature / distance", "temperature", "cosine"], rows)
    pages.write(str(page), lines, plot(tables, swept, plan))


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("network", "cache"))
