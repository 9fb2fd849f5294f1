"""Records of datasets, transforms of images and batches for training and evaluation."""

from tokenvit_jax.data.datasets import dataset_info, list_datasets, open_split
from tokenvit_jax.data.images import NORMALIZATIONS, decode_image, eval_image
from tokenvit_jax.data.pipeline import eval_batches, train_batches
from tokenvit_jax.data.record import IGNORED, DatasetInfo, Examples, Record, Source, Spec

__all__ = [
    "IGNORED",
    "NORMALIZATIONS",
    "DatasetInfo",
    "Examples",
    "Record",
    "Source",
    "Spec",
    "dataset_info",
    "decode_image",
    "eval_batches",
    "eval_image",
    "list_datasets",
    "open_split",
    "train_batches",
]
