"""Turns the original files of a dataset into ArrayRecord files, which training reads.

    python -m tokenvit_jax.prepare imagenet2012 --manual_dir=DOWNLOADS --data_dir=DATA

DOWNLOADS has the archives of imagenet2012, or the unpacked folders of ade20k, cityscapes or
pascal_context: where they are missing, the command says what belongs there. DATA is what
`--config.data.data_dir` then names. No TensorFlow is needed.
"""

from pathlib import Path

from absl import flags

from tokenvit_jax import cli
from tokenvit_jax.config import default_config
from tokenvit_jax.data import dataset_info
from tokenvit_jax.data.sources import EMBEDDED
from tokenvit_jax.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "manual_dir",
    None,
    "Folder with what was downloaded; default: DATA_DIR/downloads/manual.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "data_dir",
    default_config().data.data_dir,
    "Folder that receives the prepared dataset.",
    flag_values=FLAGS,
)


def main(flag_values: flags.FlagValues, dataset: str) -> None:
    """Prepares one dataset."""
    info = dataset_info(dataset)  # names the valid ones if there is no such dataset
    if dataset in EMBEDDED:
        print(f"{dataset} comes with scikit-learn: there is nothing to prepare")
        return
    from tokenvit_jax.data.datasets import imagenet2012, segmentation

    data_dir = Path(flag_values.data_dir).expanduser()
    manual_dir = data_dir / "downloads" / "manual"
    if flag_values.manual_dir is not None:
        manual_dir = Path(flag_values.manual_dir).expanduser()
    try:
        if info.task == "segmentation":
            folder = segmentation.prepare(dataset, manual_dir, data_dir)
        else:
            folder = imagenet2012.prepare(manual_dir, data_dir)
    except OSError as error:
        raise UserError(f"cannot prepare {dataset} in --data_dir={data_dir}: {error}") from error
    print(f"{dataset} is prepared in {folder}; train with --config.data.data_dir={data_dir}")


if __name__ == "__main__":
    cli.run(main, FLAGS, positional=("DATASET",))
