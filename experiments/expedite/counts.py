"""Compares the costs that Expedite reports with counts by its authors' rules and by this package.

    python -m experiments.expedite.counts

The script only traces shapes; it computes nothing and needs no weights. Writes counts.md here.
"""

import functools

import tokenvit_jax as tv
from experiments import pages
from experiments.costs import count_macs
from experiments.expedite.published import EXPEDITE, TEMPERATURE, ExpediteCost, counted
from tokenvit_jax.heads import MaskTransformer
from tokenvit_jax.tasks.segmentation.model import Segmenter

TITLES = {
    "segmenter": "Segmenter (Tables 2, 3 and 6; released code)",
    "swag": "Classifiers of SWAG (Figure 9; released code)",
    "dpt": "DPT: saved cost, twice the multiply-adds (released code)",
}
COLUMNS = ["setting", "published", "as published", "here", "share of plain: published", "here"]
ABOUT = """
Costs are in 10^9 multiply-adds. "As published" follows the rules of the authors' three programs,
which `experiments.expedite.published` describes. "Here" counts every product of the model that
runs, and no elementwise work. The counts differ in these points:
"""
DIFFERENCES = """\
- Segmenter: the published count leaves out the products in the attention of the mask transformer,
  the products of patches and classes, and the resizing of the logits to pixels, which is a product
  of matrices here.
- Clustering: the products here are between tiles of centres and the tokens around them, which is
  more than the window of each token.
- SWAG: the published count adds many elementwise operations, and in every round of the clustering
  the distances between all tokens and all centres.
- DPT: its convolutions and decoder cancel in the saved cost; [depth](../depth/counts.md) counts the
  whole network. DPT reconstructs two maps; the encoder here has only the last one.
"""


@functools.cache
def gmacs(cost: ExpediteCost) -> float:
    """Counts 10^9 multiply-adds of the model of a setting; for DPT, only the encoder."""
    plain = tv.create_model(cost.model)
    expedite = cost.clusters and {
        "alpha": cost.alpha,
        "beta": plain.settings.depth - cost.alpha,
        "clusters": cost.clusters,
        # A classifier reconstructs nothing, because its head reads only the class token.
        "where": cost.where or "logits",
        "window": cost.window,
        "iterations": cost.iterations,
        "neighbors": cost.neighbors,
        "temperature": TEMPERATURE,
    }
    model = plain.clone(
        num_classes=cost.classes,
        patch_size=cost.patch_size,
        position_size=cost.image_size,
        expedite=expedite,
    )
    if cost.network == "segmenter":
        model = Segmenter(model, MaskTransformer(cost.classes, depth=cost.decoder_layers))
    return count_macs(model, cost.image_size) / 1e9


def plain_of(cost: ExpediteCost) -> ExpediteCost:
    """Returns the same network without clustering: its row of EXPEDITE, if there is one."""
    same = ("network", "model", "image_size", "classes")
    rows = (row for row in EXPEDITE if row.clusters is None)
    own = (row for row in rows if all(getattr(row, f) == getattr(cost, f) for f in same))
    return next(own, cost._replace(clusters=None))


def row(cost: ExpediteCost) -> list[str]:
    """Returns the cells of a setting."""
    plain = plain_of(cost)
    published, here, shares = cost.reported or "", gmacs(cost), ["", ""]
    if cost.network == "dpt":
        here = 2 * (gmacs(plain) - here)
    elif cost.clusters is not None:
        reported = cost.reported and f"{cost.reported / plain.reported:.1%}"
        shares = [reported or "", f"{here / gmacs(plain):.1%}"]
    return [cost.name, published, f"{counted(cost):.2f}", f"{here:.2f}", *shares]


def page() -> list[str]:
    """Returns the lines of the page."""
    lines = [*pages.heading("Expedite: costs of one image", __file__, ABOUT), ""]
    lines += DIFFERENCES.splitlines()
    for network, title in TITLES.items():
        rows = [row(cost) for cost in EXPEDITE if cost.network == network]
        lines += ["", f"## {title}", "", *pages.table(COLUMNS, rows)]
    return lines


if __name__ == "__main__":
    pages.write(__file__, page())
