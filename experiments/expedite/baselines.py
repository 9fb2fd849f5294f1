"""Compares Expedite with other methods at equal costs: Tables 3 to 5 and Figure 6, on scenes.

    python -m experiments.expedite.baselines --workdir=RUN [--quick]

RUN is a run of configs/segmenter_ti.py:scenes. Methods whose costs cannot equal Expedite's use
their cheapest setting that costs at least as much. Writes baselines.md and baselines.png here.
"""

import bisect

import flax.linen as nn
import jax
import numpy as np
from absl import flags

from experiments import pages, predictors
from experiments.expedite import evaluation
from experiments.expedite.evaluation import BASELINES, DEPTH, Bench, Result, Setting, expedited
from experiments.runs import Variables, normalize_images
from tokenvit_jax import cli
from tokenvit_jax.models.backbone import backbone_variables
from tokenvit_jax.models.reducers import DYNAMICVIT, dynamicvit_keep, evit_keep, tome_keep

FLAGS = evaluation.define_flags("workdir")
SIDES = (4, 6, 8, 11, 13)  # sides of the map of centres
PATCHES = 256
# After 1/4, 1/2 and 3/4 of the blocks, as in the paper.
BLOCKS = (3, 5, 7)
TRAINING_SCENES = 200  # from which predictors learn
NEIGHBORS = 20  # tokens from which a dropped patch is reconstructed, as in Expedite
EXPEDITE = "Expedite"
COLUMNS = [
    "method", "centres, image or tokens", "MMACs", "% of plain", "mIoU", "- plain", "similarity",
    "- Expedite",
]  # fmt: skip


def rivals() -> dict[str, list[Setting]]:
    """Returns the settings of methods that have their own costs, the cheapest first."""
    images = [(rows, columns) for rows in range(3, 17) for columns in (rows - 1, rows)]
    smaller = {"alpha": 0, "beta": DEPTH, "mode": "bilinear", "where": "logits"}
    rates = np.arange(0.02, 1, 0.01)
    evit = [evit_keep(PATCHES, DEPTH, rate, BLOCKS) for rate in rates]
    dynamic = [dynamicvit_keep(PATCHES, DEPTH, rate, BLOCKS) for rate in rates]
    select = [{"method": DYNAMICVIT, "keep": keep} for keep in dynamic]
    tome = [tome_keep(PATCHES, DEPTH, merged) for merged in range(64, 0, -1)]
    merge = [{"method": "tome", "keep": keep} for keep in tome]
    fuse, soft = [{"method": "evit", "keep": keep} for keep in evit], {"neighbors": NEIGHBORS}
    return {
        "smaller image": [{"expedite": smaller | {"clusters": size}} for size in images],
        "EViT": [{"token_reducer": reducer} for reducer in fuse],
        "EViT, reconstructed": [{"token_reducer": reducer | soft} for reducer in fuse],
        "DynamicViT": [{"token_reducer": reducer} for reducer in select],
        "DynamicViT, reconstructed": [{"token_reducer": reducer | soft} for reducer in select],
        "ToMe": [{"token_reducer": reducer} for reducer in merge],
        "ToMe, carry": [{"token_reducer": reducer | {"carry": True}} for reducer in merge],
    }


def settings_like(bench: Bench, side: int) -> dict[str, Setting]:
    """Returns a setting of each method that costs as much as Expedite with side x side centres."""
    own = expedited(side)
    budget = bench.mmacs(own)
    baselines = {name: expedited(side, **changes) for name, changes in BASELINES.items()}
    chosen = {
        name: settings[bisect.bisect_left(settings, budget, key=bench.mmacs)]
        for name, settings in rivals().items()
    }
    # ACT saves only attention, and costs more than Expedite with as few prototypes as centres.
    act = {"token_reducer": {"method": "act", "keep": (side * side,) * DEPTH}}
    return {EXPEDITE: own} | baselines | chosen | {"ACT": act}


def with_predictors(
    bench: Bench, seen: predictors.Images, settings: dict[str, Setting]
) -> dict[str, Variables]:
    """Trains DynamicViT's predictors; returns the variables of the settings that use them."""
    run = bench.trained
    names = [name for name in settings if name.startswith("DynamicViT")]
    keep = settings[names[0]]["token_reducer"]["keep"]
    backbone = run.model.backbone
    found = predictors.train(backbone, backbone_variables(run.model, run.variables), keep, seen, 0)
    inner = {f"backbone/{path}": value for path, value in found.items()}
    return dict.fromkeys(names, predictors.add(run.variables, inner))


def training_images(bench: Bench) -> predictors.Images:
    """Returns training scenes, and the plain network's features of them."""
    run = bench.trained
    scenes = evaluation.read_scenes("train", TRAINING_SCENES).images

    def look(model, images):
        images = normalize_images(run.config, images)
        return predictors.Images(images, evaluation.last_map(model.backbone, images))

    return evaluation.map_scenes(jax.jit(nn.apply(look, run.model)), run.variables, scenes)


def describe(setting: Setting) -> str:
    """Formats the sizes that the cost of a setting depends on."""
    if "expedite" in setting:
        return "{} x {}".format(*setting["expedite"]["clusters"])
    return ", ".join(map(str, setting["token_reducer"]["keep"]))


def table(bench: Bench, settings: dict[str, Setting], results: dict[str, Result]) -> list[str]:
    """Returns the lines of one budget."""
    rows = []
    for name, result in results.items():
        to_expedite = evaluation.difference(result, results[EXPEDITE])
        rows.append([name, describe(settings[name]), *bench.cells(result), to_expedite])
    return pages.table(COLUMNS, rows)


def about(plain: Result) -> str:
    """Returns the paragraph on this page."""
    return f"""
    The plain model costs {plain.mmacs:.1f} MMACs and has mIoU {plain.miou:.2f}. Expedite uses alpha
    = {evaluation.ALPHA} of {DEPTH} blocks and temperature {evaluation.TEMPERATURE:g}. EViT and
    DynamicViT reduce tokens in blocks 3, 5 and 7, ToMe (Token Merging) in all blocks; they restore
    each patch from the token that stands for it, "reconstructed" from the {NEIGHBORS} remaining
    tokens nearest to it before the first reduction. The run lacks DynamicViT's predictors; for each
    cost they were trained in {predictors.STEPS} steps of {predictors.BATCH} from {TRAINING_SCENES}
    training scenes, without labels, for similar features. ACT, in all blocks, has as many
    prototypes per head as Expedite has centres; it saves only attention and cannot cost as little.
    Other methods whose costs cannot equal Expedite's use their cheapest setting that costs no less
    than Expedite.
    """


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    trained = evaluation.load(flag_values.workdir)
    bench = Bench(trained, evaluation.test_scenes(flag_values.quick))
    title = "Expedite and baselines at equal costs"
    lines = [
        *evaluation.heading(title, __file__, trained, about(bench.plain)),
        "![mIoU and similarity over the cost](baselines.png)",
    ]
    curves, seen = {}, training_images(bench)
    for side in SIDES:
        settings = settings_like(bench, side)
        results = bench.evaluate_all(settings, with_predictors(bench, seen, settings))
        lines += ["", f"## {side} x {side}", "", *table(bench, settings, results)]
        for name, result in results.items():
            curves.setdefault(name, []).append(result)
    if not flag_values.quick:
        figure = evaluation.plot_over_cost(bench, curves, "cosine similarity of the features")
        pages.write(__file__, lines, figure)


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir",))
