"""Semantic FPN on ADE20K, with ClusTR-S or Swin-T.

    python -m tokenvit_jax.train --config=configs/semantic_fpn.py:clustr_s \\
        --workdir=runs/fpn_clustr_s --config.initial.workdir=runs/clustr_s

The argument is clustr_s or swin_t; training starts from a run of this model on ImageNet-1K at 224 x
224, or from one that `convert` wrote. Hardware: 8 accelerators in bfloat16, or one with 80 GB.
Expected result: not yet trained (ClusTR's paper reports 48.0 % mIoU for clustr_s at one scale).

The recipe is ClusTR's (Table A3), also for Swin-T: AdamW, 80,000 steps with 16 crops of 512 x 512
pixels, polynomial decay to 0 with power 0.9 and without warm-up. Weight decay leaves out norms and
biases; the code of PVT, on which the paper builds, applies it to all parameters.

    python -m tokenvit_jax.train --config=configs/semantic_fpn.py:scenes --workdir=runs/scenes

A small Swin Transformer with a small Semantic FPN on the embedded scenes. Hardware: 2 CPU cores.
Expected result: an mIoU of 87 % on the test scenes (one run: 86.7), after about six minutes.
"""

from tokenvit_jax.recipes.semantic_fpn import semantic_fpn_config


def get_config(arg: str = ""):
    return semantic_fpn_config(arg)
