"""Labels the cells of all training images with a trained model, for token labelling.

    python -m tokenvit_jax.label --workdir=TEACHER --out=DIR

The images come from the teacher's dataset; each whole image is squeezed into a square of the
teacher's image_size. For every record and every cell of the teacher's last map, DIR receives the
--top_k most probable classes (`classes.npy`) and their probabilities, divided by their sum
(`scores.npy`). A student reads these files with --config.token_labels.files=DIR. --checkpoint is
last, best (highest accuracy) or a step.
"""

from pathlib import Path

from absl import flags

from tokenvit_jax import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the teacher's run", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder that receives the labels", flag_values=FLAGS)
flags.DEFINE_string("checkpoint", "best", "last, best or a step", flag_values=FLAGS)
flags.DEFINE_integer("top_k", 5, "classes per cell", flag_values=FLAGS)
flags.DEFINE_string(
    "data_dir", None, "folder of the prepared dataset; default: as in the run", flag_values=FLAGS
)


def main(flag_values: flags.FlagValues) -> None:
    """Writes the labels and prints their number."""
    from tokenvit_jax.data import check_reads_files
    from tokenvit_jax.training.token_label_writer import label_training_images
    from tokenvit_jax.training.workdir import read_config

    workdir, out = Path(flag_values.workdir), Path(flag_values.out)
    check_reads_files(read_config(workdir), flag_values.data_dir)
    records, height, width, top_k = label_training_images(
        workdir,
        flag_values.checkpoint,
        out,
        flag_values.top_k,
        flag_values.data_dir,
    )
    print(f"{records} records of {height} x {width} cells, {top_k} classes each -> {out}")


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir", "out"))
