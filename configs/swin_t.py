"""Swin-T on ImageNet-1K (Liu et al. 2021, Table 1a).

    python -m tokenvit_jax.train --config=configs/swin_t.py --workdir=runs/swin_t

Hardware: 8 accelerators (global batch 1024, bfloat16); fewer, or smaller ones, with
--config.accumulate_steps. Expected result: not yet trained (the paper reports 81.3 % top-1).

    python -m tokenvit_jax.train --config=configs/swin_t.py:digits --workdir=runs/digits

One shrunk network for all sizes, with windows of 4, on the embedded handwritten digits. Hardware: 2
CPU cores, a few minutes. Expected result: about 98 % test accuracy (one run of swin_t: 98.1 %).
"""

from tokenvit_jax.recipes import swin_config


def get_config(arg: str = ""):
    return swin_config("swin_t", arg, drop_path=0.2)
