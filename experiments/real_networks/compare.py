"""Compares Expedite with token reducers and a smaller image on networks from Python packages.

    python -m experiments.real_networks.compare --network=vit_s14_dinov2 --cache=FOLDER

--network is a function of experiments.real_networks.networks. Results of each setting are kept in
--cache, so that a run that was stopped continues. Writes NETWORK.md and NETWORK.png here.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from absl import flags

from experiments import pages, plots
from experiments.real_networks import networks, photographs
from experiments.real_networks.methods import Method, at_cost_of
from tokenvit_jax import cli
from tokenvit_jax.data import NORMALIZATIONS
from tokenvit_jax.expediting.candidates import macs_of, with_expedite
from tokenvit_jax.expediting.search import FACTORS
from tokenvit_jax.expediting.similarity import Comparison, measured
from tokenvit_jax.models.expedite import FACTOR, Expedite
from tokenvit_jax.models.vit import VisionTransformer

CROPS = 3
BATCH = 8
DRAWS = 10000  # samples of the bootstrap


class Plan(NamedTuple):
    """What is compared on a network.

    Attributes:
      title: name of the network.
      second: name of the second figure.
      settings: (side of the image [pixels], number of crops of every photograph, setting of
        Expedite, reducers) of every table.
      sweep: setting whose temperature is varied, on one crop of every photograph.
    """

    title: str
    second: str
    settings: list[tuple[int, int, Expedite, list[str]]]
    sweep: Expedite


MAIN = [
    "ToMe, carry", "ToMe", "weighted K-Medoids, carry", "weighted K-Medoids", "EViT", "random",
]  # fmt: skip
MORE = [*MAIN, "weighted K-Means, carry", "PoWER-BERT", "importance"]
CARRY = ["ToMe, carry", "weighted K-Medoids, carry", "EViT"]
PLANS = {
    "vit_s14_dinov2": Plan(
        "ViT-S/14 (DINOv2, fine-tuned for saliency)",
        "saliency",
        [
            (224, CROPS, Expedite(4, 8, (11, 11)), MORE),
            (224, CROPS, Expedite(6, 6, (11, 11)), MAIN),
            (448, 1, Expedite(4, 8, (22, 22)), CARRY),
        ],
        Expedite(4, 8, (11, 11)),
    ),
    "clip_vit_b16": Plan(
        "CLIP ViT-B/16",
        "embedding",
        [(224, 2, Expedite(4, 8, (10, 10)), MAIN)],
        Expedite(4, 8, (10, 10)),
    ),
    "swin_b": Plan(
        "Swin-B",
        "pooled features",
        [(224, 1, Expedite(4, 14, (5, 5)), [])],
        Expedite(4, 14, (5, 5)),
    ),
}
FLAGS = flags.FlagValues()
flags.DEFINE_enum("network", None, list(PLANS), "network", flag_values=FLAGS)
flags.DEFINE_string("cache", None, "folder that keeps the results", flag_values=FLAGS)
flags.DEFINE_bool("sweep", True, "also vary the temperature", flag_values=FLAGS)


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
        cache.mkdir(parents=True, exist_ok=True)

    def images(self, side: int, crops: int) -> np.ndarray:
        """Returns normalised crops of all photographs (P * crops, side, side, 3)."""
        found = photographs.read_photographs().values()
        pixels = [photographs.crop(image, i, side) for image in found for i in range(crops)]
        mean, std = NORMALIZATIONS[networks.NORMALIZATION[self.name]]
        return ((np.stack(pixels) / 255 - mean) / std).astype(np.float32)

    def features(self, method: Method, images: np.ndarray) -> Features:
        """Returns the features of a method for full images."""
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
            patches, front = jax.device_get(run(self.variables, images[start : start + BATCH]))
            parts.append(Features(patches, self.second(patches, front)))
        return Features(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def rate(self, name: str, method: Method, images: np.ndarray, plain: Callable) -> dict:
        """Returns cost and similarities of every image to the plain network's; cached.

        Args:
          name: name of the result.
          method: the network with a setting.
          images: full images.
          plain: function without arguments that returns the plain network's features.
        """
        path = self.cache / f"{self.name}_{name.replace(' ', '_').replace(',', '')}.json"
        if not path.exists():
            found, own = self.features(method, images), plain()
            result = {
                "macs": macs_of(method.model, method.image_size)
                / macs_of(self.model, images.shape[1:3]),
                "about": method.about,
                "cosine": cosines(found.patches, own.patches).mean((1, 2)).tolist(),
                "second": SIMILARITY[self.name](found.second, own.second).tolist(),
                "neighbor": nearest(found.second, own.second).tolist(),
            }
            path.write_text(json.dumps(result))
            print(name, f"{result['macs']:.3f} {np.mean(result['cosine']):.3f}", flush=True)
        return json.loads(path.read_text())


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
SIMILARITY = {"vit_s14_dinov2": correlations, "clip_vit_b16": cosines, "swin_b": cosines}


# ------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------


def interval(values: Sequence[float], crops: int) -> tuple[float, float]:
    """Returns the 95 % interval of the mean over samples of the photographs."""
    means = np.mean(np.reshape(values, (-1, crops)), 1)
    index = np.random.default_rng(0).integers(len(means), size=(DRAWS, len(means)))
    return tuple(np.percentile(means[index].mean(1), [2.5, 97.5]))


def cell(values: Sequence[float], crops: int, sign: str = "") -> str:
    """Formats a mean and its interval."""
    low, high = interval(values, crops)
    return f"{np.mean(values):{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------


def compare(bench: Bench, side: int, crops: int, expedite: Expedite, reducers: list[str]) -> dict:
    """Returns the results of all methods at the cost of a setting."""
    images, own = bench.images(side, crops), []

    def plain():
        if not own:
            own.append(bench.features(Method(bench.model, (side, side), ""), images))
        return own[0]

    key = f"{side} {crops} {expedite.alpha} {expedite.beta} {expedite.clusters[0]}"
    setting = measured(expedite, distance(bench, images[::crops], expedite.alpha))
    fixed = dataclasses.replace(setting, temperature=50.0)
    name = "Expedite, temperature 50"
    methods = at_cost_of(bench.model, setting, (side, side), reducers)
    about = methods["Expedite"].about
    methods[name] = Method(with_expedite(bench.model, fixed), (side, side), about)
    print(key, f"temperature {setting.temperature:g}", flush=True)
    return {
        name: bench.rate(f"{key} {name}", method, images, plain) for name, method in methods.items()
    }


def distance(bench: Bench, images: np.ndarray, alpha: int) -> float:
    """Returns the distance of neighbouring tokens on up to 8 images."""
    return Comparison(bench.model, bench.variables, images[:BATCH]).distance(alpha)


def sweep(bench: Bench, expedite: Expedite) -> tuple[float, dict[float, dict]]:
    """Returns the distance of neighbouring tokens, and the results of all factors."""
    images, own = bench.images(224, 1), []

    def plain():
        if not own:
            own.append(bench.features(Method(bench.model, (224, 224), ""), images))
        return own[0]

    scale, results = distance(bench, images, expedite.alpha), {}
    for factor in sorted(FACTORS):
        setting = measured(expedite, scale, factor)
        method = Method(with_expedite(bench.model, setting), (224, 224), f"{setting.temperature:g}")
        results[factor] = bench.rate(f"factor {factor:g}", method, images, plain)
    return scale, results


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
        return [*cells, *([f"{np.mean(result['neighbor']):.2f}"] if embeds else [])]

    ordered = sorted(results.items(), key=lambda item: -np.mean(item[1]["cosine"]))
    return pages.table(columns, (row(*item) for item in ordered))


def plot(tables: list[dict], swept: dict[float, dict], plan: Plan) -> Any:
    """Draws the cosines of all methods, and the cosine over the factor."""
    figure, axes = plots.panels(
        len(tables) + bool(swept), width=3.9 * (len(tables) + bool(swept)), height=4.2
    )
    for axis, (heading, results, crops) in zip(axes, tables, strict=False):
        ordered = sorted(results.items(), key=lambda item: np.mean(item[1]["cosine"]))
        for at, (name, result) in enumerate(ordered):
            low, high = interval(result["cosine"], crops)
            own = plots.color(1 if name.startswith("Expedite") else 0)
            axis.plot([low, high], [at, at], color=own, linewidth=2)
            axis.plot(np.mean(result["cosine"]), at, "o", color=own, markersize=5)
        axis.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=8)
        axis.set(xlabel="cosine of patch features", title=heading)
        axis.title.set_fontsize(9)
    if swept:
        axis = axes[len(tables)]
        means = [np.mean(result["cosine"]) for result in swept.values()]
        axis.semilogx(list(swept), means, "o-", color=plots.color(1))
        axis.axvline(FACTOR, color="0.3", linestyle="--", linewidth=1)
        axis.set(xlabel="temperature / distance of neighbours", title="temperature (dashed: auto)")
        axis.title.set_fontsize(9)
    return figure


def main(flag_values: flags.FlagValues) -> None:
    """Runs the comparison."""
    plan = PLANS[flag_values.network]
    bench = Bench(flag_values.network, Path(flag_values.cache).expanduser())
    number = photographs.NUM_PHOTOGRAPHS
    lines = pages.heading(
        plan.title,
        __file__,
        f"""with --network={flag_values.network}. {number} photographs from scikit-image,
        scikit-learn and matplotlib. Cost is a fraction of the plain network's multiply-adds;
        methods other than pooling use the most tokens or pixels whose cost does not exceed
        Expedite's. Cosine: patch features against the plain network's, the mean over positions
        and images; features of a smaller image are resized bilinearly. Brackets are 95 % intervals
        over {DRAWS} bootstrap samples of the photographs, differences are paired. Nothing is
        trained. The temperature is {FACTOR} times the distance of neighbouring tokens, the median
        over {BATCH} images.""",
    )
    lines += ["", f"![cosines of all methods]({flag_values.network}.png)"]
    tables = []
    for side, crops, expedite, reducers in plan.settings:
        results = compare(bench, side, crops, expedite, reducers)
        text = "{}, {}, {} x {}".format(expedite.alpha, expedite.beta, *expedite.clusters)
        heading = f"Expedite {text} at {side} pixels"
        tables.append((heading, results, crops))
        lines += ["", f"## {heading}; {crops * number} images", "", *table(results, crops, plan)]
    swept = {}
    if flag_values.sweep:
        scale, swept = sweep(bench, plan.sweep)
        rows = [[f"{f:g}", r["about"], cell(r["cosine"], 1)] for f, r in swept.items()]
        about = f"Median squared distance of neighbouring tokens: {scale:.3g}. {number} images."
        lines += ["", "## Temperature", "", about, ""]
        lines += pages.table(["factor", "temperature", "cosine"], rows)
    page = Path(__file__).with_name(f"{flag_values.network}.py")  # the page is NETWORK.md
    pages.write(str(page), lines, plot(tables, swept, plan))


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("network", "cache"))
