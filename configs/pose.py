"""Whole-body pose estimation on COCO-WholeBody, with a ClusTR, DGT, Pale or Swin Transformer.

    python -m tokenvit_jax.train --config=configs/pose.py:clustr_s --workdir=runs/pose \\
        --config.initial.workdir=runs/clustr_s

The argument is one of clustr_t, clustr_s, clustr_b, dgt_t, pale_t and swin_t; training starts from
a run of this model on ImageNet-1K at 224 x 224, or from one that `convert` wrote. Hardware: 8
accelerators in bfloat16, 64 crops each.

Expected result: not yet trained. ClusTR's paper reports for clustr_s, with the boxes of a detector,
AP and AR of 59.4 and 69.7 % for the whole body: 71.4 and 78.8 for the body, 73.3 and 83.8 for the
feet, 66.5 and 75.7 for the face, 55.9 and 67.1 for the hands.

    python -m tokenvit_jax.train --config=configs/pose.py:figures --workdir=runs/figures

A small ClusTR with a narrow head on the embedded figures, which are drawn: these are no results on
people. Hardware: 2 CPU cores.
Expected result (one run): 26 % AP of all keypoints on the test figures, 77 % of the body, 62 % of
the feet, 19 % of the face and 20 % of the hands. At the 32 images a second that it reached beside
other programs, its steps take 8 minutes.
"""

from tokenvit_jax.recipes.pose import pose_config


def get_config(arg: str = ""):
    return pose_config(arg)
