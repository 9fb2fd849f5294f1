"""Records of datasets, transforms of images and batches for training and evaluation."""

from tokenvit_jax.data.check import check_data
from tokenvit_jax.data.class_names import different_names
from tokenvit_jax.data.datasets import (
    builtin_info,
    check_reads_files,
    dataset_info,
    datasets_with,
    list_datasets,
    open_annotations,
    open_split,
    with_class_names,
    with_dataset,
)
from tokenvit_jax.data.decoding import decode_image, read_image, to_rgb
from tokenvit_jax.data.images import (
    INTERPOLATIONS,
    NORMALIZATIONS,
    eval_image,
    mean_and_std,
    with_channels,
)
from tokenvit_jax.data.pipeline import check_records, eval_batches, train_batches
from tokenvit_jax.data.pixel_ops import from_array, to_array
from tokenvit_jax.data.record import IGNORED, DatasetInfo, Examples, Record, Source, Spec

__all__ = [
    "IGNORED",
    "INTERPOLATIONS",
    "NORMALIZATIONS",
    "DatasetInfo",
    "Examples",
    "Record",
    "Source",
    "Spec",
    "builtin_info",
    "check_data",
    "check_reads_files",
    "check_records",
    "dataset_info",
    "datasets_with",
    "decode_image",
    "different_names",
    "eval_batches",
    "eval_image",
    "from_array",
    "list_datasets",
    "mean_and_std",
    "open_annotations",
    "open_split",
    "read_image",
    "to_array",
    "to_rgb",
    "train_batches",
    "with_channels",
    "with_class_names",
    "with_dataset",
]
