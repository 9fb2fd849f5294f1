"""Monocular depth: the distance of every pixel."""

from tokenvit_jax.tasks.depth.task import Depth

__all__ = ["Depth"]
