"""Varies settings of clustering and reconstruction: Table 2 and Eq. 4 of Expedite, on scenes.

    python -m experiments.expedite.settings --workdir=RUN [--quick]

RUN is a run of configs/segmenter_ti.py:scenes. The temperature is chosen on 200 scenes of the
training split; everything else is measured on the test scenes. Writes settings.md here.
"""

from absl import flags

from experiments import pages
from experiments.expedite import evaluation
from experiments.expedite.evaluation import (
    ALPHA,
    DEPTH,
    LARGE,
    SMALL,
    TEMPERATURE,
    Bench,
    expedited,
)
from tokenvit_jax import cli

FLAGS = evaluation.define_flags("workdir")
TEMPERATURES = (2, 5, 10, 20, 50, 100, 200)
SIDES = (SMALL, LARGE)
TABLE_2 = {
    "window": (1, 3, 5, 7, 9),
    "iterations": (1, 3, 5, 10, 20),
    "temperature": TEMPERATURES,
    "neighbors": (1, 5, 10, 20, 50, LARGE**2),
}
# Alternatives to Eq. 4 in the released code and the paper's text.
RECONSTRUCTIONS = {
    "normalize l2": {"normalize": "l2"},
    "mode hard": {"mode": "hard"},
    "mode window": {"mode": "window"},
    "blocks": {"where": "blocks"},
    "blocks, normalize l2": {"where": "blocks", "normalize": "l2"},
    "blocks, mode hard": {"where": "blocks", "mode": "hard"},
    "blocks, mode window": {"where": "blocks", "mode": "window"},
}
ABOUT = f"""
Unless a row says otherwise, alpha is {ALPHA} of {DEPTH} blocks, there are {LARGE} x {LARGE} centres
for 16 x 16 tokens, the window is 5, there are 5 iterations, the temperature is {TEMPERATURE:g}, k
is 20, and the logits are reconstructed.
"""


def choose_temperature(bench: Bench) -> list[str]:
    """Returns the lines of all temperatures at two sizes, and of the best temperature."""
    settings = {
        f"{value:g}, {side} x {side}": expedited(side, temperature=value)
        for value in TEMPERATURES
        for side in SIDES
    }
    results = bench.evaluate_all(settings)
    means = {
        value: sum(results[f"{value:g}, {side} x {side}"].miou for side in SIDES) / len(SIDES)
        for value in TEMPERATURES
    }
    best = max(means, key=means.get)
    changes = [
        evaluation.difference(
            results[f"{best:g}, {side} x {side}"], results[f"{TEMPERATURE:g}, {side} x {side}"]
        )
        for side in SIDES
    ]
    text = f"""
    The mean of both sizes is highest at {best:g}. The difference in mIoU to the published
    {TEMPERATURE:g}, which all experiments use, is {changes[0]} at {SMALL} x {SMALL} and
    {changes[1]} at {LARGE} x {LARGE}.
    """
    return [*bench.table(results, "temperature, centres"), "", *pages.paragraph(text)]


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    trained = evaluation.load(flag_values.workdir)
    scenes = evaluation.test_scenes(flag_values.quick)
    training_scenes = evaluation.read_scenes("train", len(scenes.images))
    lines = [
        *evaluation.heading("Settings of clustering and reconstruction", __file__, trained, ABOUT),
        "## Temperature, on scenes of the training split",
        "",
        *choose_temperature(Bench(trained, training_scenes)),
    ]
    bench = Bench(trained, scenes)
    for field, values in TABLE_2.items():
        settings = {f"{value:g}": expedited(LARGE, **{field: value}) for value in values}
        lines += ["", f"## {field}", "", *bench.table(bench.evaluate_all(settings), field)]
    settings = {name: expedited(LARGE, **changes) for name, changes in RECONSTRUCTIONS.items()}
    results = bench.evaluate_all({"default": expedited(LARGE)} | settings)
    lines += ["", "## Reconstruction", "", *bench.table(results, "reconstruction")]
    if not flag_values.quick:
        pages.write(__file__, lines)


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir",))
