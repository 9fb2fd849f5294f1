"""Inserts Token Pooling into trained models: Supplement E and Figure 10, on any plain host.

    python -m experiments.token_pooling.insertion
    python -m experiments.token_pooling.insertion --workdir=RUN

Nothing is trained after the insertion. The first command trains three small DeiTs on the embedded
digits, which is NOT ImageNet, and writes insertion.md and insertion.png here. The second command
reads a run of a ViT or DeiT, which may have imported weights, evaluates it on its own dataset and
prints the tables.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import pages, plots
from experiments.pages import mean_and_std, signed_mean_and_std
from experiments.runs import Variables, load_run, make_evaluate, make_model
from experiments.short_runs import SEEDS
from experiments.token_pooling import stages
from tokenvit_jax import cli
from tokenvit_jax.errors import UserError
from tokenvit_jax.models.vit import VisionTransformer

LASTS = (0.8, 0.6, 0.4, 0.2, 0.05)  # share of the patches that leave the last block
CLUSTERING = ("kmeans", "weighted_kmeans", "kmedoids", "weighted_kmedoids")
# Selections drop sizes with the tokens: all remaining sizes are 1, so there is nothing to carry.
SETTINGS = {"PoWER-BERT": {"method": "powerbert"}}
for method in (*CLUSTERING, "tome"):
    SETTINGS[stages.LABELS[method]] = {"method": method}
    SETTINGS[f"{stages.LABELS[method]}, carry"] = {"method": method, "carry": True}
ALL = "all patches"
FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of a training run", flag_values=FLAGS)
flags.DEFINE_string("checkpoint", "last", "last, best or a step", flag_values=FLAGS)
flags.DEFINE_string(
    "data_dir", None, "where `prepare` wrote the dataset; default: the run's", flag_values=FLAGS
)


class Insertion(NamedTuple):
    """One reduction in every model.

    Attributes:
      keep: K of every block.
      accuracy: accuracy on the test images (models,), by setting; the key ALL is no reduction.
      loss: loss on the test images (models,), by setting.
    """

    keep: tuple[int, ...]
    accuracy: dict[str, np.ndarray]
    loss: dict[str, np.ndarray]


def insert_all(config: ConfigDict, models: Sequence[Variables]) -> list[Insertion]:
    """Evaluates every reduction with every setting.

    Args:
      config: configuration of the models.
      models: variables of each model.
    """
    host = make_model(config)
    if not isinstance(host, VisionTransformer) or host.settings.token_reducer:
        raise UserError(
            f"model {config.model!r} is no plain host without token reducer; valid: a ViT or DeiT "
            "without config.model_overrides.token_reducer"
        )
    num_patches = (-(-config.image_size // host.settings.patch_size)) ** 2
    whole = evaluate(config, host, models)
    found = []
    for last in LASTS:
        keep = stages.shrinking_keep(num_patches, host.settings.depth, last)
        results = {ALL: whole}
        for name, setting in SETTINGS.items():
            model = host.clone(token_reducer={"keep": keep} | setting)
            results[name] = evaluate(config, model, models)
            print(f"{keep}, {name}: {results[name].mean(0)}", flush=True)
        columns = [{name: result[:, i] for name, result in results.items()} for i in (0, 1)]
        found.append(Insertion(keep, *columns))
    return found


def evaluate(
    config: ConfigDict, model: VisionTransformer, models: Sequence[Variables]
) -> np.ndarray:
    """Returns accuracy and loss of every model on the test images (models, 2)."""
    metrics = map(make_evaluate(config, model), models)
    return np.array([(found["eval/accuracy"], found["eval/loss"]) for found in metrics])


def table(insertions: list[Insertion], field: str) -> list[str]:
    """Returns the lines of one field, "accuracy" or "loss", with a row per method."""
    columns = [getattr(insertion, field) for insertion in insertions]
    rows = ([name, *(mean_and_std(column[name]) for column in columns)] for name in columns[0])
    return pages.table([field, *LASTS], rows)


def gains(insertions: list[Insertion]) -> list[str]:
    """Returns the lines of the gain in accuracy from carry in the same model."""
    rows = []
    for name in SETTINGS:
        carried = f"{name}, carry"
        if carried in SETTINGS:
            changes = [found.accuracy[carried] - found.accuracy[name] for found in insertions]
            rows.append([name, *map(signed_mean_and_std, changes)])
    return pages.table(["carry", *LASTS], rows)


def keeps(insertions: list[Insertion]) -> list[str]:
    """Returns the lines that list K for each column."""
    rows = (
        [last, ", ".join(map(str, insertion.keep))]
        for last, insertion in zip(LASTS, insertions, strict=True)
    )
    return pages.table(["share left", "K"], rows)


def plot(insertions: list[Insertion]) -> Figure:
    """Draws mean accuracy and loss over the share of remaining patches; dashed: with carry."""
    figure, axes = plots.panels(2, width=11, height=4)
    plain_names = list(dict.fromkeys(name.split(",")[0] for name in SETTINGS))
    for axis, field in zip(axes, ("accuracy", "loss"), strict=True):
        for name in SETTINGS:
            plain = name.removesuffix(", carry")
            own = plots.color(plain_names.index(plain))
            values = [getattr(found, field)[name].mean() for found in insertions]
            axis.plot(LASTS, values, "-" if name == plain else "--", color=own, label=name)
        whole = getattr(insertions[0], field)[ALL].mean()
        axis.axhline(whole, color="black", lw=0.8, ls=":", label=ALL)
        axis.set(xlabel="part of the patches that leaves the last block", title=f"test {field}")
        axis.invert_xaxis()
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def page(found: list[Insertion]) -> list[str]:
    """Returns the lines of the page."""
    about = f"""
    {stages.ABOUT}. Results are mean ± standard deviation over {len(SEEDS)} seeds. Every block drops
    the same share of its patches; the columns give the share that leaves the last block:
    """
    return [
        *pages.heading("Token Pooling in trained models, without training", __file__, about),
        "",
        *keeps(found),
        "",
        "![accuracy and loss over the share that is left](insertion.png)",
        "",
        *table(found, "accuracy"),
        "",
        *table(found, "loss"),
        "",
        "Gain in accuracy from carry, in the same model:",
        "",
        *gains(found),
    ]


def insert_into_digits() -> None:
    """Trains the small models and writes the page."""
    bases = [stages.train_base(seed) for seed in SEEDS]
    found = insert_all(stages.base_config(0), [run.variables for run in bases])
    pages.write(__file__, page(found), plot(found))


def insert_into_run(workdir: Path, checkpoint: str, data_dir: str | None) -> None:
    """Prints the tables of one run."""
    run = load_run(workdir, checkpoint, data_dir)
    found = insert_all(run.config, [run.variables])
    print("\n".join([*keeps(found), "", *table(found, "accuracy"), "", *table(found, "loss")]))


def main(flag_values: flags.FlagValues) -> None:
    """Inserts reducers into a run, or into small models trained here."""
    if flag_values.workdir is None:
        insert_into_digits()
    else:
        insert_into_run(Path(flag_values.workdir), flag_values.checkpoint, flag_values.data_dir)


if __name__ == "__main__":
    cli.run(main, FLAGS)
