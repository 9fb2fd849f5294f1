"""Compares parameters and multiply-adds of ClusTR with Tables 1, 6, 7 and A1 of its paper.

    python -m experiments.clustr.tables

Nothing is trained: accuracies are the paper's. Writes tables.md here.
"""

from experiments import pages
from experiments.costs import cost, cost_table, listed, model_table
from tokenvit_jax.published import CLUSTR_ABLATIONS, PUBLISHED

MODELS = ("clustr_t", "clustr_s", "clustr_b")
SINGLE = {"ratios": ((64,), (16,), (4,), (1,))}
GRID = {**SINGLE, "aggregation": "grid"}
# Settings of ClusTR-T for the published rows.
OVERRIDES = {
    "Table 6": {
        "grid (SRA)": GRID,
        # k-NN attention (Wang et al. 2022, KVT) masks logits, which changes neither count.
        "grid (SRA) + kNN attention": GRID,
        "clusters": SINGLE,
    },
    "Table 7": {
        "64, 16, 4, 1": SINGLE,
        "16, 4, 1, 1": {"ratios": ((16,), (4,), (1,), (1,))},
        "{64, 16}, {16, 4}, {4, 1}, 1": {},
    },
}
ARCHITECTURE = {
    "layers": lambda model: listed(model.settings.depths),
    "channels": lambda model: listed(model.settings.dims),
    "heads": lambda model: listed(model.settings.num_heads),
    "token reduction": lambda model: listed(
        f"{{{listed(scales)}}}" for scales in model.settings.ratios
    ),
}
ABOUT = """
Costs are for one image of 224 x 224 pixels. GMACs count all products, including one pass over the
distances between all tokens. "As published" leaves out the same parts as the paper: the clustering
and the attention at the finer scale. Accuracies are the paper's, on ImageNet; none is measured
here. kNN attention is not implemented. It only masks logits, so its row counts the network without
it.
"""


def page() -> list[str]:
    """Returns the lines of the page."""
    lines = [
        *pages.heading(
            "ClusTR: the tables of the paper",
            __file__,
            ABOUT,
        ),
        "",
        "## Table 1",
        "",
        *cost_table(
            "model",
            (cost(f"`{name}`", name, PUBLISHED[name]) for name in MODELS),
            as_published=True,
        ),
    ]
    for table, published in CLUSTR_ABLATIONS.items():
        rows = (
            cost(name, "clustr_t", row, OVERRIDES[table][name]) for name, row in published.items()
        )
        lines += [
            "",
            f"## {table} (ClusTR-T)",
            "",
            *cost_table("attention", rows, as_published=True),
        ]
    return [*lines, "", "## Table A1", "", *model_table(MODELS, ARCHITECTURE)]


if __name__ == "__main__":
    pages.write(__file__, page())
