"""Pale-T on ImageNet-1K (Wu et al. 2022, Table 2).

    python -m tokenvit_jax.train --config=configs/pale_t.py --workdir=runs/pale_t

Hardware: 8 accelerators (global batch 1024, bfloat16); fewer, or smaller ones, with
--config.accumulate_steps. Expected result: not yet trained (the paper reports 83.4 % top-1).
AutoAugment of the paper is RandAugment 9 / 0.5, as in the code of its base, DeiT and Swin.

    python -m tokenvit_jax.train --config=configs/pale_t.py:tokens \\
        --workdir=runs/pale_t_tokens --config.token_labels.teacher=TEACHER

The starred model: MixToken and token labels (the paper reports 84.2 % top-1). TEACHER is the
workdir of a trained model of this project; or --config.token_labels.files=DIRECTORY, written by
`python -m tokenvit_jax.label`.

    python -m tokenvit_jax.train --config=configs/pale_t.py:digits --workdir=runs/digits

One shrunk network for all sizes, on the embedded handwritten digits. Hardware: 2 CPU cores, 2
minutes. Expected result: about 99 % test accuracy (one run of pale_t: 99.2 %).

    python -m tokenvit_jax.train --config=configs/pale_t.py:digits_tokens \\
        --workdir=runs/digits_tokens --config.token_labels.teacher=runs/digits

The same with MixToken and the token labels of that run (pale_t: 99.2 %, 98.9 % with MixToken
alone). Labels from files would need --config.augment.rotation=0 and --config.augment.translation=0.
"""

from tokenvit_jax.recipes import pale_config


def get_config(arg: str = ""):
    return pale_config("pale_t", arg, drop_path=0.1)
