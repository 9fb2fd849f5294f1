"""DGT-B on ImageNet-1K (Liu et al. 2022, Tables 1 and 2).

    python -m tokenvit_jax.train --config=configs/dgt_b.py --workdir=runs/dgt_b

Hardware: 8 accelerators of 80 GB or more (global batch 1024, bfloat16); fewer with
--config.accumulate_steps. Expected result: not yet trained (the paper reports 85.0 % top-1).
The paper's supplement with its settings is not available: this is the recipe of CMT and Swin.

    python -m tokenvit_jax.train --config=configs/dgt_b.py:digits --workdir=runs/digits_b

The same network (residual post-norm, cosine attention), shrunk, on the embedded handwritten
digits. Hardware: 2 CPU cores, 2 minutes. Expected result: see experiments/dgt.
"""

from tokenvit_jax.recipes import dgt_config


def get_config(arg: str = ""):
    return dgt_config("dgt_b", arg, drop_path=0.5)
