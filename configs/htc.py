"""HTC++ on COCO with Swin v2-L.

    python -m tokenvit_jax.train --config=configs/htc.py:swinv2_l --workdir=runs/htc \\
        --config.initial.workdir=runs/swinv2_l

The argument is swinv2_l, with windows of 32 x 32 cells, or swinv2_l_48: 36 epochs with large-scale
jitter at 1536 x 1536 pixels. Training starts from a run of this model on ImageNet-22K at 192 x 192,
or from one that `convert` wrote. The dataset has to be prepared with `stuffthingmaps`. Hardware: 64
images in a step, on 32 accelerators in bfloat16.

Expected result: not yet trained. Swin v2's paper reports, in % AP of boxes and of masks with a
shorter side of 1100 pixels, 58.8 / 51.1 for swinv2_l, 58.9 / 51.2 for swinv2_l_48, and 60.2 / 52.1
at several sizes. The recipe is that of its appendix A2.1, without InstaBoost, which needs
inpainting; the drop path is not stated there. The code of HTC++ is not published: the parts here
are those whose parameters and costs are the published ones.

    python -m tokenvit_jax.train --config=configs/htc.py:scenes --workdir=runs/scenes

A small Swin Transformer with a narrow HTC on the embedded scenes. Hardware: 2 CPU cores. Expected
result: 72 % AP of boxes and 68 % of masks on the test scenes (three seeds: 72.0 ± 2.5 and 68.3 ±
2.9). At the 7 images a second that it reached with both cores free, its steps take 9 minutes.
"""

from tokenvit_jax.recipes.detection import htc_config


def get_config(arg: str = ""):
    return htc_config(arg)
