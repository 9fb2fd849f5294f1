"""Segmenter on ViT-L/16 with a mask transformer, on ADE20K (Strudel et al. 2021).

    python -m tokenvit_jax.convert --model=vit_l --layout=timm --normalization=inception \\
        --source=FILE --out=runs/vit_l
    python -m tokenvit_jax.train --config=configs/segmenter_l.py --workdir=runs/segmenter_l \\
        --config.initial.workdir=runs/vit_l

FILE: timm's vit_large_patch16_384. Hardware: 8 accelerators (global batch 8, bfloat16).
Expected result: not yet trained (the authors report 51.8 % mIoU at one scale). Their position
embeddings are resized once, before the training; here whenever they are used. The dropout of 0.1
in their decoder is left out.

    python -m tokenvit_jax.train --config=configs/segmenter_l.py:pascal_context \\
        --workdir=runs/pascal_context --config.initial.workdir=runs/vit_l
    python -m tokenvit_jax.train --config=configs/segmenter_l.py:cityscapes \\
        --workdir=runs/cityscapes --config.initial.workdir=runs/vit_l

The same on Pascal-Context (global batch 16) and Cityscapes. Expected results: not yet trained (the
authors report 58.1 and 79.1 % mIoU at one scale).

    python -m tokenvit_jax.convert --model=vit_l --layout=segmenter --dataset=ade20k \\
        --source=checkpoint.pth --out=runs/published
    python -m tokenvit_jax.evaluate --workdir=runs/published --config=configs/segmenter_l.py \\
        --config.model_overrides.position_size="(640, 640)" --config.dtype=float32

Weights that the authors published, whose positions are those of their crops (640 x 640; on
Pascal-Context 480 x 480, on Cityscapes 768 x 768).

    python -m tokenvit_jax.train --config=configs/segmenter_l.py:scenes --workdir=runs/scenes

One shrunk network for all sizes, on the embedded scenes. Hardware: 2 CPU cores, 45
minutes beside other work. Expected result: about 69 % mIoU on the test scenes (one run of
segmenter_ti: 68.7 %).
"""

from tokenvit_jax.recipes import segmenter_config


def get_config(arg: str = ""):
    return segmenter_config("vit_l", arg, ade20k_side=640)
