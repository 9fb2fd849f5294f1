"""Semantic segmentation: one label per pixel."""

from tokenvit_jax.tasks.segmentation.task import Segmentation

__all__ = ["Segmentation"]
