"""Predicts images with a trained model, and draws the predictions and the model's tokens.

    python -m tokenvit_jax.predict --workdir=RUN --images=photos,a.jpg --out=PICTURES

--images names files, folders (with all images below them) and quoted patterns such as
'photos/**/*.jpg', separated by commas. Pictures go to the folder --out, where they replace only
those of earlier calls; a table with one row per image goes to --results, a .json or .csv file, by
default PICTURES.json next to the folder. Files that cannot be read are passed over and reported at
the end, with exit status 1.

A classifier gives the probabilities of the classes; a model without classes gives its features. A
model with dynamic groups also shows the largest query groups with the keys that each group selects;
a model with clusters shows the clusters of its tokens, as coloured regions and one by one. A
segmentation model gives the classes of the pixels, blended over the image and as a label map of the
same size (a PNG whose pixels are the labels). A depth model gives the depth in colours with a scale
in metres, and as a PNG of 16 bits with 256 values per metre. A detector gives boxes with classes
and scores, and blends the masks of Mask R-CNN over the image; the picture leaves out scores below
0.3. Mask2Former gives the classes of the pixels, objects with their masks, or panoptic segments,
also as a PNG in COCO's panoptic format. A pose model gives the keypoints of the persons in the
boxes of --boxes, a detector's results in COCO's format whose image_id is the name of a file without
its suffix, or this number; without --boxes, the whole image is the box of one person. --persons
names a file for all persons in COCO-WholeBody's format of results. If a model clusters patches by
`expedite`, the borders of the superpixels are drawn; an image that is predicted in several windows
shows the superpixels of the middle window. --attention also draws where a ViT or DeiT attends: the
heads of its last block, and attention rollout (Abnar and Zuidema 2020). --checkpoint is last, best
(highest score of the task) or a step. --config.key=value changes an entry of the run's
configuration, such as --config.inference.flip; --config=CONFIG.py replaces it.
"""

from pathlib import Path

from absl import flags

from tokenvit_jax import cli
from tokenvit_jax.errors import UserError
from tokenvit_jax.output import check_folder

FLAGS = cli.config_flags(of_run=True)
flags.DEFINE_string("workdir", None, "folder of a training run", flag_values=FLAGS)
cli.define_images(FLAGS, "images to predict")
flags.DEFINE_string("out", None, "folder that receives the pictures", flag_values=FLAGS)
flags.DEFINE_string(
    "results", None, ".json or .csv file with all results; default: OUT.json", flag_values=FLAGS
)
flags.DEFINE_string(
    "boxes", None, "JSON file with the boxes of persons, for a pose model", flag_values=FLAGS
)
flags.DEFINE_string(
    "persons", None, ".json file for the persons that a pose model finds; default: none",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_bool("attention", False, "draw the attention of a plain host", flag_values=FLAGS)
flags.DEFINE_string("checkpoint", "last", "last, best or a step", flag_values=FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Writes the pictures and the tables, and prints one line per image."""
    from tokenvit_jax.progress import note, progress
    from tokenvit_jax.tasks import check_values
    from tokenvit_jax.training.prediction import Table, boxes_of_files, predict_files
    from tokenvit_jax.training.processes import check_alone
    from tokenvit_jax.training.run import load_run
    from tokenvit_jax.training.workdir import read_config

    workdir, out = Path(flag_values.workdir), Path(flag_values.out)
    check_folder(out, "--out")
    check_alone("predict")
    config = cli.run_config(flag_values, lambda: read_config(workdir))
    check_values(config)
    _check_task(flag_values, config.task)
    files = cli.image_files(flag_values.images)  # first: a mistake in a name costs no time
    boxes = boxes_of_files(flag_values.boxes, files) if flag_values.boxes else None
    table, persons = Table(_results_path(flag_values.results, out), files), None
    if flag_values.persons:
        file = Path(flag_values.persons)
        persons = Table(file, files, flag="--persons", first="image_id")
    run = load_run(workdir, flag_values.checkpoint, config=config)
    lines = predict_files(
        run, files, out, table, attention=flag_values.attention, boxes=boxes, persons=persons
    )
    for line in progress(lines, "predicting", "image", total=len(files)):
        note(line)


def _check_task(flag_values: flags.FlagValues, task: str) -> None:
    """Raises UsageError for flags that are for runs of other tasks."""
    from tokenvit_jax.tasks import TASKS

    for flag in ("boxes", "persons"):
        value = getattr(flag_values, flag)
        if value is not None and not TASKS[task].takes_boxes:
            valid = ", ".join(name for name, cls in TASKS.items() if cls.takes_boxes)
            raise cli.UsageError(
                f"--{flag}={value} is for runs of the task {valid}; this is one of {task}"
            )


def _results_path(results: str | None, out: Path) -> Path:
    """Returns the file of the table, next to the folder of the pictures by default."""
    if results is not None:
        return Path(results)
    folder = out.resolve() if out.name in ("", "..") else out
    if not folder.name:
        raise UserError(f"--out={out} has no name for the table; valid: --results, too")
    return folder.with_name(f"{folder.name}.json")


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir", "images", "out"))
