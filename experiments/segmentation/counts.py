"""Compares parameters and costs of UperNet and Semantic FPN with the published ones.

    python -m experiments.segmentation.counts

The script only traces shapes; it computes nothing and needs no weights. Writes counts.md here.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import pages
from tokenvit_jax.heads import UperNet
from tokenvit_jax.heads.upernet import POOL_SIDES
from tokenvit_jax.layers import (
    AddLayerNorm,
    BatchNorm,
    ConditionalPositionEncoding,
    Conv,
    ConvModule,
    DynamicGroupAttention,
    LayerNorm,
    WindowAttention,
)
from tokenvit_jax.layers.conv import FoldedBatchNorm
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.models.dgt import InvertedResidualFFN
from tokenvit_jax.ops.windows import whole_windows
from tokenvit_jax.recipes.semantic_fpn import semantic_fpn_config
from tokenvit_jax.recipes.upernet import upernet_config
from tokenvit_jax.tasks.segmentation.model import Segmenter, make_segmenter

NUM_CLASSES = 150  # of ADE20K
IMAGE_SIZE = (512, 2048)


class Cost(NamedTuple):
    """Size and cost of a model.

    Attributes:
      params: number of parameters, with the auxiliary head.
      macs: multiply-adds of one image at `IMAGE_SIZE`; the auxiliary head computes nothing.
      mmcv_macs: the same as mmcv's counter has it.
    """

    params: int
    macs: int
    mmcv_macs: int


class Published(NamedTuple):
    """Figures of a paper.

    Attributes:
      params_m: parameters [10^6].
      gmacs: "FLOPs" of one image at `IMAGE_SIZE` [10^9]; None: the paper has none.
    """

    params_m: float
    gmacs: int | None


# What the papers of the four backbones report for ADE20K.
PUBLISHED = {
    ("upernet", "clustr_s"): Published(52.5, None),
    ("upernet", "dgt_t"): Published(52.5, 954),
    ("upernet", "dgt_s"): Published(81.9, 1074),
    ("upernet", "dgt_b"): Published(122.2, 1234),
    ("upernet", "pale_t"): Published(52, 996),
    ("upernet", "pale_s"): Published(80, 1135),
    ("upernet", "pale_b"): Published(119, 1311),
    ("upernet", "swin_t"): Published(59.9, 945),
    ("upernet", "swin_s"): Published(81.3, 1038),
    ("upernet", "swin_b"): Published(121, 1188),
    ("semantic_fpn", "clustr_s"): Published(26.4, None),
    ("semantic_fpn", "swin_t"): Published(31.9, None),
}
COLUMNS = [
    "head", "backbone", "parameters", "millions", "published", "GMACs", "as mmcv counts",
    "published",
]  # fmt: skip
ABOUT = """
150 classes; one image of 512 x 2048 pixels. The parameters include the auxiliary head, which
computes nothing outside of training. "GMACs" counts every product of the model that runs, in 10^9
multiply-adds, without interpolation and pooling. mmcv's counter, whose results the papers report as
FLOPs, adds two per element of each norm, one per element of each ReLU, and the biases of
convolutions; it applies the projections of Swin's attention to padded windows, and does not see
DGT's products of queries and centroids.
"""


def model_of(head: str, name: str) -> Segmenter:
    """Returns the model of a shipped recipe for ADE20K."""
    config = {"upernet": upernet_config, "semantic_fpn": semantic_fpn_config}[head](name)
    config.dtype = "float32"
    return make_segmenter(config, NUM_CLASSES, axis_name=None)


def count_parameters(model: nn.Module) -> int:
    """Counts the parameters of a model."""
    shapes = variable_shapes(model, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes["params"]))


def count(model: nn.Module, image_size: tuple[int, int] = IMAGE_SIZE) -> Cost:
    """Counts parameters and multiply-adds of a model."""
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    variables = variable_shapes(model, images)
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))
    more = []

    def intercept(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if context.method_name == "__call__":
            more.append(_only_in_mmcv(context.module, args, result))
        return result

    with nn.intercept_methods(intercept):
        macs = count_macs(lambda v, x: model.apply(v, x, train=False), variables, images)
    return Cost(params, macs, macs + sum(more))


def _only_in_mmcv(module, args, result):
    """Returns the multiply-adds of a module, without its parts, that only mmcv counts."""
    match module:
        case FoldedBatchNorm():
            _, channels, pixels = args[:3]
            return 2 * channels * pixels
        case LayerNorm() | BatchNorm():
            return 2 * result.size
        case AddLayerNorm():
            return 2 * result[1].size
        case ConvModule() | ConditionalPositionEncoding():  # ReLU; bias
            return result.size
        case Conv() | nn.Conv():
            return result.size if module.use_bias else 0
        case InvertedResidualFFN():
            return result.size * (2 * module.ratio + 1)  # biases of three convolutions
        case UperNet():
            return len(POOL_SIDES) * args[0][-1].size  # pooling: one per element
        case WindowAttention():
            x, window = args[:2]
            pairs = zip(whole_windows(x.shape[1:3], window), window, strict=True)
            padded = math.prod(count * side for count, side in pairs)
            return (padded - x.shape[1] * x.shape[2]) * x.shape[0] * x.shape[3] ** 2
        case DynamicGroupAttention():
            is_grouped = module.num_groups and module.top_k < args[0].shape[1]
            return -2 * module.num_groups * args[0].size if is_grouped else 0
    return 0


def row(head: str, name: str) -> list[str]:
    """Returns the cells of a model."""
    counted, published = count(model_of(head, name)), PUBLISHED[head, name]
    return [
        {"upernet": "UperNet", "semantic_fpn": "Semantic FPN"}[head],
        f"`{name}`",
        f"{counted.params:,}",
        f"{counted.params / 1e6:.1f}",
        f"{published.params_m:g}",
        f"{counted.macs / 1e9:.2f}",
        f"{counted.mmcv_macs / 1e9:.2f}",
        "" if published.gmacs is None else f"{published.gmacs}",
    ]


def page() -> list[str]:
    """Returns the lines of the page."""
    lines = pages.heading("Heads on maps: parameters and costs", __file__, ABOUT)
    return [*lines, "", *pages.table(COLUMNS, [row(*key) for key in PUBLISHED])]


if __name__ == "__main__":
    pages.write(__file__, page())
