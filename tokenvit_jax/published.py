"""Numbers that papers report of their models: the one place where they are written down."""

from typing import NamedTuple


class Published(NamedTuple):
    """ImageNet-1K classification at 224 x 224.

    params_m: millions of parameters; gmacs: 10^9 multiply-adds (papers say FLOPs) of one image, or
    None where they are not given; top1: accuracy on the validation split, percent; source: paper
    and table.
    """

    params_m: float
    gmacs: float | None
    top1: float
    source: str


_DEIT = "Touvron et al. 2021, DeiT, Table 5"
_CLUSTR = "ClusTR (anonymous, under review), Table 1"
_PALE = "Wu et al. 2022, Pale Transformer, Table 2"
# Table 1 has more digits than Table 2 but says nothing of DGT-T.
_DGT = "Liu et al. 2022, Dynamic Group Transformer"
PUBLISHED = {
    "clustr_t": Published(11.7, 2.2, 80.2, _CLUSTR),
    "clustr_s": Published(22.7, 4.8, 83.2, _CLUSTR),
    "clustr_b": Published(40.2, 7.5, 84.1, _CLUSTR),
    "deit_ti": Published(5, None, 72.2, _DEIT),
    "deit_s": Published(22, None, 79.8, _DEIT),
    "deit_b": Published(86, None, 81.8, _DEIT),
    "dgt_t": Published(24.0, 4.3, 83.8, f"{_DGT}, Table 2"),
    "dgt_s": Published(51.76, 9.41, 84.6, f"{_DGT}, Tables 1 and 2"),
    "dgt_b": Published(90.28, 16.4, 85.0, f"{_DGT}, Tables 1 and 2"),
    "pale_t": Published(22, 4.2, 83.4, _PALE),
    "pale_s": Published(48, 9.0, 84.3, _PALE),
    "pale_b": Published(85, 15.6, 84.9, _PALE),
}

# Ablations: table -> row -> what the paper reports. ClusTR-T for 100 epochs.
CLUSTR_ABLATIONS = {
    "Table 6": {
        "grid (SRA)": Published(13.2, 2.1, 76.7, "Table 6"),
        "grid (SRA) + kNN attention": Published(13.2, 2.1, 76.8, "Table 6"),
        "clusters": Published(10.8, 2.0, 77.2, "Table 6"),
    },
    "Table 7": {
        "64, 16, 4, 1": Published(10.8, 2.0, 77.2, "Table 7"),
        "16, 4, 1, 1": Published(10.8, 2.1, 77.4, "Table 7"),
        "{64, 16}, {16, 4}, {4, 1}, 1": Published(11.7, 2.2, 77.9, "Table 7"),
    },
}
# Pale-T.
PALE_ABLATIONS = {
    "Table 7": {
        1: Published(22, 3.8, 82.4, "Table 7"),
        3: Published(22, 4.1, 82.9, "Table 7"),
        5: Published(22, 4.4, 83.1, "Table 7"),
        7: Published(22, 4.2, 83.4, "Table 7"),
        9: Published(22, 5.4, 83.3, "Table 7"),
    },
    "Table 8": {
        "axial": Published(22, 3.8, 82.4, "Table 8"),
        "cross-shaped": Published(22, 4.2, 82.8, "Table 8"),
        "pale (vanilla)": Published(22, 5.4, 83.4, "Table 8"),
        "pale (sequential)": Published(22, 4.2, 82.9, "Table 8"),
        "pale (parallel)": Published(22, 4.2, 83.4, "Table 8"),
    },
    "Table 9": {
        "none": Published(22, 4.2, 82.5, "Table 9"),
        "APE": Published(22, 4.2, 82.9, "Table 9"),
        "CPE": Published(22, 4.2, 83.4, "Table 9"),
    },
}
# Top-1 of the models trained with MixToken and token labels: Table 2, starred.
PALE_TOKEN_LABELS_TOP1 = {"pale_t": 84.2, "pale_s": 85.0, "pale_b": 85.8}

# What a paper's own multiply-adds leave out: operators, and scopes that layers name. ClusTR counts
# neither the clustering nor the attention at the finer scale.
LEFT_OUT = {
    "clustr": ("_density_peaks", "merge_tokens", "fine_scale"),
}


def left_out(model: str) -> tuple[str, ...]:
    """Returns what the paper of a model does not count, of :data:`LEFT_OUT`."""
    return LEFT_OUT.get(model.split("_")[0], ())
