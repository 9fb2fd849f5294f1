"""Turns the original files of a dataset into ArrayRecord files, which training reads.

    python -m tokenvit_jax.prepare imagenet2012 --manual_dir=DOWNLOADS --data_dir=DATA

DOWNLOADS holds the archives of imagenet2012 or their unpacked folders train and val, the four files
of fashion_mnist, the unpacked folders of ade20k, cityscapes, coco, coco_panoptic or pascal_context,
those of ade20k_panoptic or ade20k_instances with the table categoryMapping.txt, or those of
kitti_depth or nyu_depth_v2 with BTS's lists of files; the command names whatever is missing, and
prints the number of records, with the expected number if it differs. Training reads DATA with
`--config.data.data_dir`. No TensorFlow is needed.
"""

from pathlib import Path

from absl import flags

from tokenvit_jax import cli, slurm
from tokenvit_jax.config import ENTRIES, base_config
from tokenvit_jax.output import check_folder

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "manual_dir",
    None,
    "folder with the downloaded files; default: DATA_DIR/downloads/manual",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "data_dir",
    ENTRIES["data.data_dir"].default,
    "folder that receives the prepared dataset",
    flag_values=FLAGS,
)


def main(flag_values: flags.FlagValues, dataset: str) -> None:
    """Prepares one dataset."""
    from tokenvit_jax.data import datasets
    from tokenvit_jax.data.tfds_files import count_records

    slurm.check_one_task("prepare")
    data_dir, manual_dir = Path(flag_values.data_dir), flag_values.manual_dir
    check_folder(data_dir, "--data_dir")
    manual_dir = Path(manual_dir) if manual_dir is not None else None
    folder = datasets.prepare(dataset, manual_dir, data_dir)
    if folder is None:
        builtin = dataset in datasets.list_datasets()
        how = "comes with an installed package" if builtin else "is read as it is"
        print(f"{dataset} {how}: there is nothing to prepare")
        return
    config = base_config()
    config.dataset, config.data.data_dir = dataset, str(data_dir)
    wanted = datasets.dataset_info(config).splits
    for split in count_records(folder):
        count = len(datasets.open_split(config, split))  # a stored image may have several records
        complete = count == wanted.get(split, count)
        print(f"{split}: {count:,} records" + ("" if complete else f", not {wanted[split]:,}"))
    print(f"{dataset} is prepared in {folder}; train with --config.data.data_dir={data_dir}")


if __name__ == "__main__":
    cli.run(main, FLAGS, positional=("DATASET",))
