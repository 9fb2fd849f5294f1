"""Compares parameters and multiply-adds of the Pale Transformer with its paper's tables.

    python -m experiments.pale.tables

The tables are 1, 2, 7, 8 and 9, at 224 x 224 pixels. Nothing is trained: accuracies are the
paper's. Writes tables.md here.
"""

from experiments import pages
from experiments.costs import cost, cost_table, listed, model_table
from tokenvit_jax.published import PALE_ABLATIONS, PALE_TOKEN_LABELS_TOP1, PUBLISHED

MODELS = ("pale_t", "pale_s", "pale_b")
# Settings of Pale-T for the published rows.
OVERRIDES = {
    "Table 7": {size: {"pale_sizes": (size,) * 4} for size in (1, 3, 5, 7, 9)},
    "Table 8": {
        "axial": {"pale_sizes": (1, 1, 1, 1)},
        "cross-shaped": {"mode": "cross"},
        "pale (vanilla)": {"mode": "vanilla"},
        "pale (sequential)": {"mode": "sequential"},
        "pale (parallel)": {"mode": "parallel"},
    },
    "Table 9": {
        "none": {"position": "none"},
        "APE": {"position": "ape"},
        "CPE": {"position": "cpe"},
    },
}
COLUMNS = {"Table 7": "pale size", "Table 8": "attention", "Table 9": "position encoding"}
ARCHITECTURE = {
    "blocks": lambda model: listed(model.settings.depths),
    "channels": lambda model: listed(model.settings.dims),
    "heads": lambda model: listed(model.settings.num_heads),
    "pale size": lambda model: listed(model.settings.pale_sizes),
    "MLP ratio": lambda model: model.settings.mlp_ratio,
}
ABOUT = """
Costs are for one image of 224 x 224 pixels. Accuracies are the paper's, on ImageNet; none is
measured here. In Table 2, the second accuracy belongs to the starred model, trained with MixToken
and token labels.
"""


def page() -> list[str]:
    """Returns the lines of the page."""
    sizes = [cost(f"`{name}`", name, PUBLISHED[name]) for name in MODELS]
    sizes = [
        row._replace(top1=f"{row.top1}, {PALE_TOKEN_LABELS_TOP1[name]}")
        for name, row in zip(MODELS, sizes, strict=True)
    ]
    lines = [
        *pages.heading(
            "Pale Transformer: the tables of the paper",
            __file__,
            ABOUT,
        ),
        "",
        "## Table 1",
        "",
        *model_table(MODELS, ARCHITECTURE),
        "",
        "## Table 2",
        "",
        *cost_table("model", sizes),
    ]
    for table, published in PALE_ABLATIONS.items():
        rows = (
            cost(name, "pale_t", row, OVERRIDES[table][name]) for name, row in published.items()
        )
        lines += ["", f"## {table} (Pale-T)", "", *cost_table(COLUMNS[table], rows)]
    return lines


if __name__ == "__main__":
    pages.write(__file__, page())
