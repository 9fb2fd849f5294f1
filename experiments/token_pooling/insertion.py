"""Token Pooling inserted into trained models: Supplement E and Figure 10, on any plain host.

    python -m experiments.token_pooling.insertion
    python -m experiments.token_pooling.insertion --workdir=RUN

Nothing is trained after the insertion. The first form trains three small DeiT on the embedded
digits, which is NOT ImageNet, and writes insertion.md and insertion.png here; the second one reads
a run of a ViT or DeiT, imported weights too, evaluates it on its own dataset and prints the table.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments.token_pooling import stages
from tokenvit_jax import cli
from tokenvit_jax.data import dataset_info, eval_dataset
from tokenvit_jax.errors import UserError
from tokenvit_jax.models.vit import VisionTransformer
from tokenvit_jax.pictures.draw import COLORS
from tokenvit_jax.tasks import classification
from tokenvit_jax.training.checkpoint import load_variables
from tokenvit_jax.training.parallel import make_parallel, map_batches
from tokenvit_jax.training.step import make_eval_step
from tokenvit_jax.training.workdir import read_config

SEEDS = (0, 1, 2)
LASTS = (0.8, 0.6, 0.4, 0.2, 0.05)  # part of the patches that leaves the last block
CLUSTERING = ("kmeans", "weighted_kmeans", "kmedoids", "weighted_kmedoids")
# A selection drops sizes with the tokens: all that are left are 1, there is nothing to carry.
SETTINGS = {"PoWER-BERT": {"method": "powerbert"}}
for method in (*CLUSTERING, "tome"):
    SETTINGS[stages.LABELS[method]] = {"method": method}
    SETTINGS[f"{stages.LABELS[method]}, carry"] = {"method": method, "carry": True}
FOLDER = Path(__file__).parent
FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of a training run", flag_values=FLAGS)
flags.DEFINE_string("checkpoint", "last", "last, best or a step", flag_values=FLAGS)
flags.DEFINE_string(
    "data_dir", None, "where `prepare` wrote the dataset; default: the run's", flag_values=FLAGS
)


class Insertion(NamedTuple):
    """One reduction in every model.

    keep: K of every block. accuracy, loss: on the test images, of the models without reduction
    ("") and with every setting, (models,) each.
    """

    keep: tuple[int, ...]
    accuracy: dict[str, np.ndarray]
    loss: dict[str, np.ndarray]


def insert_all(config: ConfigDict, models: Sequence[dict]) -> list[Insertion]:
    """Evaluates every reduction with every setting.

    Args:
      config: of the models.
      models: variables of each.
    """
    host = classification.make_model(config, dataset_info(config.dataset).num_classes)
    if not isinstance(host, VisionTransformer) or host.token_reducer:
        raise UserError(f"model {config.model} is no plain host; valid: a ViT or DeiT, unreduced")
    num_patches = (-(-config.image_size // host.patch_size)) ** 2
    whole = evaluate(config, host, models)
    found = []
    for last in LASTS:
        keep = stages.shrinking_keep(num_patches, host.depth, last)
        results = {"": whole}
        for name, setting in SETTINGS.items():
            model = host.clone(token_reducer={"keep": keep} | setting)
            results[name] = evaluate(config, model, models)
            print(f"{keep}, {name}: {results[name].mean(0)}", flush=True)
        columns = [{name: result[:, i] for name, result in results.items()} for i in (0, 1)]
        found.append(Insertion(keep, *columns))
    return found


def evaluate(config: ConfigDict, model: VisionTransformer, models: Sequence[dict]) -> np.ndarray:
    """Returns accuracy and loss of each (models, 2) on the test images."""
    parallel = make_parallel(config)
    step = parallel.eval_step(make_eval_step(model, config))
    results = []
    for variables in map(parallel.put_variables, models):
        batches = eval_dataset(config)
        sums = map_batches(
            lambda batch, own=variables: step(own, batch), batches, parallel.put_batch
        )
        metrics = classification.mean_metrics(sums)
        results.append((metrics["eval/accuracy"], metrics["eval/loss"]))
    return np.array(results)


def table(insertions: list[Insertion], name: str) -> list[str]:
    """Returns the lines of one field, "accuracy" or "loss": methods down, reductions across."""
    columns = [getattr(insertion, name) for insertion in insertions]
    lines = [f"| {name} | {' | '.join(f'{last:g}' for last in LASTS)} |"]
    lines.append("| --- |" + " --- |" * len(LASTS))
    for setting in columns[0]:
        cells = [summary(column[setting]) for column in columns]
        lines.append(f"| {setting or 'all patches'} | {' | '.join(cells)} |")
    return lines


def gains(insertions: list[Insertion]) -> list[str]:
    """Returns the lines of what carry changes in the same model."""
    lines = [f"| carry | {' | '.join(f'{last:g}' for last in LASTS)} |"]
    lines.append("| --- |" + " --- |" * len(LASTS))
    for name in SETTINGS:
        if f"{name}, carry" in SETTINGS:
            pairs = [(i.accuracy[f"{name}, carry"], i.accuracy[name]) for i in insertions]
            cells = [stages.spread(carried - plain) for carried, plain in pairs]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def summary(values: np.ndarray) -> str:
    spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"


def keeps(insertions: list[Insertion]) -> list[str]:
    """Returns the lines that say which K the columns stand for."""
    lines = ["| part left | K |", "| --- | --- |"]
    for last, insertion in zip(LASTS, insertions, strict=True):
        lines.append(f"| {last:g} | {', '.join(map(str, insertion.keep))} |")
    return lines


def plot(insertions: list[Insertion]) -> Figure:
    """Draws mean accuracy and loss over the part that is left; dashed: carry."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axis, field in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        for name in SETTINGS:
            plain = name.removesuffix(", carry")
            color = COLORS[list(dict.fromkeys(n.split(",")[0] for n in SETTINGS)).index(plain)]
            values = [getattr(i, field)[name].mean() for i in insertions]
            axis.plot(LASTS, values, "-" if name == plain else "--", color=color, label=name)
        whole = getattr(insertions[0], field)[""].mean()
        axis.axhline(whole, color="black", lw=0.8, ls=":", label="all patches")
        axis.set(xlabel="part of the patches that leaves the last block", title=f"test {field}")
        axis.invert_xaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=7)
    return figure


