"""Classifies images with a trained model and draws what it sees.

    python -m tokenvit_jax.predict --workdir=RUN --images=a.jpg,b.png --out=PICTURES

For each image: its most probable classes; for a model with dynamic groups the largest query groups
with the keys that each selects; for one with clusters the clusters of its tokens, as coloured
regions and one by one. --checkpoint=last, best (highest accuracy) or a step.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from tokenvit_jax import cli
from tokenvit_jax.data import DatasetInfo, dataset_info, decode_image, eval_image
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import classification, pictures
from tokenvit_jax.training.checkpoint import load_variables
from tokenvit_jax.training.step import normalize
from tokenvit_jax.training.workdir import read_config

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of a training run", flag_values=FLAGS)
flags.DEFINE_list("images", None, "image files, separated by commas", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder that receives the pictures", flag_values=FLAGS)
flags.DEFINE_string("checkpoint", "last", "last, best or a step", flag_values=FLAGS)

TOP_CLASSES = 5


def main(flag_values: flags.FlagValues) -> None:
    """Writes the pictures and prints a line per image."""
    if not flag_values.images:
        raise UserError("--images names no file")
    workdir, out = Path(flag_values.workdir), Path(flag_values.out)
    config = read_config(workdir)
    info = dataset_info(config.dataset)
    files = [Path(name) for name in flag_values.images]
    # Before the checkpoint is loaded: a mistake in a name costs no time.
    images = [read_image(file, config, info) for file in files]
    predict = make_predict(config, workdir, flag_values.checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    for file, name, image in zip(files, _picture_names(files), images, strict=True):
        probabilities, intermediates = predict(image)
        classes = top_classes(probabilities, info)
        figures = {"classes": pictures.plot_classes(image, classes)}
        figures |= token_figures(image, intermediates, file.name)
        paths = [_save(figure, out / f"{name}_{kind}.png") for kind, figure in figures.items()]
        found = ", ".join(f"{label} {probability:.1%}" for label, probability in classes)
        print(f"{file}: {found} -> {' '.join(map(str, paths))}")


def read_image(file: Path, config: ConfigDict, info: DatasetInfo) -> np.ndarray:
    """Returns the (S, S, 3) uint8 pixels that evaluation would make of an image file.

    Raises:
        UserError: the file cannot be read, or is no image.
    """
    crop = config.data.eval_crop if info.center_crop else 1.0
    try:
        return eval_image(decode_image(file.read_bytes()), config.image_size, crop)
    except OSError as error:
        raise UserError(f"--images: {file}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"--images: {file}: {error}") from error


def token_figures(
    image: np.ndarray, intermediates: dict[str, Any], caption: str
) -> dict[str, Figure]:
    """Returns pictures of what a model did with the tokens of an image, by their kind.

    Args:
        image: (S, S, 3) uint8.
        intermediates: of :func:`make_predict`'s function, for this image.
        caption: names the image.
    """
    figures = {}
    routing = pictures.finest_routing(intermediates, image.shape[:2])
    if routing is not None:
        figures["groups"] = pictures.plot_groups(image[None], routing, [caption])
    clusterings = pictures.stage_clusterings(intermediates, image.shape[:2])
    if clusterings:
        figures["clusters"] = pictures.plot_clusters(image, clusterings, caption)
    return figures


def make_predict(config: ConfigDict, workdir: Path, checkpoint: str):
    """Returns a function of one image to its class probabilities and what the model noted.

    Args:
        config: of the workdir.
        workdir: folder of a training run.
        checkpoint: "last", "best" or a step.

    Returns:
        ``predict(image)``: from (S, S, 3) uint8 to (num_classes,) and the model's collection
        "intermediates", of which `tasks.pictures` takes groups and clusters.

    Raises:
        UserError: there is no such checkpoint, or it is of another model.
    """
    model = classification.make_model(config, dataset_info(config.dataset).num_classes)
    loaded = load_variables(model, config.image_size, workdir, checkpoint)
    variables = jax.device_put(loaded.variables)

    @jax.jit
    def apply(variables, images):
        images = normalize(images, config.data.normalization)
        logits, state = model.apply(variables, images, train=False, mutable=["intermediates"])
        return jax.nn.softmax(logits), state.get("intermediates", {})

    def predict(image):
        probabilities, intermediates = jax.device_get(apply(variables, image[None]))
        return probabilities[0], intermediates

    return predict


def top_classes(probabilities: np.ndarray, info: DatasetInfo) -> list[tuple[str, float]]:
    """Returns names and probabilities of the most probable classes, in falling order.

    Args:
        probabilities: (num_classes,).
        info: of the dataset that the model learned; without names, a class is called by its index.
    """
    best = np.argsort(-probabilities, kind="stable")[:TOP_CLASSES]
    names = info.class_names or [f"class {label}" for label in range(info.num_classes)]
    return [(names[label], float(probabilities[label])) for label in best]


def _picture_names(files: Sequence[Path]) -> list[str]:
    """File names without suffix; where two are equal, with their place among the images."""
    stems = [file.stem for file in files]
    return [
        stem if stems.count(stem) == 1 else f"{stem}_{place}"
        for place, stem in enumerate(stems, start=1)
    ]


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir", "images", "out"))
