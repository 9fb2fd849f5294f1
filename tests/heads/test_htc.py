"""The hybrid task cascade against mmdetection's: stages, detections, masks and losses."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detectors import golden, maps_of, params_of

from tokenvit_jax.errors import UserError
from tokenvit_jax.heads import Htc, Targets, two_stage
from tokenvit_jax.heads.htc import GlobalBlock
from tokenvit_jax.heads.roi_heads import BoxHead
from tokenvit_jax.heads.rpn import Proposals
from tokenvit_jax.heads.semantic_branch import semantic_sums
from tokenvit_jax.ops.instance_masks import mask_targets, paste_masks

STRIDES = (4, 8, 16, 32, 64)  # of the levels
SETTINGS = {
    "channels": 16, "hidden": 32, "num_stuff": 11, "max_detections": 20, "global_head_dim": 0
}  # fmt: skip
near = np.testing.assert_allclose


def random_params(module, x):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


@functools.cache
def params():
    return params_of(golden("htc_weights") | golden("htc_hidden_layers"))


def test_heads_equal_mmdetections():
    """All stages on given features of regions; masks with the flow between the stages."""
    arrays, head = golden("htc"), Htc(5, **SETTINGS)
    boxes, masks = (arrays[f"heads/in/{kind}_features"] for kind in ("box", "mask"))

    @jax.jit
    def run(boxes, masks):
        bound, flow, found = head.bind({"params": params()}), None, []
        for stage in range(3):
            logits, deltas = bound.box_heads[stage](boxes)
            flow = bound.mask_heads[stage].features(masks, flow)
            found.append((logits, deltas[:, 0], bound.mask_heads[stage].predict(flow)))
        return found

    for stage, found in enumerate(run(boxes, masks)):
        for name, x in zip(("cls", "reg", "mask_logits"), found, strict=True):
            near(x, arrays[f"heads/out/stage{stage}/{name}"], atol=5e-5)


def test_semantic_loss_equals_mmdetections():
    """A mean over all cells: those without a class count in the divisor."""
    arrays = golden("detection_losses")
    # These logits are a map, whose channels the reader has put last.
    labels = arrays["semantic/in/labels"].astype(np.int32)
    labels[labels == 255] = -1
    sums = jax.jit(semantic_sums)(arrays["semantic/in/logits"], labels)
    near(0.2 * sums.sum() / labels.size, arrays["semantic/loss_times_0.2"], atol=1e-6)
    assert (labels < 0).any()


def test_detections_equal_mmdetections():
    """For given proposals: semantic branch, boxes of all stages, soft-NMS and masks."""
    arrays, head = golden("htc"), Htc(5, **SETTINGS)
    size = jnp.asarray(arrays["inference/in/image_shape"], jnp.int32)[None]
    original = tuple(arrays["inference/in/original_shape"].tolist())
    out = {k.removeprefix("inference/out/"): x for k, x in arrays.items()}

    @jax.jit
    def run(levels, proposals):
        apply = functools.partial(head.apply, {"params": params()})
        pyramid = apply(levels, STRIDES, method="pyramid")
        rois = [out[f"stage{stage}/rois"][None] for stage in range(3)]
        stages = [apply(pyramid, x, i, method="_boxes") for i, x in enumerate(rois)]
        found = head.select(apply(pyramid, proposals, size, method="classify"))
        masks = apply(pyramid, found.boxes, found.classes, method="mask_probabilities")
        pasted = paste_masks(masks[0], out["boxes"], original)
        logits = apply(pyramid, found.boxes[:, :2], 2, True, method="_masks")
        return pyramid, stages, found, pasted, logits

    proposals = arrays["inference/in/proposals"][None]
    pyramid, stages, found, masks, logits = run(maps_of(arrays, "inference/in/p"), proposals)
    near(pyramid.semantic[0], out["semantic/logits"], atol=5e-5)
    near(pyramid.semantic[1], out["semantic/feature"], atol=5e-5)
    for stage, (scores, deltas) in enumerate(stages):
        near(scores[0], out[f"stage{stage}/cls"], atol=5e-5)
        near(deltas[0, :, 0], out[f"stage{stage}/reg"], atol=5e-5)
    np.testing.assert_array_equal(found.classes[0], out["labels"])
    near(found.scores[0], out["scores"], atol=1e-5)
    near(found.boxes[0], out["boxes_unscaled"], atol=1e-4)
    for stage, x in enumerate(logits):
        own = np.take_along_axis(x[0], np.asarray(out["labels"])[:2, None, None, None], -1)
        near(own[..., 0], out[f"mask_logits_of_label/stage{stage}"], atol=1e-4)
    expected = np.unpackbits(out["masks_average_of_stages"], axis=-1, count=original[1])
    assert np.sum((masks >= 0.5) != expected.astype(bool)) <= 5


def targets_of(arrays):
    """Returns the objects of the two images, padded to 5; masks are those of the whole canvas."""
    boxes, classes = np.zeros((2, 5, 4), np.float32), np.full((2, 5), -1, np.int32)
    masks = np.zeros((2, 5, 128, 16), np.uint8)
    for i in range(2):
        count = len(arrays[f"loss/in/{i}/labels"])
        for into, name in ((boxes, "boxes"), (classes, "labels"), (masks, "masks")):
            into[i, :count] = arrays[f"loss/in/{i}/{name}"]
    sizes = np.stack([arrays[f"loss/in/{i}/image_shape"] for i in range(2)]).astype(np.int32)
    stuff = arrays["loss/in/semantic"].astype(np.int32)
    return Targets(sizes, boxes, classes, masks, np.where(stuff == 255, -1, stuff))


@pytest.mark.slow
def test_losses_and_gradients_equal_mmdetections(monkeypatch):
    """All proposals count here, so that nothing is drawn."""
    arrays, targets = golden("htc_loss"), targets_of(golden("htc_loss"))
    boxes = np.stack([arrays[f"loss/in/{i}/proposals"] for i in range(2)])
    proposals = Proposals(boxes, np.ones(boxes.shape[:2], np.float32))
    head = Htc(5, num_rois=4 * (boxes.shape[1] + targets.classes.shape[1]), **SETTINGS)

    def of_canvas(masks, frames, rois, size):
        frames = jnp.broadcast_to(jnp.array([0.0, 0.0, 128.0, 128.0]), frames.shape)
        return mask_targets(masks, frames, rois, size=size, max_samples=8)

    monkeypatch.setattr(two_stage, "mask_targets", of_canvas)

    @jax.jit
    def differentiate(levels):
        def total(levels):
            apply = functools.partial(head.apply, {"params": params()})
            pyramid = apply(levels, STRIDES, method="pyramid")
            keys = jax.random.split(jax.random.key(0), 2)
            losses = apply(pyramid, proposals, targets, keys, method="roi_losses")
            return sum(jax.tree.leaves(losses))[0], losses

        return jax.value_and_grad(total, has_aux=True)(levels)

    (_, losses), gradients = differentiate(maps_of(arrays, "loss/in/p"))
    expected = {"semantic": arrays["loss/out/loss_semantic_seg"]}
    for stage in range(3):
        for ours, theirs in (("class", "cls"), ("box", "bbox"), ("mask", "mask")):
            value = arrays[f"loss/out/s{stage}.loss_{theirs}"]
            expected[f"{ours}_{stage + 1}"] = value.reshape(())
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert loss.shape == (1,)  # one group of two images
        near(loss[0], expected[name], atol=2e-6, err_msg=name)
    for gradient, wanted in zip(gradients, maps_of(arrays, "loss/grad/p"), strict=True):
        near(gradient[..., ::4], wanted, atol=1e-6)


def test_box_head_with_two_hidden_layers():
    """Against Mask R-CNN's, whose deltas of one class are those of all here."""
    x = np.random.default_rng(0).normal(size=(3, 7, 7, 4)).astype(np.float32)
    own = BoxHead(2, 8, shared_deltas=True)
    params = random_params(own, x)
    assert {*params} == {"fc1", "fc2", "logits", "deltas"}
    wide = params | {
        "deltas": {
            "kernel": np.tile(params["deltas"]["kernel"], 2),
            "bias": np.tile(params["deltas"]["bias"], 2),
        }
    }
    logits, deltas = own.apply({"params": params}, x)
    of_classes = BoxHead(2, 8).apply({"params": wide}, x)
    near(logits, of_classes[0], atol=1e-6)
    near(np.repeat(deltas, 2, 1), of_classes[1], atol=1e-6)


