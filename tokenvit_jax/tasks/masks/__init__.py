"""Segmentation by masks: semantic, instance and panoptic segmentation with one model."""

from tokenvit_jax.tasks.masks.task import Masks

__all__ = ["Masks"]
