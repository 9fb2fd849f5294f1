"""ClusTR-B on ImageNet-1K (Tables 1 and A2 of ClusTR).

    python -m tokenvit_jax.train --config=configs/clustr_b.py --workdir=runs/clustr_b

Hardware: 8 accelerators (global batch 1024, bfloat16); fewer, or smaller ones, with
--config.accumulate_steps. Expected result: not yet trained (the paper reports 84.1 % top-1).
The recipe is that of the paper's appendix; colour jitter, repeated augmentation and the ends of
the learning rate come from PVTv2, its base. "Dropout" of its table is read as drop path.

    python -m tokenvit_jax.train --config=configs/clustr_b.py:digits --workdir=runs/digits

One shrunk network for all sizes, on the embedded handwritten digits. Hardware: 2 CPU cores, 2
minutes. Expected result: about 98 % test accuracy (one run of clustr_t: 98.6 %).
"""

from tokenvit_jax.recipes import clustr_config


def get_config(arg: str = ""):
    return clustr_config("clustr_b", arg, drop_path=0.3, clip_norm=1.0)
