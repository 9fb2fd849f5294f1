"""SwinV2-S with windows of 8 for 256 x 256 pixels, on ImageNet-1K (Liu et al. 2022).

    python -m tokenvit_jax.train --config=configs/swinv2_s.py --workdir=runs/swinv2_s

Hardware: 8 accelerators (global batch 1024, bfloat16); fewer, or smaller ones, with
--config.accumulate_steps. Expected result: not yet trained.

    python -m tokenvit_jax.train --config=configs/swinv2_s.py:digits --workdir=runs/digits

One shrunk network for all sizes, with windows of 4, on the embedded handwritten digits. Hardware: 2
CPU cores, a few minutes. Expected result: about 99 % test accuracy (one run of swinv2_t: 98.9 %).
"""

from tokenvit_jax.recipes import swin_config


def get_config(arg: str = ""):
    return swin_config("swinv2_s", arg, drop_path=0.3)
