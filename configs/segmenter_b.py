"""Segmenter on ViT-B/16 with a mask transformer, on ADE20K (Strudel et al. 2021).

    python -m tokenvit_jax.convert --model=vit_b --layout=timm --normalization=inception \\
        --source=FILE --out=runs/vit_b
    python -m tokenvit_jax.train --config=configs/segmenter_b.py --workdir=runs/segmenter_b \\
        --config.initial.workdir=runs/vit_b

FILE: timm's vit_base_patch16_384. Hardware: 4 accelerators (global batch 8, bfloat16).
Expected result: not yet trained (the authors report 48.5 % mIoU at one scale). Their position
embeddings are resized once, before the training; here whenever they are used. The dropout of 0.1
in their decoder is left out.

    python -m tokenvit_jax.train --config=configs/segmenter_b.py:pascal_context \\
        --workdir=runs/pascal_context --config.initial.workdir=runs/vit_b
    python -m tokenvit_jax.train --config=configs/segmenter_b.py:cityscapes \\
        --workdir=runs/cityscapes --config.initial.workdir=runs/vit_b

The same on Pascal-Context (global batch 16) and Cityscapes. Expected results: not yet trained (the
authors published none of this size).

    python -m tokenvit_jax.convert --model=vit_b --layout=segmenter --dataset=ade20k \\
        --source=checkpoint.pth --out=runs/published
    python -m tokenvit_jax.evaluate --workdir=runs/published --config=configs/segmenter_b.py \\
        --config.model_overrides.position_size="(512, 512)" --config.dtype=float32

Weights that the authors published, whose positions are those of their crops.

    python -m tokenvit_jax.train --config=configs/segmenter_b.py:scenes --workdir=runs/scenes

One shrunk network for all sizes, on the embedded scenes. Hardware: 2 CPU cores, 45
minutes beside other work. Expected result: about 69 % mIoU on the test scenes (one run of
segmenter_ti: 68.7 %).
"""

from tokenvit_jax.recipes import segmenter_config


def get_config(arg: str = ""):
    return segmenter_config("vit_b", arg)
