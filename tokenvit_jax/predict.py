"""Predicts images with a trained model, and draws the predictions and the model's tokens.

    python -m tokenvit_jax.predict --workdir=RUN --images=a.jpg,b.png --out=PICTURES

A classifier gives the most probable classes of each image. A model with dynamic groups also shows
the largest query groups with the keys that each group selects; a model with clusters shows the
clusters of its tokens, as coloured regions and one by one. A segmentation model gives the classes
of the pixels, blended over the image and as a label map of the same size (a PNG whose pixels are
the labels). If a model clusters patches by `expedite`, the borders of the superpixels are drawn; an
image that is predicted in several windows shows the superpixels of the middle window. --checkpoint
is last, best (highest score of the task) or a step.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from matplotlib.figure import Figure
from PIL import Image

from tokenvit_jax import cli
from tokenvit_jax.progress import note, progress
from tokenvit_jax.training.run import load_run
from tokenvit_jax.training.workdir import read_config

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of a training run", flag_values=FLAGS)
flags.DEFINE_list("images", None, "image files, separated by commas", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder that receives the pictures", flag_values=FLAGS)
flags.DEFINE_string("checkpoint", "last", "last, best or a step", flag_values=FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Writes the pictures and prints one line per image."""
    workdir, out = Path(flag_values.workdir), Path(flag_values.out)
    config = read_config(workdir)
    files = [Path(name) for name in flag_values.images]
    images = cli.read_images(flag_values.images)  # first, so that a mistake in a name costs no time
    run = load_run(workdir, flag_values.checkpoint, config=config)
    out.mkdir(parents=True, exist_ok=True)
    named = list(zip(files, _picture_names(files), images, strict=True))
    for file, name, image in progress(named, "predicting", "image"):
        prediction = run.predictor(image)
        drawn = prediction.draw(file.name)
        paths = [_save(picture, out / f"{name}_{kind}.png") for kind, picture in drawn.items()]
        note(f"{file}: {prediction.text} -> {' '.join(map(str, paths))}")


def _picture_names(files: Sequence[Path]) -> list[str]:
    """Returns the file names without suffix; equal names get their position in the list."""
    stems = [file.stem for file in files]
    return [
        stem if stems.count(stem) == 1 else f"{stem}_{place}"
        for place, stem in enumerate(stems, start=1)
    ]


def _save(picture: Figure | Image.Image, path: Path) -> Path:
    if isinstance(picture, Figure):
        picture.savefig(path, dpi=150)
    else:
        picture.save(path)
    return path


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir", "images", "out"))
