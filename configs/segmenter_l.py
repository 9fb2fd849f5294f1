"""Segmenter on ViT-L/16 with a mask transformer, on ADE20K (Strudel et al. 2021).

    python -m tokenvit_jax.convert --model=vit_l --layout=timm --normalization=inception \\
        --source=FILE --out=runs/vit_l
    python -m tokenvit_jax.train --config=configs/segmenter_l.py --workdir=runs/segmenter_l \\
        --config.initial.workdir=runs/vit_l

FILE holds timm's vit_large_patch16_384. Hardware: 8 accelerators, in bfloat16. Expected result: not
yet trained (the authors report 51.8 % mIoU at one scale). The recipes below hold the authors'
schedule and sizes for each dataset. Two things differ: the authors resize the position embeddings
once, before training, whereas the model here resizes them whenever it uses them; and the decoder
has no dropout (theirs: 0.1).

    python -m tokenvit_jax.train --config=configs/segmenter_l.py:pascal_context \\
        --workdir=runs/pascal_context --config.initial.workdir=runs/vit_l
    python -m tokenvit_jax.train --config=configs/segmenter_l.py:cityscapes \\
        --workdir=runs/cityscapes --config.initial.workdir=runs/vit_l

The same model on Pascal-Context and Cityscapes. Expected results: not yet trained (the authors
report 58.1 and 79.1 % mIoU at one scale).

    python -m tokenvit_jax.convert --model=vit_l --layout=segmenter --dataset=ade20k \\
        --source=checkpoint.pth --out=runs/published
    python -m tokenvit_jax.evaluate --workdir=runs/published --config=configs/segmenter_l.py \\
        --config.model_overrides.position_size="(640, 640)" --config.dtype=float32

Evaluates weights that the authors published. Their position embeddings fit the training crops: 640
x 640; on Pascal-Context 480 x 480, on Cityscapes 768 x 768.

    python -m tokenvit_jax.train --config=configs/segmenter_l.py:scenes --workdir=runs/scenes

A small network, the same for all sizes, on the embedded scenes. Hardware: 2 CPU cores, 45 minutes
next to other work. Expected result: about 69 % mIoU on the test scenes (one run of segmenter_ti:
68.7 %).
"""

from tokenvit_jax.recipes.segmenter import ADE20K_640, CITYSCAPES, PASCAL_CONTEXT, segmenter_config


def get_config(arg: str = ""):
    return segmenter_config(
        "vit_l",
        arg,
        drop_path=0.1,
        recipes=(ADE20K_640, PASCAL_CONTEXT, CITYSCAPES),
    )
