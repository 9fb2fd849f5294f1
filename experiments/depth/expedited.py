"""Compares clustered DPT with cheaper forms of the same network, on the embedded depth scenes.

    python -m experiments.depth.expedited --workdirs=RUN_0,RUN_1,RUN_2 [--quick]

The runs are trainings that differ only in their seed. Those of the page were made by

    python -m tokenvit_jax.train --config=configs/dpt.py:scenes --workdir=RUN_0 --config.seed=0 \\
        --config.model_overrides.depth=8 --config.head_overrides.channels=16

Nothing is trained here. Writes expedited.md and expedited.png.
"""

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
from experiments.runs import Run, load_run, normalize_images
from tokenvit_jax import cli
from tokenvit_jax.data.datasets.depth_scenes import INFO, SIDE, DepthScenesSource
from tokenvit_jax.errors import UserError
from tokenvit_jax.metrics.depth import depth_metrics
from tokenvit_jax.ops.resize import resize_bicubic

FLAGS = flags.FlagValues()
flags.DEFINE_list("workdirs", None, "folders of training runs", flag_values=FLAGS)
flags.DEFINE_bool("quick", False, "20 scenes; writes nothing", flag_values=FLAGS)

BATCH = 20
SHARES = (0.25, 0.5)  # of the blocks that run on all tokens
SIDES = (12, 10, 8, 6)  # rows and columns of the centres, for 16 x 16 tokens
SMALLER = (112, 96, 80, 64)  # sides of smaller images [pixels], in multiples of 16
HARD, SOFT = {"neighbors": 1, "temperature": 1.0}, {}
METHODS: dict[str, dict[str, Any]] = {
    "clustering, hard": HARD,
    "clustering, soft": SOFT,
    "pooling, soft": {"iterations": 0},
    "pooling, bilinear": {"iterations": 0, "mode": "bilinear"},
}
SMALLER_IMAGE = "smaller image"
METRICS = ("rmse", "abs_rel", "delta1")
COLUMNS = ["method", "blocks before", "centres or image", "MMACs", "% of plain", "RMSE, m",
           "- plain", "AbsRel", "delta 1"]  # fmt: skip


class Setting(NamedTuple):
    """A way to run the network.

    Attributes:
      method: its name.
      expedite: settings of `Expedite`; None: the plain network.
      side: side of the image [pixels].
    """

    method: str
    expedite: dict[str, Any] | None = None
    side: int = SIDE


class Result(NamedTuple):
    """Cost of a setting, and its metrics averaged over the images, one value per run."""

    mmacs: float
    metrics: dict[str, np.ndarray]


def settings(depth: int) -> list[Setting]:
    """Returns the settings that are compared, the plain network first.

    Args:
      depth: number of blocks of the network.
    """
    alphas = [round(share * depth) for share in SHARES]
    clustered = [
        Setting(name, {"alpha": alpha, "beta": depth - alpha, "clusters": (side, side)} | changes)
        for name, changes in METHODS.items()
        for alpha in alphas
        for side in SIDES
    ]
    smaller = [Setting(SMALLER_IMAGE, side=side) for side in SMALLER]
    return [Setting("plain"), *clustered, *smaller]


def load(workdir: str) -> Run:
    """Loads the last checkpoint of a run on the scenes."""
    run = load_run(Path(workdir))
    if run.config.dataset != INFO.name:
        raise UserError(
            f"{workdir} is a run on {run.config.dataset!r}; valid: runs of configs/dpt.py:scenes"
        )
    return run


def depth_of(runs: list[Run]) -> int:
    """Returns the number of blocks of the network."""
    return runs[0].model.backbone.settings.depth


def model_of(run: Run, setting: Setting) -> nn.Module:
    """Returns the network with a setting; the taps behind the clustering are reconstructed."""
    model = run.model
    if setting.expedite is None:
        return model
    return model.clone(backbone=model.backbone.clone(expedite=setting.expedite))