def naive_block(params, x, head_dim):
    """Returns the result of the transformer block for one image, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * params[name]["scale"] + params[name]["bias"]

    def linear(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    tokens = x.reshape(-1, x.shape[-1]).astype(np.float64)
    qkv = linear(norm(tokens, "norm1"), params["attn"]["qkv"])
    q, k, v = np.split(qkv, 3, -1)
    heads = []
    for start in range(0, x.shape[-1], head_dim):
        part = slice(start, start + head_dim)
        scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(head_dim))
        heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
    tokens = tokens + linear(np.concatenate(heads, -1), params["attn"]["proj"])
    hidden = linear(norm(tokens, "norm2"), params["mlp"]["fc1"])
    gelu = np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)
    tokens = tokens + linear(gelu(hidden), params["mlp"]["fc2"])
    return norm(tokens, "norm3").reshape(x.shape)


def test_block_on_the_coarsest_map():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 6)).astype(np.float32)
    block = GlobalBlock(2)
    params = random_params(block, x)
    found = jax.jit(block.apply)({"params": params}, x)
    for image, expected in zip(found, x, strict=True):
        near(image, naive_block(params, expected, 2), atol=1e-5)
    with pytest.raises(UserError, match=r"^global_head_dim=4 does not divide the 6 channels"):
        jax.eval_shape(GlobalBlock(4).init, jax.random.key(0), x)


def test_regions_of_a_stage_are_those_of_the_last_one_moved():
    """Without the objects, which are candidates in every sample of their own."""
    head = Htc(2, channels=4, num_rois=16, max_detections=1)
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 16, (1, 6, 2))
    proposals = Proposals(
        np.concatenate([low, low + 12], -1).astype(np.float32),
        np.array([[1, 1, 1, 1, 1, -1.0]]),
    )
    boxes = proposals.boxes[:, :3] + 0.5
    targets = Targets(np.array([[30, 20]]), boxes, np.array([[0, 1, -1]], np.int32))
    rois = head.sample_rois(proposals, targets, jax.random.split(jax.random.key(0), 1), 0.5)
    found = {tuple(box) for box in np.asarray(rois.boxes[rois.valid])}
    assert found == {*map(tuple, proposals.boxes[0, :5]), *map(tuple, boxes[0, :2])}
    deltas = jnp.zeros((1, 16, 1, 4)).at[..., 0].set(2.0)
    moved = head._refined(rois, deltas, jnp.array([[30, 20]]), 1)
    found = np.sort(moved.boxes[moved.scores >= 0], 0)
    expected = proposals.boxes[0, :5] + np.array([1.2, 0, 1.2, 0])  # 2 * 0.05 of a side of 12
    expected[:, ::2] = expected[:, ::2].clip(0, 20)
    near(found, np.sort(expected, 0), atol=1e-5)
