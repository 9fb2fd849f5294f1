"""Makes a trained model faster without training: chooses where its tokens are clustered.

    python -m tokenvit_jax.expedite --workdir=RUN --budget=0.66 --plot=front.png --out=FASTER_RUN

The model is of any task; its backbone is a plain ViT or a Swin Transformer. Its middle blocks run
on the centres of clusters (Liang et al. 2022, "Expediting Large-Scale Vision Transformer for Dense
Prediction without Fine-tuning"). --budget is a fraction of the original model's multiply-adds
(MACs), or with --of=latency a fraction of its time per image on this machine. Among the settings
within the budget, the command chooses the one that changes the features least on a few images; it
needs no labels and no gradients. The temperature follows the distances between the tokens of these
images. Below the choice, the command prints other methods at no higher cost; where one of them is
better, it is the better choice. --out is the folder of a new run at step 0 with the same weights:
evaluate, predict and train read it like any other run.
"""

import sys
from pathlib import Path

from absl import flags

from tokenvit_jax import cli
from tokenvit_jax.valid import Number, whole

# Below this similarity the command warns. Table 1 of the paper reports 0.94 to 0.96.
SIMILAR = 0.9

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of a training run", flag_values=FLAGS)
cli.define_number(
    FLAGS, "budget", None, "fraction of the plain model's cost, between 0 and 1",
    Number(0, 1, above=True, below=True),
)  # fmt: skip
flags.DEFINE_enum(
    "of", "macs", ["macs", "latency"], "cost that the budget limits", flag_values=FLAGS
)
cli.define_number(
    FLAGS, "num_images", 8, "images of the evaluation split to compare", whole(1, 1024)
)
cli.define_images(FLAGS, "images to compare instead")
flags.DEFINE_string("checkpoint", "last", "last, best or a step", flag_values=FLAGS)
flags.DEFINE_string("plot", None, "picture of similarity over cost", flag_values=FLAGS)
flags.DEFINE_string("out", None, "new folder for the faster run", flag_values=FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Prints and draws the front, and writes the faster run."""
    if flag_values.images is not None and flag_values["num_images"].present:
        raise cli.UsageError("--num_images has no effect with --images")
    from tokenvit_jax.expediting.front import format_front, format_rivals, plot_front
    from tokenvit_jax.expediting.search import pareto_front
    from tokenvit_jax.output import write_figure
    from tokenvit_jax.training.expedite_run import search_run, write_expedited
    from tokenvit_jax.training.new_run import check_new
    from tokenvit_jax.training.processes import check_alone

    workdir = Path(flag_values.workdir)
    files = None if flag_values.images is None else cli.image_files(flag_values.images)
    plot = cli.picture_path(flag_values, "plot", files or ())
    out = Path(flag_values.out) if flag_values.out else None
    if out:
        check_new(out)
    check_alone("expedite")
    search = search_run(
        workdir,
        flag_values.budget,
        flag_values.of,
        images=None if files is None else cli.read_images(files),
        num_images=flag_values.num_images,
        checkpoint=flag_values.checkpoint,
    )
    rated, chosen, rivals = search.found
    tried = f"{len(rated)} of {search.num_candidates} settings tried on {search.num_images} images"
    print(f"{tried}, temperature {chosen.expedite.temperature:g}; the front:")
    print(format_front(pareto_front(rated), chosen))
    print(format_rivals(rivals, chosen))
    if chosen.similarity < SIMILAR:
        print(
            f"warning: similarity {chosen.similarity:.4f} is below {SIMILAR}: results will differ "
            "from the plain model's; a higher --budget changes the features less",
            file=sys.stderr,
        )
    if out:
        write_expedited(out, search)
        print(f"{workdir} -> {out}")
    if plot:
        write_figure(plot, plot_front(rated, chosen, flag_values.budget), "--plot")


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir", "budget"))
