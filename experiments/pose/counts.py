"""Counts parameters and costs of the networks for whole-body poses.

    python -m experiments.pose.counts

The script only traces shapes; it computes nothing and needs no weights. Writes counts.md here.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import pages
from experiments.runs import make_model
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.published import left_out
from tokenvit_jax.recipes.pose import MODELS, whole_body_config
from tokenvit_jax.tasks.pose.model import HEADS

SIZE = (256, 192)


class Cost(NamedTuple):
    """Size and cost of a network.

    Attributes:
      backbone_params: parameters of the backbone, and of the norms of its maps.
      head_params: parameters of neck and head.
      backbone_macs: multiply-adds of the backbone for one crop of `SIZE`.
      head_macs: multiply-adds of neck and head.
      left_out_macs: multiply-adds that the paper of the backbone does not count.
    """

    backbone_params: int
    head_params: int
    backbone_macs: int
    head_macs: int
    left_out_macs: int


def count(name: str, head: str) -> Cost:
    """Counts parameters and multiply-adds of a backbone with a head."""
    config = whole_body_config(name)
    config.head = head
    model, images = make_model(config), jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32)
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


COLUMNS = [
    "model", "head", "parameters: backbone", "head", "all", "GMACs: backbone", "head", "all",
    "as its paper counts",
]  # fmt: skip
ABOUT = f"""
133 keypoints; one crop of {SIZE[0]} x {SIZE[1]} pixels, without its mirror image. "GMACs" counts
the products of all convolutions, linear layers and attention that run, in 10^9 multiply-adds;
norms, activations and interpolation do not count. "Backbone" has the parameters of the norms of its
maps, "head" those of the neck.
"""
NOT_PUBLISHED = """
There is nothing published to compare these numbers with. ClusTR's paper, whose Table 5 has the only
results of one of these backbones on COCO-WholeBody, describes neither its neck nor its head, and
the table has neither parameters nor costs. `mta` is the head of TCFormer, whose settings the paper
says to share; that it is the one of the paper is a guess. The last column leaves out the
clustering, as the paper does for its classifiers; other models have nothing to leave out.
"""


def page() -> list[str]:
    """Returns the lines of the page."""
    rows = [row(name, head) for head in HEADS for name in MODELS]
    lines = pages.heading("Poses: parameters and costs", __file__, ABOUT)
    return [*lines, "", *pages.table(COLUMNS, rows), "", *pages.paragraph(NOT_PUBLISHED)]


if __name__ == "__main__":
    pages.write(__file__, page())
