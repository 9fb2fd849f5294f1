"""DPT for monocular depth: the hybrid on KITTI and NYU Depth v2, a small one on embedded scenes.

    python -m tokenvit_jax.train --config=configs/dpt.py:kitti --workdir=runs/dpt_kitti \\
        --config.initial.workdir=runs/dpt
    python -m tokenvit_jax.train --config=configs/dpt.py:nyu --workdir=runs/dpt_nyu \\
        --config.initial.workdir=runs/dpt

Training starts from a run that `convert` wrote from the authors' network for relative depth, or
from the backbone alone, a run of `vit_b_r50` on ImageNet; then use --config.depth.scale=1, because
a decoder that has learnt nothing returns numbers around 1. Hardware: 1 accelerator with 80 GB in
bfloat16, or several. Expected result: not yet trained. The authors report, as the mean over images:

             delta1  delta2  delta3  AbsRel  SqRel   RMSE  RMSElog  SILog  log10
    kitti     0.959   0.995   0.999   0.062  0.222  2.575    0.092  8.282  0.027
    nyu       0.904   0.988   0.998   0.110  0.054  0.357    0.129  9.522  0.045

Scale and shift of the inverse depth are those of the published networks: no depth is above 172.7 m
on KITTI, and above 7.26 m on NYUv2. Learning rates (1e-5 in the backbone, 1e-4 in the decoder) are
those of the paper's first training; it does not state the rates, steps and crops of the
fine-tuning on these datasets. These, the augmentation and 24 epochs of 16 crops are those of public
recipes; the rates fall by half a cosine.

    python -m tokenvit_jax.train --config=configs/dpt.py:scenes --workdir=runs/depth_scenes

A small ViT with a small decoder on the embedded scenes with depth. Hardware: 2 CPU cores; a step
takes 1.8 s of processor time, and the run took 22 minutes next to much other work. Expected result:
an AbsRel of 0.08 on the test scenes (one run: 0.0811, RMSE 1.05 m, delta1 0.918).
"""

from tokenvit_jax.recipes.dpt import dpt_config


def get_config(arg: str = ""):
    return dpt_config(arg)
