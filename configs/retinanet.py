"""RetinaNet on COCO, with a ClusTR, DGT, Pale or Swin Transformer.

    python -m tokenvit_jax.train --config=configs/retinanet.py:clustr_s --workdir=runs/retinanet \\
        --config.initial.workdir=runs/clustr_s

The argument is one of clustr_s, dgt_t, pale_t and swin_t; training starts from a run of this model
on ImageNet-1K at 224 x 224, or from one that `convert` wrote. Hardware: 8 accelerators in
bfloat16, two images each.

Expected result: not yet trained. ClusTR's paper reports 45.8 % box AP for clustr_s, and 41.5 % for
swin_t. The other papers do not use RetinaNet; DGT and Pale have their recipes for Mask R-CNN.

    python -m tokenvit_jax.train --config=configs/retinanet.py:scenes --workdir=runs/scenes

A small Swin Transformer with a narrow RetinaNet on the embedded scenes. Hardware: 2 CPU cores.
Expected result: 61 % AP on the test scenes (one run), which took 13 minutes beside other programs.
"""

from tokenvit_jax.recipes.detection import retinanet_config


def get_config(arg: str = ""):
    return retinanet_config(arg)
