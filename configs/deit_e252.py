"""DeiT-e252 on ImageNet-1K: DeiT-S with 252 channels; and Token Pooling in it (Marin et al. 2021).

    python -m tokenvit_jax.train --config=configs/deit_e252.py --workdir=runs/deit_e252

The recipe of DeiT (Touvron et al. 2021, Table 9), without distillation. Hardware: 8 accelerators
(global batch 1024, bfloat16); fewer, or smaller ones, with --config.accumulate_steps. Expected
result: not yet trained (Token Pooling reports 77.7 % top-1 after twice the schedule).

    python -m tokenvit_jax.train --config=configs/deit_e252.py:search --workdir=runs/search \\
        --config.initial.workdir=runs/deit_e252
    python -m tokenvit_jax.train --config=configs/deit_e252.py:pooled --workdir=runs/pooled \\
        --config.initial.workdir=runs/search

Stages 2 and 3 of Token Pooling: 30 epochs that find how many tokens every block needs, fewer with a
larger --config.retention.penalty (the paper varies it and does not say how; not yet tried on
ImageNet); then the full schedule with so many. `evaluate` takes the numbers from the workdir:
--workdir=runs/pooled, without --config.

    python -m tokenvit_jax.train --config=configs/deit_e252.py:level3 --workdir=runs/level3 \\
        --config.initial.workdir=runs/deit_e252

Stage 3 with numbers of the paper, level0 (most tokens) to level7 (`published.TOKEN_POOLING` says
what they cost and reached). --config.model_overrides.token_reducer.method names another reducer.

    python -m tokenvit_jax.train --config=configs/deit_e252.py:digits --workdir=runs/digits
    python -m tokenvit_jax.train --config=configs/deit_e252.py:digits_search \\
        --workdir=runs/digits_search --config.initial.workdir=runs/digits
    python -m tokenvit_jax.train --config=configs/deit_e252.py:digits_pooled \\
        --workdir=runs/digits_pooled --config.initial.workdir=runs/digits_search

The three stages of one shrunk network for all sizes, on the embedded handwritten digits. Hardware:
2 CPU cores, 2 minutes each. Expected result: about 96, 98 and 97 % test accuracy (one run of
deit_s: 96.1, 98.6 and 97.5 %, with 15, 7, 5, 5, 5 and 0 of 64 patches after the six blocks).
"""

from tokenvit_jax.recipes import deit_config


def get_config(arg: str = ""):
    return deit_config("deit_e252", arg)
