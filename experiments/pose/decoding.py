"""Compares ways to read keypoints from the heat maps of trained networks, and of perfect ones.

    python -m experiments.pose.decoding --workdirs=RUN_0,RUN_1,RUN_2 [--quick]

The runs are trainings on the embedded figures that differ only in their seed, such as
RUNS/clusters_0 of `python -m experiments.pose.comparison --runs=RUNS`. Nothing is trained here.
Writes decoding.md here.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments import pages
from experiments.clustered_runs import define_flags, load_runs
from experiments.pose.comparison import PARTS, cells
from experiments.pose.perfect import perfect, reader
from experiments.runs import Run, test_data
from tokenvit_jax import cli
from tokenvit_jax.ops.heatmaps import DARK, QUARTER, REFINEMENTS
from tokenvit_jax.recipes.pose import figures_config, whole_body_config
from tokenvit_jax.tasks import create_task

FLAGS = flags.FlagValues()
define_flags(FLAGS)

READINGS = ((True, QUARTER), (True, DARK), (False, QUARTER), (False, DARK))
PERFECT = """
The average precision [%] on the same figures if a network predicted its targets, with their
standard deviation in pixels of the heat map: what the best network could reach. Without
`pose.unbiased`, a target has its centre in the nearest pixel.
"""


def _on(value: bool) -> str:
    return "on" if value else "off"


def reading_of(config: ConfigDict, unbiased: bool, flip: bool, refinement: str) -> ConfigDict:
    """Returns a configuration with another way of reading heat maps."""
    config = config.copy_and_resolve_references()
    config.pose.unbiased = unbiased
    config.inference.flip, config.inference.refinement = flip, refinement
    return config


def evaluate(config: ConfigDict, runs: Sequence[Run]) -> dict[str, list[dict[str, float]]]:
    """Returns the metrics of runs for each refinement, which read the same heat maps."""
    task = create_task(config)
    model = task.make_model()
    heatmaps = jax.jit(functools.partial(task.heatmaps, model))
    readers = {
        refinement: reader(reading_of(config, config.pose.unbiased, False, refinement))
        for refinement in REFINEMENTS
    }
    found: dict[str, list[dict[str, float]]] = {refinement: [] for refinement in REFINEMENTS}
    for run in runs:
        meters = {refinement: task.meter() for refinement in REFINEMENTS}
        for batch in test_data(config):
            maps = heatmaps(run.variables, batch["image"])
            for refinement, meter in meters.items():
                meter.add(jax.device_get(readers[refinement](maps, batch)))
        for refinement, meter in meters.items():
            found[refinement].append(meter.result())
    return found


def trained_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Returns the rows of all ways to read the heat maps of runs."""
    rows = []
    for unbiased, flip in itertools.product((True, False), (True, False)):
        config = reading_of(runs[0].config, unbiased, flip, QUARTER)
        for refinement, results in evaluate(config, runs).items():
            rows.append([_on(unbiased), _on(flip), f"`{refinement}`", *cells(results)])
            print(*rows[-1], sep=" | ", flush=True)
    return rows


def perfect_rows() -> list[list[str]]:
    """Returns the rows of targets in place of predictions."""
    figures, whole_body = figures_config(), whole_body_config("clustr_s")
    rows = []
    for size, sigma in (
        (whole_body.image_size, whole_body.pose.sigma), (figures.image_size, figures.pose.sigma)
    ):  # fmt: skip
        config = figures.copy_and_resolve_references()
        config.image_size, config.pose.sigma = size, sigma
        for unbiased, refinement in READINGS:
            metrics = perfect(reading_of(config, unbiased, False, refinement))
            found = [f"{100 * metrics[f'eval/{prefix}ap']:.1f}" for prefix in PARTS]
            settings = "{} x {}".format(*size), f"{sigma:g}", _on(unbiased), f"`{refinement}`"
            rows.append([*settings, *found])
    return rows


def page(runs: Sequence[Run]) -> list[str]:
    """Returns the lines of the page."""
    config = runs[0].config
    about = f"""
    {len(runs)} runs on the embedded figures that differ only in their seed ({runs[0].step} steps
    each), trained with `pose.unbiased` {_on(config.pose.unbiased)} at
    {" x ".join(map(str, config.image_size))} pixels. Crops and heat maps are read by every rule;
    nothing is trained again. Average precision / recall [%] on the 120 test figures, mean ±
    standard deviation over the runs; "hands" is the mean of both. These are drawn figures, NOT
    people.
    """
    columns = ["`pose.unbiased`", "`inference.flip`", "`inference.refinement`", *PARTS.values()]
    perfect_columns = ["input", "sigma", columns[0], columns[2], *PARTS.values()]
    return [
        *pages.heading("Reading keypoints from heat maps", __file__, about), "",
        *pages.table(columns, trained_rows(runs)), "",
        "## If heat maps were their targets", "", *pages.paragraph(PERFECT), "",
        *pages.table(perfect_columns, perfect_rows()),
    ]  # fmt: skip


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    runs = load_runs(flag_values, "pose", "figures", "configs/pose.py:figures")
    lines = page([*runs.values()])
    if not flag_values.quick:
        pages.write(__file__, lines)


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdirs",))
