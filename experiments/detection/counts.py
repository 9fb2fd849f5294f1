"""Compares parameters and costs of RetinaNet, Mask R-CNN and HTC++ with the published ones.

    python -m experiments.detection.counts

The script only traces shapes; it computes nothing and needs no weights. Writes counts.md here.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import tokenvit_jax as tv
from experiments import pages
from tokenvit_jax.heads import DetectorHead
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.published import left_out
from tokenvit_jax.tasks.detection.model import HEADS, Detector

NUM_CLASSES = 80  # of COCO
IMAGE_SIZE = (800, 1280)
# With the default keys of 224 x 224 images, DGT's costs would be lower than published; 392 is the
# best round number, and four times the default.
OVERRIDES: dict[str, dict[str, Any]] = {
    name: {"top_k": 392} for name in ("dgt_t", "dgt_s", "dgt_b")
}
OVERRIDES["swinv2_l"] = {"window_size": 32, "pretrained_window_sizes": (12, 12, 12, 6)}
# Expedite in HTC++ on Swin v2-L (Liang et al. 2022, Figure 7): windows of 32 x 32 tokens become
# 23 x 23 centres after block 8 of the third stage, for ten blocks.
EXPEDITE = Expedite(alpha=8, beta=10, clusters=(23, 23))
EXPEDITED_SIZES = ((1024, 1024), (1536, 1536), (800, 1280), (1100, 1600))
PUBLISHED_SAVING = -20  # "nearly 20 % of GFLOPs" [%]; the paper does not say of which image size


class Cost(NamedTuple):
    """Size and cost of a detector.

    Attributes:
      params: number of parameters.
      macs: multiply-adds of one image at `IMAGE_SIZE`, with all proposals and detections.
      macs_as_published: multiply-adds that the paper of the backbone counts.
    """

    params: int
    macs: int
    macs_as_published: int


class Published(NamedTuple):
    """Figures of a paper.

    Attributes:
      params_m: parameters [10^6].
      gmacs: "FLOPs" of one image [10^9]; None: the paper has none.
    """

    params_m: float | None
    gmacs: int | None


# What papers report for COCO.
PUBLISHED = {
    ("retinanet", "clustr_s"): Published(32.4, None),
    ("retinanet", "dgt_t"): Published(None, None),
    ("retinanet", "pale_t"): Published(None, None),
    ("retinanet", "swin_t"): Published(38.5, None),
    ("mask_rcnn", "clustr_s"): Published(42.3, None),
    ("mask_rcnn", "dgt_t"): Published(42, 272),
    ("mask_rcnn", "dgt_s"): Published(70, 386),
    ("mask_rcnn", "dgt_b"): Published(108, 540),
    ("mask_rcnn", "pale_t"): Published(41, 306),
    ("mask_rcnn", "pale_s"): Published(68, 432),
    ("mask_rcnn", "pale_b"): Published(105, 595),
    ("mask_rcnn", "swin_t"): Published(47.8, 264),
    ("mask_rcnn", "swin_s"): Published(69, 354),
    ("mask_rcnn", "swin_b"): Published(107, 496),
    ("htc", "swin_b"): Published(160, 1043),
    ("htc", "swin_l"): Published(284, 1470),
    ("htc", "swinv2_l"): Published(None, None),
}
COLUMNS = [
    "detector", "backbone", "parameters", "millions", "published", "GMACs", "as its paper counts",
    "published", "residual",
]  # fmt: skip
ABOUT = """
80 classes; one image of 800 x 1280 pixels, with 1000 regions in the box head and 100 in the mask
head. "GMACs" counts the products of all convolutions, linear layers and attention that run, in
10^9 multiply-adds; norms, activations, RoIAlign, interpolation and suppression do not count. The
residual is the count as the paper has it, relative to the published one. DGT attends to 392 keys;
`swinv2_l` has windows of 32 x 32 cells. HTC++ has not been published as code: the rows of `swin_b`
and `swin_l` are why its box heads have four convolutions and its neck a transformer block.
"""
EXPEDITED_COLUMNS = [
    "image", "backbone", "clustered", "change", "published", "residual", "with heads", "clustered",
    "change",
]  # fmt: skip
ABOUT_EXPEDITED = """
Multiply-adds of one image [10^9], counted as above: of the backbone `swinv2_l` up to its maps, and
with the heads of HTC++. Clustered: Expedite in the third stage, 32 x 32 tokens of a window to 23 x
23 centres after 8 blocks, for 10 blocks. Figure 7 of the paper is a picture; its text has "nearly
20 %" fewer GFLOPs and no image size. The residual is the difference to 20 % in points. The saving
is that of the backbone, where windows fill the maps.
"""


def model_of(head: str, name: str) -> Detector:
    """Returns a detector for COCO."""
    backbone = tv.create_model(name, **OVERRIDES.get(name, {}))
    return Detector(backbone, HEADS[head](NUM_CLASSES))


def variables_of(model: nn.Module) -> Any:
    """Returns the shapes of the variables of a model."""
    return variable_shapes(model, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))


def count_parameters(variables: Any) -> int:
    """Counts parameters."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))


