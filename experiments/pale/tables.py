"""Tables 1, 2, 7, 8 and 9 of the Pale Transformer: parameters and multiply-adds at 224 x 224.

    python -m experiments.pale.tables

Nothing is trained: accuracies are the paper's. Writes tables.md here.
"""

from pathlib import Path

import tokenvit_jax as tv
from tokenvit_jax.published import PALE_ABLATIONS, PALE_TOKEN_LABELS_TOP1, PUBLISHED
from tokenvit_jax.summary import summarize, summarize_model

MODELS = ("pale_t", "pale_s", "pale_b")
# Of Pale-T; what the published rows stand for.
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
HEADER = (
    "| {} | parameters, M | published | GMACs | published | published top-1 |\n"
    "| --- | --- | --- | --- | --- | --- |"
)


def row(name: str, summary, published, top1="") -> str:
    found = f"{summary.params / 1e6:.3f} | {published.params_m:g} | {summary.macs / 1e9:.3f}"
    return f"| {name} | {found} | {published.gmacs:g} | {published.top1}{top1} |"


def architecture() -> list[str]:
    """Table 1 from the models themselves."""
    lines = [
        "| model | blocks | channels | heads | pale size | MLP ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in MODELS:
        settings = tv.create_model(name).settings
        columns = (settings.depths, settings.dims, settings.num_heads, settings.pale_sizes)
        cells = " | ".join(", ".join(map(str, column)) for column in columns)
        lines.append(f"| `{name}` | {cells} | {settings.mlp_ratio} |")
    return lines


def main() -> None:
    size = (224, 224)
    lines = [
        "# Pale Transformer: the tables of the paper",
        "",
        "Written by `python -m experiments.pale.tables`. One image of 224 x 224. Accuracies are",
        "the paper's, on ImageNet; none is measured here. In Table 2, those after the comma are of",
        "the starred models, with MixToken and token labels.",
        "",
        "## Table 1",
        "",
        *architecture(),
        "",
        "## Table 2",
        "",
        HEADER.format("model"),
    ]
    for name in MODELS:
        starred = f", {PALE_TOKEN_LABELS_TOP1[name]}"
        lines.append(row(f"`{name}`", summarize(name, size), PUBLISHED[name], starred))
    for table, rows in PALE_ABLATIONS.items():
        lines += ["", f"## {table} (Pale-T)", "", HEADER.format(COLUMNS[table])]
        for name, published in rows.items():
            model = tv.create_model("pale_t", **OVERRIDES[table][name])
            lines.append(row(name, summarize_model(model, size, "pale_t"), published))
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
