"""Image classification: one label per image."""

from tokenvit_jax.tasks.classification.task import Classification

__all__ = ["Classification"]
