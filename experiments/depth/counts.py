"""Compares parameters and costs of DPT-hybrid with the published ones, also with clusters.

    python -m experiments.depth.counts

The script only traces shapes; it computes nothing and needs no weights. Writes counts.md here.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import pages
from experiments.expedite.published import EXPEDITE, ExpediteCost, dpt_saving
from tokenvit_jax.heads import DptHead
from tokenvit_jax.layers import AddLayerNorm, GroupNorm, LayerNorm
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.models import create_model
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.tasks.depth.model import Dpt, default_blocks

# What the authors of Expedite report for the network without clusters: twice the 10^9 multiply-adds
# of one image (released code), by height and width.
REPORTED = {(480, 640): 560.2, (352, 1216): 810.0}
ROWS = [cost for cost in EXPEDITE if cost.network == "dpt"]
COLUMNS = ["network", "GMACs", "the same network as published", "2 x as counted there", "reported"]
ABOUT = """
"GMACs" counts every product of the model that runs here, in 10^9 multiply-adds, without
interpolation. It is lower than that of the published network, which computes the same: the product
of the readout with the class token is the same for all tokens, each convolution behind an
upsampling of the decoder commutes with it, and the last layer, with one output, is not a product.
The authors of Expedite count two for each product, and add norms, the scale of the attention and
four for each interpolated value; the clustering is counted as on [this
page](../expedite/counts.md). Their alpha is one less.
"""


class Cost(NamedTuple):
    """Cost of one image.

    Attributes:
      macs: multiply-adds of the products here.
      published_macs: multiply-adds of the products of the published network.
      counted: 10^9 operations as the authors of Expedite count them.
    """

    macs: int
    published_macs: int
    counted: float


def dpt_hybrid(expedite: Expedite | None = None) -> Dpt:
    """Returns the published network, which the released code clusters with copied centres."""
    backbone = create_model("vit_b_r50", expedite=expedite)
    return Dpt(backbone, DptHead(), default_blocks(12, num_taps=2), invert=True)


def expedite_of(cost: ExpediteCost) -> Expedite:
    """Returns the released setting of a row."""
    beta = create_model(cost.model).settings.depth - cost.alpha
    return Expedite(cost.alpha, beta, cost.clusters, temperature=1.0, mode="hard")


def count_parameters(model: Dpt) -> dict[str, int]:
    """Returns the number of parameters of the backbone and of the head."""
    params = variable_shapes(model, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))["params"]
    return {k: sum(math.prod(x.shape) for x in jax.tree.leaves(v)) for k, v in params.items()}


def count(image_size: tuple[int, int], row: ExpediteCost | None = None) -> Cost:
    """Counts the published network, or a row with clusters."""
    model = dpt_hybrid()
    macs, norms = _trace(model, image_size)
    more = _shared_work(model, image_size)
    counted = 2 * (macs + more + norms + _elementwise(model, image_size)) / 1e9
    if row is not None:
        macs, _ = _trace(dpt_hybrid(expedite_of(row)), image_size)
        counted -= dpt_saving(row)
    return Cost(macs, macs + more, counted)


@functools.cache
def _trace(model: Dpt, image_size: tuple[int, int]) -> tuple[int, int]:
    """Returns the multiply-adds of the products, and the values that norms compute."""
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    variables, norms = variable_shapes(model, images), []

    def intercept(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if isinstance(context.module, AddLayerNorm | GroupNorm | LayerNorm):
            norms.append((result[1] if isinstance(result, tuple) else result).size)
        return result

    with nn.intercept_methods(intercept):
        macs = count_macs(lambda v, x: model.apply(v, x, train=False), variables, images)
    return macs, sum(norms)


def _shared_work(model: Dpt, image_size: tuple[int, int]) -> int:
    """Returns the multiply-adds of the published network that are not computed here."""
    patches, dim = math.prod(model.backbone.settings.grid(*image_size)), 768
    readout = len(model.blocks) * (patches - 1) * dim**2
    # Convolutions of 1 x 1 on four times as many cells as here.
    cells = sum(patches * 4**i // 4 for i in range(4))
    last = math.prod(image_size) * model.head.last_channels  # here a sum, not a product
    return readout + 3 * cells * model.head.channels**2 + last


def _elementwise(model: Dpt, image_size: tuple[int, int]) -> int:
    """Returns the elementwise operations that the authors' program counts besides the norms."""
    settings, pixels = model.backbone.settings, math.prod(image_size)
    grid = settings.grid(*image_size)
    patches = math.prod(grid)
    upsampled = model.head.channels * sum(patches * 4**i for i in range(4))
    upsampled += model.head.channels // 2 * pixels
    if grid != settings.grid(*settings.position_size):
        upsampled += patches * settings.dim
    last_norm = (patches + 1) * settings.dim  # of the backbone, which no tap needs
    weights = settings.depth * settings.num_heads * (patches + 1) ** 2
    return 4 * upsampled + last_norm + weights + pixels


def page() -> list[str]:
    """Returns the lines of the page."""
    parameters = count_parameters(dpt_hybrid())
    text = f"""DPT-hybrid has {sum(parameters.values()):,} parameters: {parameters["backbone"]:,} in
        the backbone and {parameters["head"]:,} in the decoder. Published files hold 1,950,696 more,
        on which no depth depends."""
    names = {(480, 640): "NYUv2", (352, 1216): "KITTI"}
    rows = []
    for size, reported in REPORTED.items():
        settings = [row for row in ROWS if row.image_size == size]
        for row in (None, *settings):
            cost = count(size, row)
            clusters = "" if row is None else row.name.split(",")[-1]
            total = reported if row is None else reported - row.reported
            rows.append(
                [
                    f"{names[size]}, {size[0]} x {size[1]}{clusters and ',' + clusters}",
                    f"{cost.macs / 1e9:.3f}",
                    f"{cost.published_macs / 1e9:.3f}",
                    f"{cost.counted:.2f}",
                    f"{total:.1f}",
                ]
            )
    lines = pages.heading("DPT-hybrid: parameters and costs", __file__, ABOUT)
    return [*lines, "", *pages.paragraph(text), "", *pages.table(COLUMNS, rows)]


if __name__ == "__main__":
    pages.write(__file__, page())
