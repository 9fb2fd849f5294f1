"""Queries and keys of length 1 with Token Pooling: Supplement F and Figure 11, on the digits.

    python -m experiments.token_pooling.alpha

This is NOT ImageNet. Small DeiT, 400 steps, and what is tuned from them for 100; the logits of
attention are those of plain queries and keys, of normalised ones ("fixed", alpha = 1), or those
times a learned alpha per layer. Writes alpha.md and alpha.png here.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure

from experiments.short_runs import Run, mean_and_spread, train
from experiments.token_pooling import stages
from tokenvit_jax.models.vit import QK_NORMS
from tokenvit_jax.pictures.draw import COLORS
from tokenvit_jax.tasks import classification

SEEDS = (0, 1)
KEEP = (16, 8, 4, 2, 1, 0)
METHODS = ("powerbert", "weighted_kmedoids")
BASE = "DeiT, 400 steps"
START = 10.0
STARTED = f"learned, from {START:g}"
FOLDER = Path(__file__).parent
Runs = dict[tuple[str, str], list[Run]]


def train_all() -> Runs:
    """Returns (stage, qk_norm) -> one run per seed."""
    runs = {(BASE, qk_norm): [stages.train_base(s, qk_norm) for s in SEEDS] for qk_norm in QK_NORMS}
    runs[BASE, STARTED] = [train_started(seed) for seed in SEEDS]
    for method in METHODS:
        for qk_norm in QK_NORMS:
            reducer = {"keep": KEEP, "method": method}
            group = [stages.tune(seed, reducer, qk_norm=qk_norm) for seed in SEEDS]
            runs[stages.LABELS[method], qk_norm] = group
    return runs


def train_started(seed: int) -> Run:
    """Trains stage 1 with alpha that starts elsewhere."""
    config = stages.base_config(seed, "learned")
    model = classification.make_model(config, num_classes=10)
    images = jnp.zeros((1, config.image_size, config.image_size, 3))
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(seed), images)
    start = lambda path, x: jnp.full_like(x, START) if path[-1].key == "alpha" else x  # noqa: E731
    variables = jax.tree_util.tree_map_with_path(start, variables)
    return train(config, initial=Run(np.zeros(0), 0.0, np.inf, model, variables))


def results(runs: Runs) -> list[str]:
    """Returns the lines of accuracies and losses, and of their differences from plain attention."""
    lines = [
        "| model | queries and keys | test accuracy | less plain | test loss | less plain |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for stage, qk_norm in runs:
        cells = []
        for field in ("accuracy", "test_loss"):
            values, plain = (
                np.array([getattr(run, field) for run in runs[stage, norm]])
                for norm in (qk_norm, "none")
            )
            change = "" if qk_norm == "none" else stages.spread(values - plain)
            cells += [mean_and_spread(values), change]
        lines.append(f"| {stage} | {qk_norm} | {' | '.join(cells)} |")
    return lines


def alphas(runs: Runs) -> list[str]:
    """Returns the lines of the learned alpha of every block, mean and spread over the seeds."""
    lines = [f"| model | alpha | {' | '.join(f'block {i + 1}' for i in range(stages.DEPTH))} |"]
    lines.append("| --- | --- |" + " --- |" * stages.DEPTH)
    for (stage, qk_norm), group in runs.items():
        if qk_norm.startswith("learned"):
            blocks = np.transpose([learned(run) for run in group])
            lines.append(f"| {stage} | {qk_norm} | {' | '.join(map(mean_and_spread, blocks))} |")
    return lines


def learned(run: Run) -> list[float]:
    """Returns alpha of every block."""
    flat = flatten_dict(run.variables["params"], sep="/")
    return [float(flat[f"blocks_{i}/attention/alpha"]) for i in range(stages.DEPTH)]


def plot(runs: Runs) -> Figure:
    """Draws accuracy and loss of every seed."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, field, title in zip(
        panels, ("accuracy", "test_loss"), ("test accuracy", "test loss"), strict=True
    ):
        for place, ((_, qk_norm), group) in enumerate(runs.items()):
            values = [getattr(run, field) for run in group]
            color = COLORS[(*QK_NORMS, STARTED).index(qk_norm)]
            axis.plot(values, [place] * len(values), "o", color=color, alpha=0.6)
            axis.plot(np.mean(values), place, "|", color="black", markersize=12)
        axis.set_title(title)
        axis.grid(axis="x", color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(runs)), [", ".join(name) for name in runs], fontsize=8)
    panels[0].invert_yaxis()
    return figure


def main() -> None:
    runs = train_all()
    lines = [
        "# Normalised queries and keys",
        "",
        "Written by `python -m experiments.token_pooling.alpha`.",
        f"{stages.NOT_IMAGENET} A DeiT",
        "of 6 blocks and 64 patches, and what is tuned from it for 100 steps with",
        f"K = {', '.join(map(str, KEEP))}. Queries and keys: none (plain), fixed (of length 1,",
        "alpha = 1), learned (of length 1, alpha starts at 1, or where the row says).",
        f"{len(SEEDS)} seeds, mean ± standard deviation; one image is 0.003. Less plain:",
        "differences of the same seed.",
        "",
        "![test accuracy and loss of every seed; bars: means](alpha.png)",
        "",
        *results(runs),
        "",
        "Learned alpha of every block, mean ± standard deviation:",
        "",
        *alphas(runs),
    ]
    text = "\n".join(lines) + "\n"
    (FOLDER / "alpha.md").write_text(text)
    plot(runs).savefig(FOLDER / "alpha.png", dpi=120)
    print(text)


if __name__ == "__main__":
    main()
