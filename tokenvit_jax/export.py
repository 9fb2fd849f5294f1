"""Exports a trained model as a folder that runs without this package.

    python -m tokenvit_jax.export --workdir=RUN --out=FOLDER

FOLDER holds three files:

- model.jax: the model for any number of images, on CPU, CUDA and TPU (`jax.export`). It takes uint8
  images of the run's size, and normalises them itself.
- weights.safetensors: the weights, which `convert --layout=own` turns into a run again.
- export.json: names of the classes, shapes of the images and outputs, versions.

Three lines load it; they need jax, flatbuffers and safetensors:

    import jax, safetensors.numpy
    model = jax.jit(jax.export.deserialize(bytearray(open("FOLDER/model.jax", "rb").read())).call)
    outputs = model(safetensors.numpy.load_file("FOLDER/weights.safetensors"), images)

A classifier gives {"logits", "probabilities"} (B, classes), a segmentation model {"labels"} (B, H,
W) and {"logits"} (B, H, W, classes), a depth model {"depth"} (B, H, W) in metres, a detector
{"boxes", "classes", "scores"} and, with Mask R-CNN and HTC, {"masks"}. --checkpoint is last, best
(highest score of the task) or a step.
"""

from pathlib import Path

from absl import flags

from tokenvit_jax import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of a training run", flag_values=FLAGS)
flags.DEFINE_string("out", None, "new folder for the exported model", flag_values=FLAGS)
flags.DEFINE_string("checkpoint", "last", "last, best or a step", flag_values=FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Writes the folder."""
    from tokenvit_jax.output import check_new_folder
    from tokenvit_jax.training.exporting import write_export
    from tokenvit_jax.training.processes import check_alone
    from tokenvit_jax.training.run import load_run

    workdir, out = Path(flag_values.workdir), Path(flag_values.out)
    check_new_folder(out, "--out")  # first, so that a mistake costs no time
    check_alone("export")
    run = load_run(workdir, flag_values.checkpoint)
    write_export(out, run.task, run.model, run.variables, run.step, "--out")
    print(f"{workdir} -> {out}")


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir", "out"))
