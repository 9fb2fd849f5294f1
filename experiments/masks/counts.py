"""Compares parameters and costs of Mask2Former with Swin-L with the published ones.

    python -m experiments.masks.counts

The script only traces shapes; it computes nothing and needs no weights. Writes counts.md here.
"""

import functools
import math

import jax
import jax.numpy as jnp

from experiments import pages
from experiments.masks.published import (
    ADE20K_SEMANTIC,
    BACKBONE_SIZE,
    EXPEDITE,
    NETWORKS,
    PLAIN_GMACS,
    Expedited,
    Network,
    backbone_macs,
    expedite_of,
    model_of,
    network_gmacs,
    semantic_gmacs,
)
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.models.backbone import variable_shapes

COCO_SIZES = ((800, 1088), (800, 1216))
ABOUT = """
Swin-L with windows of 12 and the head of 256 channels, 6 and 9 layers. Costs are in 10^9
multiply-adds. "As published" follows the rules of the released code, which
`experiments.masks.published` describes; "here" counts every product of the model that runs, and no
elementwise work.
"""
BACKBONES = """
Expedite clusters every window of the third stage to 8 x 8 centres. The location is the number of
blocks before the clustering, over all stages, of which the first two have 4. For two of four rows,
the location in the released configuration does not give the reported cost, and one less does. In
every round of the clustering here, products are those of tokens and the centres around them; the
released code multiplies them with all centres of the window.
"""
WHOLE = """
The released program misses the products of queries and keys in cross-attention; enlarged maps and
semantic inference are in the last column only. COCO's published costs are means over the images of
its validation split. The model here cuts off the padding of maps to whole windows before the
last linear layer of attention, and the released code after it; in inference, it computes the masks
and classes of the last prediction only.
"""


def count_parameters(tree) -> int:
    """Counts parameters in a tree of shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@functools.cache
def shapes_of(network: Network):
    """Returns the model of a network, and the shapes of its variables."""
    model = model_of(network)
    return model, variable_shapes(model, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))


def gmacs_here(network: Network, size: tuple[int, int]) -> float:
    """Counts 10^9 multiply-adds of the model in inference, without the semantic sums."""
    model, variables = shapes_of(network)
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    return count_macs(functools.partial(model.apply, train=False), variables, images) / 1e9


def backbone_gmacs_here(row: Expedited | None = None, location: int = 0) -> float:
    """Counts 10^9 multiply-adds of the backbone, with the clustering of a row at a location."""
    model = model_of(NETWORKS[0], row and expedite_of(row, location))
    params = {"params": shapes_of(NETWORKS[0])[1]["params"]["backbone"]}
    images = jax.ShapeDtypeStruct((1, *BACKBONE_SIZE, 3), jnp.float32)
    run = functools.partial(model.backbone.apply, train=False, method="features")
    return count_macs(run, params, images) / 1e9


def parameters() -> list[str]:
    """Returns the table of parameters."""
    rows = []
    for network in NETWORKS:
        params = dict(shapes_of(network)[1]["params"])
        head = params.pop("head")
        parts = params, head["pixel_decoder"], head["decoder"]
        counts = [count_parameters(part) for part in parts]
        reported = network.params_m and f"{network.params_m} M"
        sizes = [f"{count:,}" for count in (*counts, sum(counts))]
        rows.append(
            [network.name, network.num_classes, network.num_queries, *sizes, reported or ""]
        )
    columns = [
        "network", "classes", "queries", "backbone and norms", "pixel decoder", "decoder", "all",
        "published",
    ]  # fmt: skip
    return pages.table(columns, rows)


def backbones() -> list[str]:
    """Returns the table of backbones with clustering."""
    plain = f"{backbone_macs(BACKBONE_SIZE) / 1e9:.2f}"
    rows = [["without clustering", "", f"{backbone_gmacs_here():.2f}", plain, PLAIN_GMACS, ""]]
    for row in EXPEDITE:
        metric, value, before = row.metric
        for location in dict.fromkeys((row.location, row.counted_location)):
            count = backbone_macs(BACKBONE_SIZE, location=location, iterations=row.iterations)
            known = [row.gmacs, f"{metric} {value}, plain {before}"]
            here = f"{backbone_gmacs_here(row, location):.2f}"
            rows.append([row.name, location, here, f"{count / 1e9:.2f}", *known])
    columns = ["setting", "location", "here", "as published", "published", "published accuracy"]
    return pages.table(columns, rows)


def whole() -> list[str]:
    """Returns the table of whole networks."""
    names = {network.name: network for network in NETWORKS}
    size, published = ADE20K_SEMANTIC
    cases = [("ADE20K semantic", size, published)]
    cases += [("COCO panoptic", size, "") for size in COCO_SIZES]
    rows = []
    for name, size, reported in cases:
        network = names[name]
        semantic = f"{semantic_gmacs(size, network):.2f}" if reported else ""
        counts = gmacs_here(network, size), network_gmacs(size, network)
        text = f"{size[0]} x {size[1]}"
        rows.append([name, text, *(f"{count:.2f}" for count in counts), semantic, reported])
    columns = [
        "network", "image", "here", "as published: network", "with semantic inference", "published"
    ]  # fmt: skip
    return pages.table(columns, rows)


def page() -> list[str]:
    """Returns the lines of the page."""
    height, width = BACKBONE_SIZE
    return [
        *pages.heading("Mask2Former: parameters and costs", __file__, ABOUT),
        *("", "## Parameters", "", *parameters()),
        *("", f"## Backbones at {height} x {width}", "", *pages.paragraph(BACKBONES), ""),
        *backbones(),
        *("", "## Whole networks", "", *pages.paragraph(WHOLE), "", *whole()),
    ]


if __name__ == "__main__":
    pages.write(__file__, page())
