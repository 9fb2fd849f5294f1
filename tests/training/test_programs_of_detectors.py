"""The loop compiles a training step and an evaluation step for each canvas, once."""

import collections
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import tiny_detector

from tokenvit_jax.heads import Detections
from tokenvit_jax.models.backbone import Trainable
from tokenvit_jax.tasks.detection.task import Detection
from tokenvit_jax.training import devices
from tokenvit_jax.training.loop import train


class Stub(Trainable):
    """In place of a detector: compiles at once, and depends on images, their sizes and objects."""

    def setup(self):
        self.layer = nn.Dense(4)

    def __call__(self, images, train=False, image_size=None):
        boxes = self.layer(images.mean((1, 2)))[:, None]
        if image_size is not None:
            boxes += image_size[:, None, :1]
        return Detections(boxes, jnp.zeros(boxes.shape[:2], jnp.int32), boxes.mean(-1))

    def losses(self, images, train, targets, keys):
        found = self(images, train, targets.image_size)
        return {"box": abs(found.boxes - targets.boxes).mean((1, 2))}


def test_both_orientations_have_one_program_each(tmp_path, monkeypatch, caplog):
    """Two passes over the images, whose sizes differ, and two evaluations."""
    config = tiny_detector.get_config("retinanet")
    config.batch_size = config.data.eval_batch_size = 8
    config.augment.short_sides = (40, 51, 64)
    config.num_steps, config.eval_every_steps = 8, 4
    monkeypatch.setattr(Detection, "make_model", lambda task: Stub())
    monkeypatch.setattr(Detection, "images_per_group", 1)
    put, sizes = devices.MeshParallel.put_batch, collections.defaultdict(set)

    def put_batch(parallel, batch):
        sizes["boxes" in batch].update(map(tuple, batch["image_size"].tolist()))
        return put(parallel, batch)

    monkeypatch.setattr(devices.MeshParallel, "put_batch", put_batch)
    with jax.log_compiles():
        train(config, tmp_path)
    assert min(map(len, sizes.values())) > 10
    pattern = re.compile(r"Compiling jit\((train_step|eval_step)\).*?uint8\[8,(\d+),(\d+),3\]")
    compiled = collections.Counter(
        found.groups() for found in map(pattern.match, caplog.messages) if found
    )
    names, canvases = ("train_step", "eval_step"), (("64", "96"), ("96", "64"))
    assert compiled == {(name, *canvas): 1 for name in names for canvas in canvases}
