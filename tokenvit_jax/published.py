"""Numbers that papers report of their models: the one place where they are written down."""

from typing import NamedTuple


class Published(NamedTuple):
    """ImageNet-1K classification at 224 x 224.

    params_m: millions of parameters; gmacs: 10^9 multiply-adds (papers say FLOPs) of one image;
    top1: accuracy on the validation split, percent; source: paper and table.
    """

    params_m: float
    gmacs: float
    top1: float
    source: str


# Table 1 has more digits than Table 2 but says nothing of DGT-T.
_DGT = "Liu et al. 2022, Dynamic Group Transformer"
PUBLISHED = {
    "dgt_t": Published(24.0, 4.3, 83.8, f"{_DGT}, Table 2"),
    "dgt_s": Published(51.76, 9.41, 84.6, f"{_DGT}, Tables 1 and 2"),
    "dgt_b": Published(90.28, 16.4, 85.0, f"{_DGT}, Tables 1 and 2"),
}
