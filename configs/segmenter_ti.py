"""Segmenter on ViT-Ti/16 with a mask transformer, on ADE20K (Strudel et al. 2021).

    python -m tokenvit_jax.convert --model=vit_ti --layout=timm --normalization=inception \\
        --source=FILE --out=runs/vit_ti
    python -m tokenvit_jax.train --config=configs/segmenter_ti.py --workdir=runs/segmenter_ti \\
        --config.initial.workdir=runs/vit_ti

FILE holds timm's vit_tiny_patch16_384. Hardware: 1 accelerator, in bfloat16. Expected result: not
yet trained (the authors report 38.1 % mIoU at one scale). The recipes below hold the authors'
schedule and sizes for each dataset. Two things differ: the authors resize the position embeddings
once, before training, whereas the model here resizes them whenever it uses them; and the decoder
has no dropout (theirs: 0.1).

    python -m tokenvit_jax.train --config=configs/segmenter_ti.py:pascal_context \\
        --workdir=runs/pascal_context --config.initial.workdir=runs/vit_ti
    python -m tokenvit_jax.train --config=configs/segmenter_ti.py:cityscapes \\
        --workdir=runs/cityscapes --config.initial.workdir=runs/vit_ti

The same model on Pascal-Context and Cityscapes. Expected results: not yet trained (the authors
published no model of this size).

    python -m tokenvit_jax.convert --model=vit_ti --layout=segmenter --dataset=ade20k \\
        --source=checkpoint.pth --out=runs/published
    python -m tokenvit_jax.evaluate --workdir=runs/published --config=configs/segmenter_ti.py \\
        --config.model_overrides.position_size="(512, 512)" --config.dtype=float32

Evaluates weights that the authors published. Their position embeddings fit the training crops.

    python -m tokenvit_jax.train --config=configs/segmenter_ti.py:scenes --workdir=runs/scenes

A small network, the same for all sizes, on the embedded scenes. Hardware: 2 CPU cores, 45 minutes
next to other work. Expected result: about 69 % mIoU on the test scenes (one run of segmenter_ti:
68.7 %).
"""

from tokenvit_jax.recipes.segmenter import ADE20K, CITYSCAPES, PASCAL_CONTEXT, segmenter_config


def get_config(arg: str = ""):
    return segmenter_config(
        "vit_ti",
        arg,
        drop_path=0.1,
        recipes=(ADE20K, PASCAL_CONTEXT, CITYSCAPES),
    )
