"""SwinV2-S with windows of 8 x 8, on ImageNet-1K (Liu et al. 2022).

    python -m tokenvit_jax.train --config=configs/swinv2_s.py --workdir=runs/swinv2_s

Hardware: 8 accelerators in bfloat16; fewer or smaller ones need --config.accumulate_steps. Expected
result: not yet trained. The values below are Swin's (Liu et al. 2021, Section 4.1), except for the
image size.

    python -m tokenvit_jax.train --config=configs/swinv2_s.py:digits --workdir=runs/digits

A small network with windows of 4 x 4, the same for all sizes, on the embedded handwritten digits.
Hardware: 2 CPU cores, a few minutes. Expected result: about 99 % test accuracy (one run of
swinv2_t: 98.9 %).
"""

from tokenvit_jax.recipes.imagenet import ImageNetRecipe
from tokenvit_jax.recipes.swin import swin_config


def get_config(arg: str = ""):
    return swin_config(
        "swinv2_s",
        arg,
        drop_path=0.3,
        recipe=ImageNetRecipe(
            image_size=256,
            batch_size=1024,
            epochs=300,
            warmup_epochs=20,
            learning_rate=1e-3,
            weight_decay=0.05,
            clip_norm=5.0,  # Swin's code
            augmentations=("crop", "flip", "randaugment", "erasing", "mixup", "cutmix"),
        ),
    )
