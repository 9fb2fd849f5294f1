"""Tables 1, 6, 7 and A1 of ClusTR: parameters and multiply-adds beside the published ones.

    python -m experiments.clustr.tables

Nothing is trained: accuracies are the paper's. Writes tables.md here.
"""

from pathlib import Path

import tokenvit_jax as tv
from tokenvit_jax.published import CLUSTR_ABLATIONS, PUBLISHED
from tokenvit_jax.summary import summarize, summarize_model

MODELS = ("clustr_t", "clustr_s", "clustr_b")
SINGLE = {"ratios": ((64,), (16,), (4,), (1,))}
GRID = {**SINGLE, "aggregation": "grid"}
# Of ClusTR-T; what the published rows stand for.
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
HEADER = (
    "| {} | parameters, M | published | GMACs | as published | published | published top-1 |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def row(name: str, summary, published) -> str:
    found = f"{summary.params / 1e6:.3f} | {published.params_m:g} | {summary.macs / 1e9:.3f}"
    counted = f"{summary.macs_as_published / 1e9:.3f} | {published.gmacs:g} | {published.top1}"
    return f"| {name} | {found} | {counted} |"


def architecture() -> list[str]:
    """Table A1 from the models themselves."""
    lines = [
        "| model | layers | channels | heads | token reduction |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in MODELS:
        settings = tv.create_model(name).settings
        columns = (settings.depths, settings.dims, settings.num_heads)
        cells = [", ".join(map(str, column)) for column in columns]
        ratios = ", ".join("{" + ", ".join(map(str, scales)) + "}" for scales in settings.ratios)
        lines.append(f"| `{name}` | {' | '.join(cells)} | {ratios} |")
    return lines


def main() -> None:
    size = (224, 224)
    lines = [
        "# ClusTR: the tables of the paper",
        "",
        "Written by `python -m experiments.clustr.tables`. One image of 224 x 224. GMACs: all",
        "products, one pass over the distances of all tokens included. As published: the paper's",
        "figures leave out the clustering and the attention at the finer scale. Accuracies are the",
        "paper's, on ImageNet; none is measured here. kNN attention is not built; it only masks",
        "logits, so that its row is counted on the network without it.",
        "",
        "## Table 1",
        "",
        HEADER.format("model"),
        *(row(f"`{name}`", summarize(name, size), PUBLISHED[name]) for name in MODELS),
    ]
    for table, rows in CLUSTR_ABLATIONS.items():
        lines += ["", f"## {table} (ClusTR-T)", "", HEADER.format("attention")]
        for name, published in rows.items():
            model = tv.create_model("clustr_t", **OVERRIDES[table][name])
            lines.append(row(name, summarize_model(model, size, "clustr_t"), published))
    lines += ["", "## Table A1", "", *architecture()]
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
