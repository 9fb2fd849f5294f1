"""Mask R-CNN on COCO, with a ClusTR, DGT, Pale or Swin Transformer.

    python -m tokenvit_jax.train --config=configs/mask_rcnn.py:swin_t --workdir=runs/mask_rcnn \\
        --config.initial.workdir=runs/swin_t

The argument is one of clustr_s, dgt_t, dgt_s, dgt_b, pale_t, pale_s, pale_b, swin_t, swin_s and
swin_b: 12 epochs ("1x") at one size; or of swin_t_3x, swin_s_3x and swin_b_3x: 36 epochs with
random sizes and crops. Training starts from a run of this model on ImageNet-1K at 224 x 224, or
from one that `convert` wrote. Hardware: 8 accelerators in bfloat16, two images each.

Expected result: not yet trained. The papers report, in % AP of boxes and of masks:

    clustr_s 47.0 / 42.5    dgt_t 47.7 / 43.0    pale_t 47.4 / 42.7    swin_t 42.2 / 39.1
                            dgt_s 48.4 / 43.5    pale_s 48.4 / 43.7    swin_s 44.8 / 40.9
                            dgt_b 49.1 / 44.1    pale_b 49.3 / 44.2    swin_b 46.9 / 42.3

and Swin's code 46.0 / 41.6 for swin_t_3x. The recipes are those of the papers, of PVT v2 where
ClusTR names it, and of Swin's code for detection. DGT's supplement, which holds its settings, is
not available: it has Swin's values. Swin's code draws sizes and crops in 12 epochs, too, and
reports 43.7 / 39.8 for it; the papers compare with one size, as here.

    python -m tokenvit_jax.train --config=configs/mask_rcnn.py:scenes --workdir=runs/scenes

A small Swin Transformer with a narrow Mask R-CNN on the embedded scenes. Hardware: 2 CPU cores.
Expected result: 76 % AP of boxes and 79 % of masks on the test scenes (one run: 76.6 and 79.2),
which took 22 minutes beside other programs.
"""

from tokenvit_jax.recipes.detection import mask_rcnn_config


def get_config(arg: str = ""):
    return mask_rcnn_config(arg)
