"""Makes a trained model faster without training: chooses where its tokens are clustered.

    python -m tokenvit_jax.expedite --workdir=RUN --budget=0.66 --plot=front.png --out=FASTER_RUN

The host of a classifier or of a segmentation model, a plain one or a Swin Transformer, runs its
middle blocks on the centres of clusters (Liang et al. 2022, "Expediting Large-Scale Vision
Transformer for Dense Prediction without Fine-tuning"). --budget is a part of the multiply-adds
(MACs) of the model as it is, or with --of=latency of its time for an image on this machine. Of the
settings within it the command chooses the one whose features are most similar to those without
clustering, on a few images; labels and gradients are not needed. --out is then like the folder of a
training run at step 0, with the same weights: evaluate and predict take it, and so does training.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from tokenvit_jax import cli
from tokenvit_jax.data import dataset_info, eval_image
from tokenvit_jax.errors import UserError
from tokenvit_jax.expedite_search import (
    Rated,
    choose,
    describe,
    front,
    list_candidates,
    search,
    search_latency,
    tune_temperature,
)
from tokenvit_jax.expedite_similarity import Comparison
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.predict import read_image
from tokenvit_jax.tasks import task_of
from tokenvit_jax.tasks.batches import eval_dataset
from tokenvit_jax.training.checkpoint import load_variables
from tokenvit_jax.training.new_run import check_new, write_run
from tokenvit_jax.training.step import normalize
from tokenvit_jax.training.workdir import read_config

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of a training run", flag_values=FLAGS)
flags.DEFINE_float(
    "budget", None, "part of the plain model's cost, between 0 and 1", flag_values=FLAGS
)
flags.DEFINE_enum("of", "macs", ["macs", "latency"], "what the budget is of", flag_values=FLAGS)
flags.DEFINE_integer(
    "num_images", 8, "images of the evaluation split to compare", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_list(
    "images", None, "image files to compare instead, separated by commas", flag_values=FLAGS
)
flags.DEFINE_string("checkpoint", "last", "last, best or a step", flag_values=FLAGS)
flags.DEFINE_string("plot", None, "picture of similarity over cost", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder of the faster run, new", flag_values=FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Prints the front, draws it, and writes the run."""
    budget, out = flag_values.budget, flag_values.out
    if not 0 < budget < 1:
        raise UserError(f"--budget={budget} is not valid; valid: between 0 and 1")
    if out:
        check_new(Path(out))
    workdir = Path(flag_values.workdir)
    config = read_config(workdir)
    model = task_of(config.dataset).make_model(config, dataset_info(config.dataset).num_classes)
    candidates = list_candidates(model, (_side(config),) * 2)
    images = load_images(config, flag_values.images, flag_values.num_images)
    variables = load_variables(model, config.image_size, workdir, flag_values.checkpoint).variables

    similarity_of = Comparison(model, variables, images)
    candidates = tune_temperature(candidates, budget, similarity_of)
    if flag_values.of == "macs":
        rated = search(candidates, budget, similarity_of)
    else:
        rated = search_latency(candidates, budget, similarity_of, model, variables, images[:1])
    chosen = choose(rated, budget, flag_values.of)
    tried = f"{len(rated)} of {len(candidates)} settings tried on {len(images)} images"
    print(f"{tried}, temperature {chosen.expedite.temperature:g}; the front:")
    print(format_front(front(rated), chosen))
    if flag_values.plot:
        plot_front(rated, chosen, budget).savefig(flag_values.plot, dpi=150)
    if out:
        write_run(Path(out), expedited_config(config, chosen.expedite), variables)
        print(f"{workdir} -> {out}")


# ------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------


def load_images(config: ConfigDict, files: Sequence[str] | None, num_images: int) -> jax.Array:
    """Returns images as the model of a run sees them, (B, S, S, 3), normalised.

    Args:
      config: of the run; S is `inference.window` or `image_size`.
      files: image files; None: the first ones of the evaluation split, of each the middle where a
        model sees windows.
      num_images: of the evaluation split.

    Raises:
      UserError: a file cannot be read, or the dataset is not there.
    """
    if files is None:
        images = _eval_images(config, num_images)
    elif files:
        crop = config.data.eval_crop if dataset_info(config.dataset).center_crop else 1.0
        images = [eval_image(read_image(Path(name)), _side(config), crop) for name in files]
    else:
        raise UserError("--images names no file")
    return normalize(jnp.asarray(np.stack(images)), config.data.normalization)


def _side(config):
    return config.inference.window or config.image_size


def _eval_images(config, num_images):
    config, side, images = config.copy_and_resolve_references(), _side(config), []
    config.data.workers = 0
    for batch in eval_dataset(config):
        sizes = batch.get("image_size", [batch["image"].shape[1:3]] * len(batch["image"]))
        for image, size, counts in zip(batch["image"], sizes, batch["mask"], strict=True):
            top, left = (max(pixels - side, 0) // 2 for pixels in size)
            if counts:
                images.append(image[top : top + side, left : left + side])
            if len(images) == num_images:
                return images
    return images


# ------------------------------------------------------------------------------------------------
# Output
# ------------------------------------------------------------------------------------------------


def format_front(rated: Sequence[Rated], chosen: Rated) -> str:
    """Lines up settings, one of which is marked."""
    timed = chosen.latency is not None
    lines = [
        f"{'latency  ' * timed}{'MACs':>5}{'alpha':>7}{'beta':>6}{'clusters':>10}"
        f"{'reconstructs':>14}{'similarity':>12}"
    ]
    for row in rated:
        expedite, clusters = row.expedite, "x".join(map(str, row.expedite.clusters))
        lines.append(
            (f"{row.latency:7.3f}  " if timed else "")
            + f"{row.macs:5.3f}{expedite.alpha:7}{expedite.beta:6}{clusters:>10}"
            f"{expedite.where:>14}{row.similarity:12.4f}" + "  <- chosen" * (row == chosen)
        )
    return "\n".join(lines)


def plot_front(rated: Sequence[Rated], chosen: Rated, budget: float) -> Figure:
    """Draws similarity over cost: all settings, the front of them, the budget and the choice."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    points = [(candidate.cost, candidate.similarity) for candidate in rated]
    best = [(candidate.cost, candidate.similarity) for candidate in front(rated)]
    axis.plot(*zip(*points, strict=True), "o", color="0.75", markersize=4, label="tried")
    axis.plot(*zip(*best, strict=True), "o-", color="#0072B2", markersize=4, label="front")
    label = describe(chosen.expedite)
    axis.plot(chosen.cost, chosen.similarity, "*", color="#D55E00", markersize=14, label=label)
    axis.axvline(budget, color="0.3", linestyle="--", linewidth=1, label="budget")
    of = "MACs" if chosen.latency is None else "latency"
    axis.set(xlabel=f"{of}, part of the plain model's", ylabel="cosine similarity of features")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    return figure


def expedited_config(config: ConfigDict, expedite: Expedite) -> ConfigDict:
    """Returns a copy of the configuration of a plain model that expedites it."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model_overrides.expedite = dataclasses.asdict(expedite)
    return config


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir", "budget"))
