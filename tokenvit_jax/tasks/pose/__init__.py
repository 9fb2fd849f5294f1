"""Top-down pose estimation: the keypoints of a person in a box, from heat maps."""

from tokenvit_jax.tasks.pose.task import Pose

__all__ = ["Pose"]
