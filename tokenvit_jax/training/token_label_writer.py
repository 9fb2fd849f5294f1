"""Writes token labels of a teacher to files, which `data.token_labels` reads."""

import contextlib
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from tokenvit_jax.data import eval_batches, open_split
from tokenvit_jax.data.token_labels import FILES
from tokenvit_jax.errors import UserError
from tokenvit_jax.output import check_new_folder, new_folder, writing
from tokenvit_jax.progress import progress
from tokenvit_jax.tasks.classification.examples import WholeImages
from tokenvit_jax.tasks.classification.teaching import cell_misfit, label_cells
from tokenvit_jax.training.devices import make_parallel
from tokenvit_jax.training.processes import check_alone
from tokenvit_jax.training.run import Run
from tokenvit_jax.training.teacher import load_teacher
from tokenvit_jax.training.workdir import for_inference


def label_training_images(
    workdir: Path, checkpoint: str, out: Path, top_k: int, data_dir: str | None
) -> tuple[int, int, int, int]:
    """Labels the cells of all training images of a run's dataset with its model.

    Args:
      workdir: folder of the teacher's run.
      checkpoint: "last", "best" or a step.
      out: folder, new or empty; it receives the files when they are complete.
      top_k: number of classes per cell.
      data_dir: folder of the prepared dataset; None: the folder in the run's configuration.

    Returns:
      (records, h, w, top_k), the shape of both files.

    Raises:
      UserError: a value is not valid, there is no such run, or an image cannot be read.
    """
    check_alone("label")
    check_new_folder(out, "--out")
    teacher = load_teacher(workdir, checkpoint, lambda task, model: cell_misfit(model))
    num_classes = teacher.task.info.num_classes
    if not 1 <= top_k <= num_classes:
        raise UserError(f"--top_k={top_k}; valid: 1 to {num_classes}")
    config = for_inference(teacher.config, data_dir)
    with new_folder(out, "--out") as folder:
        return write_labels(folder, teacher, config, top_k)


def write_labels(
    folder: Path, teacher: Run, config: ConfigDict, top_k: int
) -> tuple[int, int, int, int]:
    """Writes `classes.npy` (integer) and `scores.npy` (float16), (records, h, w, top_k).

    The images are not cropped: the whole image is squeezed into the shape of the teacher's input.

    Args:
      folder: folder that receives the files.
      teacher: run that labels the images.
      config: configuration of the teacher, for these devices; `dataset`, `image_size` and `data`
        are read.
      top_k: number of classes per cell.

    Returns:
      The shape of both arrays.

    Raises:
      UserError: the dataset is not prepared, an image cannot be read, or a file cannot be written.
    """
    parallel, info = make_parallel(config), teacher.task.info
    source = open_split(config, info.train_split)
    variables = parallel.put_variables(teacher.variables)

    def label(variables, images):
        labels = label_cells(teacher.task, teacher.model, variables, images)
        return top_labels(labels, top_k)

    label = parallel.batch_step(label)
    types = np.min_scalar_type(info.num_classes - 1), np.float16
    paths, shape, left = [folder / name for name in FILES], None, len(source)
    batches = eval_batches(source, WholeImages(config, info), config, devices=jax.device_count())
    with contextlib.closing(iter(batches)) as iterator:
        for batch in progress(iterator, "labelling", "batch", len(batches)):
            images = parallel.put_batch({"image": batch["image"]})["image"]
            labels = jax.device_get(label(variables, images))
            if shape is None:
                shape = (len(source), *labels[0].shape[1:])
                for path, dtype in zip(paths, types, strict=True):
                    _begin_array(path, dtype, shape)
            for path, dtype, values in zip(paths, types, labels, strict=True):
                with writing(path), path.open("ab") as file:
                    file.write(values[:left].astype(dtype).tobytes())  # without filling
            left = max(left - len(images), 0)
    return shape


def _begin_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Writes the head of a .npy file, whose values follow.

    A file mapped into memory would kill the process if the disk gets full.
    """
    head = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with writing(path), path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, head)


def top_labels(probabilities: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the most probable classes, most probable first, with renormalised probabilities.

    Args:
      probabilities: (..., num_classes).
      top_k: number of classes.

    Returns:
      Classes and probabilities, (..., top_k); the probabilities sum to 1.
    """
    scores, classes = jax.lax.top_k(probabilities, top_k)
    return classes, scores / scores.sum(axis=-1, keepdims=True)
