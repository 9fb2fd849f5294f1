"""Object detection and instance segmentation: boxes, and masks, of objects."""

from tokenvit_jax.tasks.detection.task import Detection

__all__ = ["Detection"]
