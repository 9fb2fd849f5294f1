"""Records of datasets, transforms of images and batches for training and evaluation."""

from tokenvit_jax.data.check import MIN_IMAGE_SIZE, check_data
from tokenvit_jax.data.datasets import dataset_info, list_datasets, open_split
from tokenvit_jax.data.images import NORMALIZATIONS, eval_image, mean_and_std, read_image
from tokenvit_jax.data.pipeline import eval_batches, train_batches
from tokenvit_jax.data.record import IGNORED, DatasetInfo, Examples, Record, Source, Spec

__all__ = [
    "IGNORED",
    "MIN_IMAGE_SIZE",
    "NORMALIZATIONS",
    "DatasetInfo",
    "Examples",
    "Record",
    "Source",
    "Spec",
    "check_data",
    "dataset_info",
    "eval_batches",
    "eval_image",
    "list_datasets",
    "mean_and_std",
    "open_split",
    "read_image",
    "train_batches",
]
