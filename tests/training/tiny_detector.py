"""Configuration of a detector that trains in seconds; the argument is the name of its head."""

from ml_collections import ConfigDict

from tokenvit_jax.tasks import default_config

HEADS = {
    "mask_rcnn": {
        "hidden": 8, "num_mask_convs": 1, "num_proposals": 30, "num_anchors": 16, "num_rois": 8
    },
    "retinanet": {"num_convs": 1, "score_threshold": 0.0},
}  # fmt: skip


def get_config(head: str) -> ConfigDict:
    """Returns the configuration."""
    config = default_config("detection")
    config.dataset, config.image_size = "tests.upright_scenes", (64, 96)
    config.model = "swin_t"
    config.model_overrides = ConfigDict({
        "dims": (4, 4, 8, 8), "num_heads": (1, 1, 1, 1), "depths": (0, 0, 1, 0),
        "mlp_ratio": 1, "window_size": 2,
    })  # fmt: skip
    config.head = head
    common = {"channels": 4, "init_std": 0.05, "num_candidates": 30, "max_detections": 20}
    config.head_overrides = ConfigDict(common | HEADS[head])
    config.data.max_objects = 5
    config.data.workers = 0
    config.batch_size = config.data.eval_batch_size = 16
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.01
    config.optimizer.warmup_steps = 0
    config.log_every_steps = 1
    return config
