"""DGT-T on ImageNet-1K (Liu et al. 2022, Tables 1 and 2).

    python -m tokenvit_jax.train --config=configs/dgt_t.py --workdir=runs/dgt_t

Hardware: 8 accelerators of 32 GB or more (global batch 1024, bfloat16); fewer with
--config.accumulate_steps. Expected result: not yet trained (the paper reports 83.8 % top-1).
The paper's supplement with its settings is not available: this is the recipe of CMT and Swin.

    python -m tokenvit_jax.train --config=configs/dgt_t.py:digits --workdir=runs/digits

The same network, shrunk, on the embedded handwritten digits. Hardware: 2 CPU cores, 2 minutes.
Expected result: 99 % test accuracy (99.7 % measured).
"""

from tokenvit_jax.recipes import dgt_config


def get_config(arg: str = ""):
    return dgt_config("dgt_t", arg, drop_path=0.1)
