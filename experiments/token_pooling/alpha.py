"""Tests queries and keys of length 1 with Token Pooling: Supplement F and Figure 11, on the digits.

    python -m experiments.token_pooling.alpha

This is NOT ImageNet. A small DeiT is trained for 400 steps, and reduced models are tuned from it
for 100 steps. The logits of attention are products of plain queries and keys, products of
normalised queries and keys ("fixed", alpha = 1), or products of normalised queries and keys times a
learned alpha per layer ("learned"). Writes alpha.md and alpha.png here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure

from experiments import pages, plots
from experiments.pages import mean_and_std, signed_mean_and_std
from experiments.runs import ShortRun, make_model, train
from experiments.token_pooling import stages
from tokenvit_jax.models.vit import QK_NORMS

SEEDS = (0, 1)
KEEP = (16, 8, 4, 2, 1, 0)
METHODS = ("powerbert", "weighted_kmedoids")
BASE = "DeiT, 400 steps"
START = 10.0
STARTED = f"learned, from {START:g}"
FIELDS = {"accuracy": "test accuracy", "test_loss": "test loss"}
Runs = dict[tuple[str, str], list[ShortRun]]


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


def train_started(seed: int) -> ShortRun:
    """Trains stage 1 with a learned alpha that starts at START."""
    config = stages.base_config(seed, "learned")
    images = jnp.zeros((1, config.image_size, config.image_size, 3))
    init = functools.partial(make_model(config).init, train=False)
    variables = jax.jit(init)(jax.random.key(seed), images)
    start = lambda path, x: jnp.full_like(x, START) if path[-1].key == "alpha" else x  # noqa: E731
    return train(config, initial=jax.tree_util.tree_map_with_path(start, variables))


def results(runs: Runs) -> list[str]:
    """Returns the lines of accuracies and losses, and of their differences to plain attention."""
    columns = ["model", "queries and keys"]
    for title in FIELDS.values():
        columns += [title, "minus plain"]
    rows = []
    for stage, qk_norm in runs:
        cells = [stage, qk_norm]
        for field in FIELDS:
            values, plain = (
                np.array([getattr(run, field) for run in runs[stage, norm]])
                for norm in (qk_norm, "none")
            )
            change = "" if qk_norm == "none" else signed_mean_and_std(values - plain)
            cells += [mean_and_std(values), change]
        rows.append(cells)
    return pages.table(columns, rows)


def alphas(runs: Runs) -> list[str]:
    """Returns the lines of the learned alpha of every block, mean and spread over the seeds."""
    columns = ["model", "alpha", *(f"block {i + 1}" for i in range(stages.DEPTH))]
    rows = [
        [stage, qk_norm, *map(mean_and_std, np.transpose([learned(run) for run in group]))]
        for (stage, qk_norm), group in runs.items()
        if qk_norm.startswith("learned")
    ]
    return pages.table(columns, rows)


def learned(run: ShortRun) -> list[float]:
    """Returns the learned alpha of every block."""
    flat = flatten_dict(run.variables["params"], sep="/")
    return [float(flat[f"blocks_{i}/attention/alpha"]) for i in range(stages.DEPTH)]


def plot(runs: Runs) -> Figure:
    """Draws accuracy and loss of every seed."""
    figure, axes = plots.panels(2, width=10, height=3.2, sharey=True)
    colors = [plots.color((*QK_NORMS, STARTED).index(qk_norm)) for _, qk_norm in runs]
    for axis, (field, title) in zip(axes, FIELDS.items(), strict=True):
        read = lambda run, field=field: getattr(run, field)  # noqa: E731
        stages.draw_results(axis, list(runs.values()), read, colors, title)
    plots.name_rows(axes[0], [", ".join(name) for name in runs])
    return figure


def page(runs: Runs) -> list[str]:
    """Returns the lines of the page."""
    about = f"""
    {stages.ABOUT}, and reduced models are tuned from it for {stages.TUNED_STEPS} steps with
    {stages.format_keep(KEEP)}. Queries and keys are plain ("none"), have length 1 and alpha = 1
    ("fixed"), or have length 1 and a learned alpha, which starts at 1 unless the row says otherwise
    ("learned"). Results are mean ± standard deviation over {len(SEEDS)} seeds; "minus plain" are
    differences between runs with the same seed.
    """
    return [
        *pages.heading("Normalised queries and keys", __file__, about),
        "",
        "![test accuracy and loss of every seed; bars: means](alpha.png)",
        "",
        *results(runs),
        "",
        "Learned alpha of every block, mean ± standard deviation:",
        "",
        *alphas(runs),
    ]


if __name__ == "__main__":
    found = train_all()
    pages.write(__file__, page(found), plot(found))