def evaluate(runs: list[Run], setting: Setting, images: np.ndarray, truth: np.ndarray) -> Result:
    """Returns cost and metrics of a setting in all runs."""
    config, model = runs[0].config, model_of(runs[0], setting)

    @jax.jit
    def compare(variables, images, truth):
        x = normalize_images(config, images)
        shape = (len(x), setting.side, setting.side, x.shape[-1])
        x = jax.image.resize(x, shape, "bilinear")  # antialiased; unchanged at equal size
        depth = model.apply(variables, x, train=False)
        if setting.side != SIDE:
            depth = jax.vmap(lambda y: resize_bicubic(y[..., None], (SIDE, SIDE))[..., 0])(depth)
        return depth_metrics(depth, truth, tuple(config.depth.limits))[0]

    def metrics(run):
        parts = [
            compare(run.variables, images[start : start + BATCH], truth[start : start + BATCH])
            for start in range(0, len(images), BATCH)
        ]
        return {name: np.concatenate([part[name] for part in parts]).mean() for name in METRICS}

    found = [metrics(run) for run in runs]
    values = {name: np.array([one[name] for one in found]) for name in METRICS}
    return Result(count_macs(model, (setting.side, setting.side)) / 1e6, values)


def row(setting: Setting, result: Result, plain: Result) -> list[str]:
    """Returns the cells of a setting."""
    rmse = result.metrics["rmse"]
    before, size = "", f"{setting.side} x {setting.side}"
    if setting.expedite is not None:
        before = str(setting.expedite["alpha"])
        size = "{} x {}".format(*setting.expedite["clusters"])
    same = result is plain
    return [
        setting.method, before, size,
        f"{result.mmacs:.1f}",
        f"{result.mmacs / plain.mmacs:.1%}",
        pages.mean_and_std(rmse),
        "" if same else pages.signed_mean_and_std(rmse - plain.metrics["rmse"]),
        pages.mean_and_std(result.metrics["abs_rel"]),
        pages.mean_and_std(result.metrics["delta1"]),
    ]  # fmt: skip


def plot(results: list[tuple[Setting, Result]]) -> Figure:
    """Draws the RMSE over the cost, one curve for each method and number of blocks before."""
    figure, (axis,) = plots.panels(1, width=6.4, height=4.2, grid=True)
    curves = {}
    for setting, result in results:
        alpha = setting.expedite and setting.expedite["alpha"]
        name = f"{setting.method}, after {alpha}" if alpha else setting.method
        curves.setdefault(name, []).append((result.mmacs, result.metrics["rmse"].mean()))
    for number, (name, points) in enumerate(curves.items()):
        line = "k*" if name == "plain" else f"{'os^vDP*X'[number % 8]}-"
        own = {} if name == "plain" else {"color": plots.color(number)}
        axis.plot(*zip(*points, strict=True), line, ms=5, label=name, **own)
    axis.set(xlabel="10^6 multiply-adds", ylabel="RMSE, m")
    axis.legend(frameon=False, fontsize=7)
    return figure


def about(runs: list[Run], images: int) -> str:
    """Returns the paragraph on this page."""
    return f"""
    {len(runs)} runs of `configs/dpt.py:scenes` with different seeds ({runs[0].step} steps each) on
    {images} test scenes of {SIDE} x {SIDE} pixels: boards with handwritten digits in front of a
    slope. This is NOT KITTI or NYUv2, and the network is small: {depth_of(runs)} blocks on 16 x 16
    tokens, {runs[0].model.head.channels} channels in the decoder (`--config.model_overrides.depth`,
    `--config.head_overrides.channels`).
    Nothing is fine-tuned. The decoder reads every block and costs the same in all rows but
    "{SMALLER_IMAGE}", where the whole network sees a smaller image and the depth map is enlarged
    (bicubic). "Hard" copies the nearest centre, as the authors' code for DPT does; "soft" is a mean
    of 20 centres. "Pooling" takes the mean of cells instead of clusters. MMACs are 10^6
    multiply-adds of one image; metrics are means over images, ± the standard deviation over the
    runs.
    """


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    runs = [load(workdir) for workdir in flag_values.workdirs]
    source = DepthScenesSource("test")
    records = [source.read(i) for i in range(BATCH if flag_values.quick else len(source))]
    images = np.stack([np.asarray(record["image"]) for record in records])
    truth = jnp.asarray(np.stack([record["depth"] for record in records]))
    results, rows, plain = [], [], None
    for setting in settings(depth_of(runs)):
        result = evaluate(runs, setting, images, truth)
        plain = plain or result
        results.append((setting, result))
        rows.append(row(setting, result, plain))
        print(" | ".join(rows[-1]), flush=True)
    title = "Clustered DPT and cheaper forms of the same network"
    lines = [
        *pages.heading(title, __file__, about(runs, len(images))),
        "", "![RMSE over the cost](expedited.png)", "", *pages.table(COLUMNS, rows),
    ]  # fmt: skip
    if not flag_values.quick:
        pages.write(__file__, lines, plot(results))


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdirs",))
