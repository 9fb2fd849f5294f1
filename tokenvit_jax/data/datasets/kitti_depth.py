"""KITTI with the split of Eigen: photographs from a car, and depth from its laser scanner.

References:
  Geiger et al. 2013, "Vision meets Robotics: The KITTI Dataset"; Uhrig et al. 2017, "Sparsity
  Invariant CNNs", whose depth maps join eleven scans; Eigen et al. 2014; Lee et al. 2019, "From Big
  to Small" (BTS), whose lists of files name 697 test images, 652 of them with a depth map.
"""

from pathlib import Path

from ml_collections import ConfigDict

from tokenvit_jax.data.datasets import depth_files
from tokenvit_jax.data.datasets.depth_files import DepthSource, Layout
from tokenvit_jax.data.record import DatasetInfo

INFO = DatasetInfo(
    name="kitti_depth",
    splits={"train": 23_158, "test": 652},
    train_split="train",
    eval_split="test",
    fields=frozenset({"image", "depth"}),
    num_classes=0,
    classes=None,
)

LAYOUT = Layout(
    lists={
        "train": "eigen_train_files_with_gt.txt",
        "test": "eigen_test_files_with_gt.txt",
    },
    # The lists leave out in which part of the annotated depth a drive lies.
    folders=("", "train", "val", "data_depth_annotated/train", "data_depth_annotated/val"),
    steps=256,
    how_to_get=(
        "unpack the raw data (2011_09_26 and so on) and data_depth_annotated.zip of "
        "www.cvlibs.net/datasets/kitti there, and copy the lists eigen_*_files_with_gt.txt from "
        "github.com/cleinc/bts, train_test_inputs"
    ),
)


def open_split(config: ConfigDict, split: str) -> DepthSource:
    """Opens a split for reading.

    Raises:
      UserError: the dataset has not been prepared in `config.data.data_dir`.
    """
    return DepthSource(INFO, LAYOUT, split, config.data.data_dir)


def prepare(manual_dir: Path, data_dir: Path) -> Path:
    """See :func:`tokenvit_jax.data.datasets.depth_files.prepare`."""
    return depth_files.prepare(INFO.name, LAYOUT, manual_dir, data_dir)
