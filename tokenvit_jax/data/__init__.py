"""Labelled images for training and evaluation: datasets, transforms, batches."""

from tokenvit_jax.data.examples import ImageBuffer
from tokenvit_jax.data.label_maps import IGNORED
from tokenvit_jax.data.pipeline import eval_dataset, record_dataset, train_dataset
from tokenvit_jax.data.sources import DatasetInfo, dataset_info, list_datasets
from tokenvit_jax.data.transforms import NORMALIZATIONS, decode_image, eval_image

__all__ = [
    "IGNORED",
    "NORMALIZATIONS",
    "DatasetInfo",
    "ImageBuffer",
    "dataset_info",
    "decode_image",
    "eval_dataset",
    "eval_image",
    "list_datasets",
    "record_dataset",
    "train_dataset",
]
