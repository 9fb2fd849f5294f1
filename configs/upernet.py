"""UperNet on ADE20K, with a ClusTR, DGT, Pale or Swin Transformer.

    python -m tokenvit_jax.train --config=configs/upernet.py:swin_t --workdir=runs/upernet_swin_t \\
        --config.initial.workdir=runs/swin_t

The argument is one of clustr_s, dgt_t, dgt_s, dgt_b, pale_t, pale_s, pale_b, swin_t, swin_s and
swin_b; training starts from a run of this model on ImageNet-1K at 224 x 224, or from one that
`convert` wrote. Hardware: 8 accelerators in bfloat16, or one with 80 GB for the sizes T and S.

Expected result: not yet trained. The papers report, in % mIoU at one scale, and at several with
flip:

    clustr_s 49.6          dgt_t 50.2 / 50.8      pale_t 50.4 / 51.2     swin_t 44.5 / 45.8
                           dgt_s 50.8 / 51.6      pale_s 51.2 / 52.2     swin_s 47.6 / 49.5
                           dgt_b 51.2 / 51.8      pale_b 52.2 / 53.0     swin_b 48.1 / 49.7

The recipe is that of Swin's code: AdamW, 160,000 steps with 16 crops of 512 x 512 pixels, a warm-up
of 1,500 steps and linear decay to 0, BatchNorm over all 16 crops. Pale and ClusTR name it, or its
values, too; DGT's supplement, which holds its settings, is not available. Weight decay leaves out
norms and biases; Swin's code applies it to biases and to the BatchNorms of the heads. Images are
evaluated whole; several processes need windows during training, as with
--config.inference.window=512 --config.inference.stride=341.

    python -m tokenvit_jax.train --config=configs/upernet.py:scenes --workdir=runs/scenes

A small Swin Transformer with a small UperNet on the embedded scenes. Hardware: 2 CPU cores.
Expected result: an mIoU of 88 % on the test scenes (one run: 87.7, with the scales 0.75, 1 and 1.25
88.6), which took 13 minutes next to other work.
"""

from tokenvit_jax.recipes.upernet import upernet_config


def get_config(arg: str = ""):
    return upernet_config(arg)