def of_digits() -> None:
    """Trains the small models and writes the page."""
    bases = [stages.train_base(seed) for seed in SEEDS]
    found = insert_all(stages.base_config(0), [run.variables for run in bases])
    lines = [
        "# Token Pooling in trained models, without training",
        "",
        "Written by `python -m experiments.token_pooling.insertion`.",
        f"{stages.NOT_IMAGENET} DeiT",
        f"of 6 blocks and 64 patches, 400 steps, {len(SEEDS)} seeds, mean ± standard deviation;",
        "one image is 0.003. Every block drops the same part of its patches; the columns say what",
        "part leaves the last one:",
        "",
        *keeps(found),
        "",
        "![accuracy and loss over the part that is left](insertion.png)",
        "",
        *table(found, "accuracy"),
        "",
        *table(found, "loss"),
        "",
        "What carry adds to the accuracy of the same model:",
        "",
        *gains(found),
    ]
    text = "\n".join(lines) + "\n"
    (FOLDER / "insertion.md").write_text(text)
    plot(found).savefig(FOLDER / "insertion.png", dpi=120)
    print(text)


def of_run(workdir: Path, checkpoint: str, data_dir: str | None) -> None:
    """Prints the tables of one run."""
    config = read_config(workdir)
    if data_dir is not None:
        config.data.data_dir = data_dir
    host = classification.make_model(config, dataset_info(config.dataset).num_classes)
    loaded = load_variables(host, config.image_size, workdir, checkpoint)
    found = insert_all(config, [loaded.variables])
    lines = [*keeps(found), "", *table(found, "accuracy"), "", *table(found, "loss")]
    print("\n".join(lines))


def main(flag_values: flags.FlagValues) -> None:
    """Runs the command."""
    if flag_values.workdir is None:
        of_digits()
    else:
        of_run(Path(flag_values.workdir), flag_values.checkpoint, flag_values.data_dir)


if __name__ == "__main__":
    cli.run(main, FLAGS)
