"""Predictions of a trained model on images, and pictures of what it sees.

    python -m tokenvit_jax.predict --workdir=RUN --images=a.jpg,b.png --out=PICTURES

Of a classifier, for each image: its most probable classes; for a model with dynamic groups the
largest query groups with the keys that each selects; for one with clusters the clusters of its
tokens, as coloured regions and one by one. Of a segmentation model: the classes of the pixels over
the image, and as a label map of its size, a PNG whose pixels are the labels. Of both, where a model
clusters patches by `expedite`: the borders of the superpixels, of an image that is seen in several
windows those of the one in the middle. --checkpoint=last, best (highest accuracy or mIoU) or a
step.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax import cli
from tokenvit_jax.data import DatasetInfo, ImageBuffer, dataset_info, eval_image
from tokenvit_jax.data.image_files import read_image
from tokenvit_jax.errors import UserError
from tokenvit_jax.pictures import tokens
from tokenvit_jax.pictures.classes import plot_classes
from tokenvit_jax.pictures.label_maps import class_shares, label_image, plot_segmentation
from tokenvit_jax.tasks import classification, segmentation
from tokenvit_jax.training.checkpoint import load_variables
from tokenvit_jax.training.step import normalize
from tokenvit_jax.training.workdir import read_config

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of a training run", flag_values=FLAGS)
flags.DEFINE_list("images", None, "image files, separated by commas", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder that receives the pictures", flag_values=FLAGS)
flags.DEFINE_string("checkpoint", "last", "last, best or a step", flag_values=FLAGS)

TOP_CLASSES = 5

# From an image and its name to classes, each with its part of 1, and pictures by their kind.
Show = Callable[[Image.Image, str], tuple[list[tuple[str, float]], dict[str, Figure | Image.Image]]]


def main(flag_values: flags.FlagValues) -> None:
    """Writes the pictures and prints a line per image."""
    if not flag_values.images:
        raise UserError("--images names no file")
    workdir, out = Path(flag_values.workdir), Path(flag_values.out)
    config = read_config(workdir)
    files = [Path(name) for name in flag_values.images]
    # Before the checkpoint is loaded: a mistake in a name costs no time.
    images = [read_image(file) for file in files]
    make_show = SHOWS[dataset_info(config.dataset).task]
    show = make_show(config, workdir, flag_values.checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    for file, name, image in zip(files, _picture_names(files), images, strict=True):
        classes, drawn = show(image, file.name)
        paths = [_save(picture, out / f"{name}_{kind}.png") for kind, picture in drawn.items()]
        found = ", ".join(f"{label} {part:.1%}" for label, part in classes[:TOP_CLASSES])
        print(f"{file}: {found} -> {' '.join(map(str, paths))}")


# ------------------------------------------------------------------------------------------------
# Classification
# ------------------------------------------------------------------------------------------------


def show_classes(config: ConfigDict, workdir: Path, checkpoint: str) -> Show:
    """Returns what shows the classes of an image, and what the model did with its tokens.

    Arguments and errors are those of :func:`make_predict`.
    """
    info = dataset_info(config.dataset)
    predict = make_predict(config, workdir, checkpoint)
    crop = config.data.eval_crop if info.center_crop else 1.0

    def show(image, caption):
        pixels = eval_image(image, config.image_size, crop)
        probabilities, intermediates = predict(pixels)
        classes = top_classes(probabilities, info)
        figures = {"classes": plot_classes(pixels, classes)}
        return classes, figures | token_figures(pixels, intermediates, caption)

    return show


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
    routing = tokens.finest_routing(intermediates, image.shape[:2])
    if routing is not None:
        figures["groups"] = tokens.plot_groups(image[None], routing, [caption])
    clusterings = tokens.stage_clusterings(intermediates, image.shape[:2])
    if clusterings:
        figures["clusters"] = tokens.plot_clusters(image, clusterings, caption)
    if "superpixels" in intermediates:
        clustering = intermediates["superpixels"]
        figures["superpixels"] = tokens.plot_superpixels(image, clustering, caption)
    return figures


def make_predict(config: ConfigDict, workdir: Path, checkpoint: str):
    """Returns a function of one image to its class probabilities and what the model noted.

    Args:
        config: of the workdir.
        workdir: folder of a training run.
        checkpoint: "last", "best" or a step.

    Returns:
        ``predict(image)``: from (S, S, 3) uint8 to (num_classes,) and the model's collection
        "intermediates", of which `pictures.tokens` takes groups and clusters; where it has
        superpixels, also "superpixels", a `pictures.tokens.Clustering`.

    Raises:
        UserError: there is no such checkpoint, or it is of another model.
    """
    model, variables = _load(classification, config, workdir, checkpoint)

    @jax.jit
    def apply(variables, images):
        images = normalize(images, config.data.normalization)
        logits, state = model.apply(variables, images, train=False, mutable=["intermediates"])
        intermediates = state.get("intermediates", {})
        if (found := tokens.superpixels(model, variables, images)) is not None:
            intermediates |= {"superpixels": found}
        return jax.nn.softmax(logits), intermediates

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
    names = _class_names(info)
    return [(names[label], float(probabilities[label])) for label in best]


# ------------------------------------------------------------------------------------------------
# Segmentation
# ------------------------------------------------------------------------------------------------


def show_label_map(config: ConfigDict, workdir: Path, checkpoint: str) -> Show:
    """Returns what shows the classes of the pixels of an image, and its superpixels if any.

    Arguments and errors are those of :func:`make_segment`.
    """
    info = dataset_info(config.dataset)
    names = _class_names(info)
    segment = make_segment(config, workdir, checkpoint)

    def show(image, caption):
        labels, window, clustering = segment(image)
        drawn = {
            "segmentation": plot_segmentation(np.asarray(image), labels, names),
            "labels": label_image(labels, info.num_classes),
        }
        if clustering is not None:
            drawn["superpixels"] = tokens.plot_superpixels(window, clustering, caption)
        return [(names[label], part) for label, part in class_shares(labels)], drawn

    return show


def make_segment(config: ConfigDict, workdir: Path, checkpoint: str):
    """Returns a function of one image to the classes of its pixels, by the way of evaluation.

    Args:
        config: of the workdir.
        workdir: folder of a training run.
        checkpoint: "last", "best" or a step.

    Returns:
        ``segment(image)``: from an RGB image of any size to its labels (H, W) uint8; the window in
        the middle of the resized image (S, S, 3) uint8; and the superpixels of that, or None.

    Raises:
        UserError: there is no such checkpoint, or it is of another model.
    """
    model, variables = _load(segmentation, config, workdir, checkpoint)
    resize = ImageBuffer(config)
    side = config.inference.window or config.image_size

    @jax.jit
    def apply(variables, images, sizes):
        images = normalize(images, config.data.normalization)
        return segmentation.predict_logits(model, config, variables, images, sizes)[0]

    @jax.jit
    def cluster(variables, images):
        images = normalize(images, config.data.normalization)
        backbone = {kind: tree["backbone"] for kind, tree in variables.items()}
        return tokens.superpixels(model.backbone, backbone, images)

    def segment(image):
        pixels, size = resize(image)
        labels = _largest(apply(variables, pixels[None], size[None]), size, image.size[::-1])
        top, left = np.maximum(size - side, 0) // 2
        window = pixels[top : top + side, left : left + side]
        return *jax.device_get((labels, window)), jax.device_get(cluster(variables, window[None]))

    return segment


@functools.partial(jax.jit, static_argnames="new_size")
def _largest(logits, size, new_size):
    """Class of the largest logit (h, w) of an image that is resized to new_size (h, w)."""
    height, width = new_size

    def predict(start):  # some rows after others: logits of all would not fit into memory
        rows = start + jnp.arange(segmentation.CHUNK)
        found = segmentation.resize_pixels(logits, size, jnp.array(new_size), rows, width)
        return jnp.argmax(found, -1).astype(jnp.uint8)

    labels = jax.lax.map(predict, jnp.arange(0, height, segmentation.CHUNK))
    return labels.reshape(-1, width)[:height]


SHOWS = {"classification": show_classes, "segmentation": show_label_map}


def _load(task, config, workdir, checkpoint):
    model = task.make_model(config, dataset_info(config.dataset).num_classes)
    loaded = load_variables(model, config.image_size, workdir, checkpoint)
    return model, jax.device_put(loaded.variables)


def _class_names(info: DatasetInfo) -> Sequence[str]:
    return info.class_names or [f"class {label}" for label in range(info.num_classes)]


def _picture_names(files: Sequence[Path]) -> list[str]:
    """File names without suffix; where two are equal, with their place among the images."""
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
