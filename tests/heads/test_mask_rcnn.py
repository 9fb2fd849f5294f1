"""Mask R-CNN against mmdetection's: maps, proposals, detections, masks, losses and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from detectors import golden, maps_of, params_of

from tokenvit_jax.heads import MaskRcnn, Targets, two_stage
from tokenvit_jax.heads.roi_heads import BoxHead, MaskHead
from tokenvit_jax.heads.rpn import Proposals, Rpn, level_anchors, propose
from tokenvit_jax.heads.two_stage import Pyramid
from tokenvit_jax.ops.instance_masks import mask_targets, paste_masks

STRIDES = (4, 8, 16, 32, 64)  # of the levels
SETTINGS = {
    "channels": 16, "hidden": 32, "num_candidates": 80, "num_proposals": 48, "max_detections": 20,
}  # fmt: skip
near = np.testing.assert_allclose


def test_box_head_equals_mmdetections():
    arrays = golden("mask_rcnn")
    params = params_of(arrays, "box_head/w/")["box_head"]
    logits, deltas = jax.jit(BoxHead(5, 32).apply)({"params": params}, arrays["box_head/in"])
    near(logits, arrays["box_head/out/cls"], atol=5e-5)
    near(deltas.reshape(-1, 20), arrays["box_head/out/reg"], atol=5e-5)


def test_mask_head_equals_mmdetections():
    arrays = golden("mask_rcnn")
    params = params_of(arrays, "mask_head/w/")["mask_head"]
    logits = jax.jit(MaskHead(5, 16).apply)({"params": params}, arrays["mask_head/in"])
    near(logits, arrays["mask_head/out"], atol=5e-5)


def test_maps_of_the_proposal_network_equal_mmdetections():
    arrays = golden("mask_rcnn")
    params = params_of(arrays)["rpn"]
    outputs = jax.jit(Rpn(16).apply)({"params": params}, maps_of(arrays, "rpn/in/p"))
    for kind, found in zip(("cls", "reg"), outputs, strict=True):
        for level, expected in zip(found, maps_of(arrays, f"rpn/out/{kind}"), strict=True):
            near(level, expected.reshape(level.shape), atol=1e-5)


def test_detections_equal_mmdetections():
    arrays, head = golden("mask_rcnn"), MaskRcnn(5, **SETTINGS)
    size = jnp.asarray(arrays["inference/in/image_shape"], jnp.int32)[None]
    out = {k.rpartition("/")[2]: x for k, x in arrays.items() if k.startswith("inference/out")}
    original = tuple(arrays["inference/in/original_shape"].tolist())

    @jax.jit
    def detect(params, levels):
        anchors = level_anchors([x.shape[1:3] for x in levels], STRIDES)
        outputs = Rpn(16).apply({"params": params["rpn"]}, levels)
        proposals = propose(outputs, anchors, size, per_level=80, num=48)
        found = head.apply({"params": params}, levels, STRIDES, size, method="detect")
        return proposals, found, paste_masks(found.masks[0], out["boxes"], original)

    proposals, found, masks = detect(params_of(arrays), maps_of(arrays, "inference/in/p"))
    near(proposals.boxes[0], out["proposals"], atol=2e-4)
    near(proposals.scores[0], out["proposal_scores"], atol=1e-6)
    np.testing.assert_array_equal(found.classes[0], out["labels"])
    near(found.scores[0], out["scores"], atol=1e-5)
    near(found.boxes[0], out["boxes_unscaled"], atol=2e-4)
    expected = np.unpackbits(out["masks"], axis=-1, count=original[1]).astype(bool)
    assert np.sum((masks >= 0.5) != expected) <= 5


def targets_of(arrays):
    """Returns the objects of the two images of mmdetection's losses, padded to 5.

    The masks are those of the whole canvas.
    """
    boxes, classes = np.zeros((2, 5, 4), np.float32), np.full((2, 5), -1, np.int32)
    masks = np.zeros((2, 5, 128, 16), np.uint8)
    for i in range(2):
        count = len(arrays[f"loss/in/{i}/labels"])
        for into, name in ((boxes, "boxes"), (classes, "labels"), (masks, "masks")):
            into[i, :count] = arrays[f"loss/in/{i}/{name}"]
    sizes = np.stack([arrays[f"loss/in/{i}/image_shape"] for i in range(2)]).astype(np.int32)
    return Targets(sizes, boxes, classes, masks)


def test_losses_and_gradients_equal_mmdetections(monkeypatch):
    """All anchors and proposals count here, so that nothing is drawn."""
    arrays = golden("mask_rcnn")
    params, targets = params_of(arrays), targets_of(arrays)
    boxes = np.stack([arrays[f"loss/in/{i}/proposals"] for i in range(2)])
    proposals = Proposals(boxes, np.ones(boxes.shape[:2], np.float32))
    levels = maps_of(arrays, "loss/in/p")
    num_anchors = sum(3 * x.shape[1] * x.shape[2] for x in levels)
    num_candidates = boxes.shape[1] + targets.classes.shape[1]
    head = MaskRcnn(5, num_anchors=2 * num_anchors, num_rois=4 * num_candidates, **SETTINGS)

    def of_canvas(masks, frames, rois, size):
        frames = jnp.broadcast_to(jnp.array([0.0, 0.0, 128.0, 128.0]), frames.shape)
        return mask_targets(masks, frames, rois, size=size, max_samples=8)

    monkeypatch.setattr(two_stage, "mask_targets", of_canvas)

    @jax.jit
    def differentiate(levels):
        apply = functools.partial(head.apply, {"params": params})
        keys = jax.random.split(jax.random.key(0), 2)

        def total(levels):
            pyramid = Pyramid(levels, STRIDES)
            losses, _ = apply(pyramid, targets, keys, method="rpn_losses")
            losses |= apply(pyramid, proposals, targets, keys, method="roi_losses")
            return sum(jax.tree.leaves(losses))[0], losses

        return jax.value_and_grad(total, has_aux=True)(levels)

    (_, losses), gradients = differentiate(levels)
    expected = {
        "rpn_object": arrays["loss/out/loss_rpn_cls_per_level"].sum(),
        "rpn_box": arrays["loss/out/loss_rpn_bbox_per_level"].sum(),
        "class": arrays["loss/out/loss_cls"],
        "box": arrays["loss/out/loss_bbox"],
        "mask": arrays["loss/out/loss_mask"][0],
    }
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert loss.shape == (1,)  # one group of two images
        near(loss[0], expected[name], atol=2e-6, err_msg=name)
    for gradient, wanted in zip(gradients, maps_of(arrays, "loss/grad/p"), strict=True):
        near(gradient[..., ::4], wanted, atol=2e-7)


def test_first_weights():
    """Kaiming normal by the fan out in the mask head, the deconvolution's kernel included."""
    box, mask = jax.jit(
        lambda: (
            BoxHead(20, 128).init(jax.random.key(0), jnp.zeros((1, 7, 7, 8)))["params"],
            MaskHead(20, 64).init(jax.random.key(1), jnp.zeros((1, 2, 2, 64)))["params"],
        )
    )()
    expected = [
        (mask["conv1"], (2 / (9 * 64)) ** 0.5), (mask["upsample"], (2 / (4 * 64)) ** 0.5),
        (mask["logits"], (2 / 20) ** 0.5), (box["logits"], 0.01), (box["deltas"], 0.001),
        (box["fc1"], (2 / (7 * 7 * 8 + 128)) ** 0.5),
    ]  # fmt: skip
    for layer, deviation in expected:
        near(layer["kernel"].std(), deviation, rtol=0.05)
        assert not layer["bias"].any()
