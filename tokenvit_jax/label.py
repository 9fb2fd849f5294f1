"""Labels the cells of all training images with a trained model, for token labelling.

    python -m tokenvit_jax.label --workdir=TEACHER --out=DIR

The images are those of the teacher's dataset, whole, squeezed into a square of its image_size. DIR
receives for every record and every cell of the teacher's last map the --top_k most probable
classes (`classes.npy`) and their probabilities, divided by their sum (`scores.npy`); a student
reads them with --config.token_labels.files=DIR. --checkpoint=last, best (highest accuracy) or a
step.
"""

import contextlib
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from tokenvit_jax import cli
from tokenvit_jax.data import dataset_info, open_split
from tokenvit_jax.data.token_labels import FILES
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks.batches import record_dataset
from tokenvit_jax.training import parallel as devices
from tokenvit_jax.training.teacher import Teacher, load_teacher
from tokenvit_jax.training.workdir import for_inference

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the teacher's run", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder that receives the labels", flag_values=FLAGS)
flags.DEFINE_string("checkpoint", "best", "last, best or a step", flag_values=FLAGS)
flags.DEFINE_integer("top_k", 5, "classes per cell", flag_values=FLAGS)
flags.DEFINE_string("data_dir", None, "where the dataset is; the run's if none", flag_values=FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Writes the labels and prints how many."""
    out = Path(flag_values.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out={out} exists and is not an empty folder")
    teacher = load_teacher(Path(flag_values.workdir), flag_values.checkpoint)
    if not 1 <= flag_values.top_k <= teacher.num_classes:
        raise UserError(f"--top_k={flag_values.top_k}; valid: 1 to {teacher.num_classes}")
    config = for_inference(teacher.config, flag_values.data_dir)
    # Under its name only when it is complete.
    temporary = out.with_name(out.name + ".tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    shape = write_labels(temporary, teacher, config, flag_values.top_k)
    temporary.rename(out)
    print(f"{shape[0]} records of {shape[1]} x {shape[2]} cells, {shape[3]} classes each -> {out}")


def write_labels(
    folder: Path, teacher: Teacher, config: ConfigDict, top_k: int
) -> tuple[int, int, int, int]:
    """Writes `classes.npy` (integer) and `scores.npy` (float16), (records, h, w, top_k).

    Args:
        folder: that receives them.
        teacher: labels the images.
        config: of the teacher: reads `dataset`, `image_size`, `data` and devices.
        top_k: classes per cell.

    Returns:
        The shape of both.

    Raises:
        UserError: the dataset is not prepared, or an image cannot be read.
    """
    parallel = devices.make_parallel(config)
    info = dataset_info(config.dataset)
    num_records = len(open_split(info.name, info.train_split, config.data.data_dir))
    variables = parallel.put_variables(teacher.variables)
    label = parallel.batch_step(
        lambda variables, images: top_labels(teacher.label(variables, images), top_k)
    )
    types = np.min_scalar_type(info.num_classes - 1), np.float16
    files, start = None, 0
    with contextlib.closing(iter(record_dataset(config))) as batches:
        for batch in batches:
            images = parallel.put_batch({"image": batch["image"]})["image"]
            labels = jax.device_get(label(variables, images))
            if files is None:
                shape = (num_records, *labels[0].shape[1:])
                files = [
                    np.lib.format.open_memmap(folder / name, "w+", dtype, shape)
                    for name, dtype in zip(FILES, types, strict=True)
                ]
            for file, values in zip(files, labels, strict=True):
                file[start : start + len(values)] = values[: num_records - start]  # no filling
            start += len(images)
    for file in files:
        file.flush()
    return shape


def top_labels(probabilities: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the most probable classes, in falling order, and their probabilities, of sum 1.

    Args:
        probabilities: (..., num_classes).
        top_k: number of classes.

    Returns:
        Classes and probabilities, (..., top_k).
    """
    scores, classes = jax.lax.top_k(probabilities, top_k)
    return classes, scores / scores.sum(axis=-1, keepdims=True)


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir", "out"))