def count(head: str, name: str, image_size: tuple[int, int] = IMAGE_SIZE) -> Cost:
    """Counts parameters and multiply-adds of a detector."""
    model, images = model_of(head, name), jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    variables = variables_of(model)
    apply = functools.partial(model.apply, train=False)
    macs = count_macs(apply, variables, images)
    leave_out = left_out(name)
    as_published = count_macs(apply, variables, images, leave_out=leave_out) if leave_out else macs
    return Cost(count_parameters(variables), macs, as_published)


def head_macs(head: DetectorHead, image_size: tuple[int, int], dims: tuple[int, ...]) -> int:
    """Counts the multiply-adds of the head of a detector alone.

    Args:
      head: the head.
      image_size: height and width of the image [pixels].
      dims: channels of the four maps.
    """
    maps, strides = _inputs_of(head, image_size, dims)

    def apply(variables, maps):
        return head.apply(variables, maps, strides, jnp.array([image_size]))

    return count_macs(apply, head_variables(head, image_size, dims), maps)


def head_variables(head: DetectorHead, image_size: tuple[int, int], dims: tuple[int, ...]) -> Any:
    """Returns the shapes of the variables of the head of a detector, as in :func:`head_macs`."""
    maps, strides = _inputs_of(head, image_size, dims)
    init = functools.partial(head.init, strides=strides, image_size=jnp.array([image_size]))
    return jax.eval_shape(init, jax.random.key(0), maps)


def _inputs_of(head, image_size, dims):
    """Returns the maps that a head reads, and their strides."""
    first, strides = head.first_map, (4, 8, 16, 32)
    maps = [
        jax.ShapeDtypeStruct((1, *(-(-side // stride) for side in image_size), dim), jnp.float32)
        for stride, dim in zip(strides, dims, strict=True)
    ]
    return maps[first:], strides[first:]


def row(head: str, name: str) -> list[str]:
    """Returns the cells of a detector."""
    counted, published = count(head, name), PUBLISHED[head, name]
    residual = (
        f"{counted.macs_as_published / 1e7 / published.gmacs - 100:+.1f} %"
        if published.gmacs
        else ""
    )
    return [
        {"retinanet": "RetinaNet", "mask_rcnn": "Mask R-CNN", "htc": "HTC++"}[head],
        f"`{name}`",
        f"{counted.params:,}",
        f"{counted.params / 1e6:.1f}",
        "" if published.params_m is None else f"{published.params_m:g}",
        f"{counted.macs / 1e9:.1f}",
        f"{counted.macs_as_published / 1e9:.1f}",
        "" if published.gmacs is None else f"{published.gmacs}",
        residual,
    ]


def backbone_macs(image_size: tuple[int, int], **settings: Any) -> int:
    """Counts the multiply-adds of the maps of Swin v2-L as in HTC++.

    Args:
      image_size: height and width of the image [pixels].
      **settings: further settings of the backbone, such as ``expedite``.
    """
    plain = tv.create_model("swinv2_l", **OVERRIDES["swinv2_l"])
    variables, backbone = variables_of(plain), plain.clone(**settings)
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    maps = functools.partial(backbone.apply, train=False, method="features")
    return count_macs(maps, variables, images)


def expedited_row(image_size: tuple[int, int]) -> list[str]:
    """Returns the cells of an image size."""
    plain, clustered = (
        backbone_macs(image_size, **settings) for settings in ({}, {"expedite": EXPEDITE})
    )
    heads = head_macs(HEADS["htc"](NUM_CLASSES), image_size, (192, 384, 768, 1536))
    saving, whole = (
        100 * (few / many - 1)
        for few, many in ((clustered, plain), (clustered + heads, plain + heads))
    )
    return [
        "{} x {}".format(*image_size),
        f"{plain / 1e9:.1f}",
        f"{clustered / 1e9:.1f}",
        f"{saving:+.1f} %",
        f"{PUBLISHED_SAVING} %",
        f"{saving - PUBLISHED_SAVING:+.1f}",
        f"{(plain + heads) / 1e9:.1f}",
        f"{(clustered + heads) / 1e9:.1f}",
        f"{whole:+.1f} %",
    ]


def page() -> list[str]:
    """Returns the lines of the page."""
    lines = pages.heading("Detectors: parameters and costs", __file__, ABOUT)
    lines += ["", *pages.table(COLUMNS, [row(*key) for key in PUBLISHED])]
    lines += ["", "## Clusters in HTC++ on Swin v2-L", "", *pages.paragraph(ABOUT_EXPEDITED)]
    return [*lines, "", *pages.table(EXPEDITED_COLUMNS, [*map(expedited_row, EXPEDITED_SIZES)])]


if __name__ == "__main__":
    pages.write(__file__, page())
