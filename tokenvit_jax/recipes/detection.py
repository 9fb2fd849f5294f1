"""Recipes of RetinaNet and Mask R-CNN on COCO, and on the embedded scenes."""

from ml_collections import ConfigDict

from tokenvit_jax.tasks import default_config

STEPS_PER_EPOCH = 7330  # 117,266 images in batches of 16
BATCH_SIZE = 16


def scenes_config(head: str) -> ConfigDict:
    """Returns the configuration of a small Swin Transformer with a narrow head on the scenes.

    Args:
      head: name of the head.
    """
    config = default_config("detection")
    config.model = "swin_t"
    config.model_overrides = {
        "dims": (24, 48, 96, 96), "num_heads": (1, 2, 4, 4), "depths": (1, 1, 6, 1),
        "window_size": 8, "drop_path": 0.0, "remat": False,
    }  # fmt: skip
    config.head = head
    narrow = {"channels": 32, "max_detections": 20, "num_candidates": 100}
    own = {
        "mask_rcnn": {"hidden": 128, "num_proposals": 100, "num_anchors": 128, "num_rois": 64},
        "retinanet": {"num_convs": 2},
    }
    config.head_overrides = narrow | own[head]

    config.dataset = "scene_instances"
    config.image_size = 128
    config.batch_size = 16
    config.data.eval_batch_size = 20
    config.data.max_objects = 4

    config.num_steps = 600
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 60
    config.log_every_steps = 50
    config.eval_every_steps = 600
    config.checkpoint_every_steps = 300
    return config
