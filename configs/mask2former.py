"""Mask2Former on COCO and ADE20K, with a Swin, ClusTR, DGT or Pale Transformer.

    python -m tokenvit_jax.train --config=configs/mask2former.py:coco_panoptic_swin_l \\
        --workdir=runs/mask2former --config.initial.workdir=runs/swin_l

The argument is TASK_MODEL: coco_panoptic, coco_instance, ade20k_panoptic or ade20k_semantic, and
swin_t, swin_s, swin_b, swin_l, clustr_s, dgt_t or pale_t. Training starts from a run of this model
on ImageNet, or from one that `convert` wrote.

Expected result: not yet trained. Mask2Former's paper reports for swin_l, which starts from
ImageNet-22k at 384 x 384: on COCO 57.8 PQ and 50.1 % mask AP, on ADE20K 48.1 PQ and 56.1 % mIoU.

    python -m tokenvit_jax.train --config=configs/mask2former.py:scenes --workdir=runs/scenes

A small Swin Transformer with a narrow Mask2Former on the embedded scenes; also scenes_instance and
scenes_semantic. Hardware: 2 CPU cores.
Expected result: 56 to 72 % PQ on the test scenes (three seeds: 72.3, 67.1 and 55.6), which took
16 to 23 minutes beside other programs.
"""

from tokenvit_jax.recipes.mask2former import mask2former_config


def get_config(arg: str = ""):
    return mask2former_config(arg)
