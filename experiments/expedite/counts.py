"""Costs that Expedite reports, as its authors count them and as this package does.

    python -m experiments.expedite.counts

Shapes are traced, nothing is computed and no weights are needed. Writes counts.md here.
"""

import functools

import tokenvit_jax as tv
from experiments.expedite import common
from tokenvit_jax.heads import MaskTransformer
from tokenvit_jax.published_expedite import EXPEDITE, ExpediteCost, counted
from tokenvit_jax.summary import summarize_model
from tokenvit_jax.tasks.segmentation import Segmenter

TITLES = {
    "segmenter": "Segmenter (Tables 2, 3 and 6; released code)",
    "swag": "Classifiers of SWAG (Figure 9; released code)",
    "dpt": "DPT: what is saved, twice the multiply-adds (released code)",
}


@functools.cache
def gmacs(cost: ExpediteCost) -> float:
    """Counts 10^9 multiply-adds of the model of a setting; of DPT of the encoder."""
    plain = tv.create_model(cost.model)
    expedite = cost.clusters and {
        "alpha": cost.alpha,
        "beta": plain.settings.depth - cost.alpha,
        "clusters": cost.clusters,
        # Of a classifier nothing is reconstructed: its head reads [CLS] alone.
        "where": cost.where or "logits",
        "window": cost.window,
        "iterations": cost.iterations,
        "neighbors": cost.neighbors,
    }
    model = plain.clone(
        num_classes=cost.classes,
        patch_size=cost.patch_size,
        position_size=cost.image_size,
        expedite=expedite,
    )
    if cost.network == "segmenter":
        model = Segmenter(model, MaskTransformer(cost.classes, depth=cost.decoder_layers))
    return summarize_model(model, cost.image_size, cost.model).macs / 1e9


def plain_of(cost: ExpediteCost) -> ExpediteCost:
    """Returns the same network without clustering, as its row of EXPEDITE if it has one."""
    same = ("network", "model", "image_size", "classes")
    rows = (row for row in EXPEDITE if row.clusters is None)
    of_network = (row for row in rows if all(getattr(row, f) == getattr(cost, f) for f in same))
    return next(of_network, cost._replace(clusters=None))


def table(network: str) -> list[str]:
    """Returns the lines of one network."""
    lines = [
        "| setting | published | as published | here | part of plain: published | here |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for cost in (cost for cost in EXPEDITE if cost.network == network):
        plain = plain_of(cost)
        here, parts = "", ["", ""]
        if network == "dpt":
            here = f"{2 * (gmacs(plain) - gmacs(cost)):.2f}"
        else:
            here = f"{gmacs(cost):.2f}"
            if cost.clusters is not None:
                published = cost.reported and f"{cost.reported / plain.reported:.1%}"
                parts = [published or "", f"{gmacs(cost) / gmacs(plain):.1%}"]
        cells = [cost.name, cost.reported or "", f"{counted(cost):.2f}", here, *parts]
        lines.append(common.row(cells))
    return lines


def main() -> None:
    lines = [
        "# Expedite: costs of one image",
        "",
        "Written by `python -m experiments.expedite.counts`, 10^9 multiply-adds. As published: by",
        "the rules of the authors' three programs, which `tokenvit_jax.published_expedite` states.",
        "Here: every product of the model that runs, nothing elementwise. What differs:",
        "",
        "- Segmenter: the published count leaves out the products of the attention of the mask",
        "  transformer, those of patches and classes, and the resizing of the logits to pixels,",
        "  which here are products of matrices.",
        "- Clustering: the products here are those of tiles of centres and what is around them,",
        "  more than the window of each token.",
        "- SWAG: the published count adds much that is elementwise, and in every round of the",
        "  clustering the distances of all tokens to all centres.",
        "- DPT: its convolutions and decoder are no part of this package, and cancel in what is",
        "  saved. Of its two maps that are reconstructed, the encoder here has the last.",
    ]
    for network, title in TITLES.items():
        lines += ["", f"## {title}", "", *table(network)]
    common.write("counts", lines)


if __name__ == "__main__":
    main()
