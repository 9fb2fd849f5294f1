"""Counts parameters and costs of the networks for whole-body poses.

    python -m experiments.pose.counts

The script only traces shapes; it computes nothing and needs no weights. Writes counts.md here.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import tokenvit_jax as tv
from experiments import pages
from experiments.pose.published import KEYPOINTS, REPORTED, Reported, layer_macs
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.published import left_out
from tokenvit_jax.recipes.pose import MODELS
from tokenvit_jax.tasks.pose.model import HEADS, PoseModel

NUM_KEYPOINTS = 133
SIZE = (256, 192)


class Cost(NamedTuple):
    """Size and cost of a network.

    Attributes:
      backbone_params: parameters of the backbone, and of the norms of its maps.
      head_params: parameters of neck and head.
      backbone_macs: multiply-adds of the backbone for one crop.
      head_macs: multiply-adds of neck and head.
      left_out_macs: multiply-adds that the paper of the backbone does not count.
    """

    backbone_params: int
    head_params: int
    backbone_macs: int
    head_macs: int
    left_out_macs: int


def count(
    name: str, head: str, num_keypoints: int = NUM_KEYPOINTS, size: tuple[int, int] = SIZE
) -> Cost:
    """Counts parameters and multiply-adds of a backbone with a head."""
    model = PoseModel(tv.create_model(name), HEADS[head](num_keypoints))
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    variables = variable_shapes(model, images)
    params = dict(variables["params"])
    head_params = _count_parameters(params.pop("head"))

    apply = functools.partial(model.apply, train=False)
    macs = count_macs(apply, variables, images)
    counted = macs
    if leave_out := left_out(name):
        counted = count_macs(apply, variables, images, leave_out=leave_out)
    maps = functools.partial(model.backbone.apply, train=False, method="features")
    backbone_variables = {group: x["backbone"] for group, x in variables.items() if "backbone" in x}
    backbone_macs = count_macs(maps, backbone_variables, images)
    return Cost(
        _count_parameters(params), head_params, backbone_macs, macs - backbone_macs, macs - counted
    )


def _count_parameters(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def row(name: str, head: str) -> list[str]:
    """Returns the cells of a network."""
    cost = count(name, head)
    params = cost.backbone_params, cost.head_params, cost.backbone_params + cost.head_params
    macs = cost.backbone_macs + cost.head_macs
    billions = cost.backbone_macs, cost.head_macs, macs, macs - cost.left_out_macs
    return [
        f"`{name}`", f"`{head}`", *(f"{x:,}" for x in params), *(f"{x / 1e9:.2f}" for x in billions)
    ]  # fmt: skip


def reported_row(reported: Reported) -> list[str]:
    """Returns the cells of a network whose figures are published."""
    name, size, params_m, gmacs = reported
    cost = count(name, "deconvolution", KEYPOINTS, size)
    params = cost.backbone_params + cost.head_params
    found, layers = (cost.backbone_macs + cost.head_macs) / 1e9, layer_macs(name, size) / 1e9
    return [
        f"`{name}`", "{} x {}".format(*size), f"{params / 1e6:.1f}", f"{params_m:.1f}",
        f"{found:.2f}", f"{layers:.2f}", f"{gmacs:.1f}", f"{layers - gmacs:+.2f}",
    ]  # fmt: skip


COLUMNS = [
    "model", "head", "parameters: backbone", "head", "all", "GMACs: backbone", "head", "all",
    "as its paper counts",
]  # fmt: skip
REPORTED_COLUMNS = [
    "model", "crop", "parameters, M", "published", "GMACs here", "as published", "published",
    "residual",
]  # fmt: skip
ABOUT = f"""
{NUM_KEYPOINTS} keypoints; one crop of {SIZE[0]} x {SIZE[1]} pixels, without its mirror image.
"GMACs" counts the products of all convolutions, linear layers and attention that run, in 10^9
multiply-adds; norms, activations and interpolation do not count. "Backbone" has the parameters of
the norms of its maps, "head" those of the neck.
"""
NOT_PUBLISHED = """
These rows have no published counterpart. ClusTR's paper, whose Table 5 has results on
COCO-WholeBody, describes neither its neck nor its head, and the table has neither parameters nor
costs. `mta` is the head of TCFormer, whose settings the paper says to share; that it is the one of
the paper is a guess. The last column leaves out the clustering, as the paper does for its
classifiers; other models have nothing to leave out.
"""
ABOUT_REPORTED = """
Swin Transformers with three transposed convolutions, as mmpose trains them for the body alone, and
as MogaNet's authors counted them (README of their pose estimation). "As published" follows the
rules of their tool, mmcv's counter, which `experiments.pose.published` describes: it misses the
products of attention, and counts the padding of maps to whole windows in all layers of attention.
The residual is its difference to the published number, which has one decimal.
"""


def page() -> list[str]:
    """Returns the lines of the page."""
    rows = [row(name, head) for head in HEADS for name in MODELS]
    reported = [*map(reported_row, REPORTED)]
    return [
        *pages.heading("Poses: parameters and costs", __file__, ABOUT), "",
        *pages.table(COLUMNS, rows), "", *pages.paragraph(NOT_PUBLISHED), "",
        f"## Published: {KEYPOINTS} keypoints", "", *pages.paragraph(ABOUT_REPORTED), "",
        *pages.table(REPORTED_COLUMNS, reported),
    ]  # fmt: skip


if __name__ == "__main__":
    pages.write(__file__, page())
