"""The detector of torchvision's modules is the one that the benchmark times beside ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.errors import UserError
from tokenvit_jax.measure import torch_peers, torchvision_detectors
from tokenvit_jax.tasks import create_task, default_config

pytestmark = pytest.mark.parity
SIZE = (224, 256)  # no map is smaller than a window
TINY = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}


@pytest.fixture(scope="module")
def work(timm):
    if torch_peers.torchvision_operators() is None:
        pytest.skip("torchvision's operators do not load")
    return torchvision_detectors.mask_rcnn_swin_t(SIZE, **TINY)


def test_number_of_parameters(work):
    config = default_config("detection")
    config.dataset, config.model, config.head = "coco", "swin_t", "mask_rcnn"
    config.model_overrides = {
        "dims": (8, 16, 32, 64),
        "depths": (1,) * 4,
        "num_heads": (1, 1, 2, 2),
    }
    config.image_size = SIZE
    model = create_task(config).make_model()
    x = jnp.zeros((1, *SIZE, 3))
    ours = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))["params"]
    ours = sum(p.size for p in jax.tree.leaves(ours))
    theirs = sum(p.numel() for p in work.module.parameters())
    # They have deltas and a mask of the background, too.
    assert theirs == ours + 4 * (1024 + 1) + (256 + 1)


def test_detections_and_losses(work):
    import torch

    images = torch.randn(2, 3, *SIZE)
    with torch.inference_mode():
        found = work.module.eval()(images)
    assert all(0 < len(image["boxes"]) <= 100 for image in found)
    assert found[0]["masks"].shape[1:] == (1, 28, 28)
    losses = []
    boxes = work.targets(2, None)
    optimizer = torch.optim.SGD(work.module.train().parameters(), 0.01)
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(work.loss(work.module, images, boxes))
        losses[-1].backward()
        optimizer.step()
    assert all(p.grad is not None for p in work.module.parameters())
    assert losses[-1] < losses[0]


def test_masks_fill_their_boxes(work):
    boxes = work.targets(2, None)
    assert boxes.shape == (2, torchvision_detectors.OBJECTS, 4)
    masks = torchvision_detectors._filled(boxes, SIZE)
    sides = (boxes[..., 2:] - boxes[..., :2]).numpy()
    np.testing.assert_allclose(masks.sum((2, 3)), sides.prod(-1), rtol=0.3)


def test_unknown_peers(work):
    with pytest.raises(UserError, match=r"did you mean 'mask_rcnn_swin_t'\?\); valid: mask_rcnn"):
        torchvision_detectors.torchvision_work("mask_rcnn_swin", SIZE, "train")
