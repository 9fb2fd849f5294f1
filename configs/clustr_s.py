"""ClusTR-S on ImageNet-1K (Tables 1 and A2 of ClusTR).

    python -m tokenvit_jax.train --config=configs/clustr_s.py --workdir=runs/clustr_s

Hardware: 8 accelerators in bfloat16; fewer or smaller ones need --config.accumulate_steps. Expected
result: not yet trained (the paper reports 83.2 % top-1). The values below are the paper's (Table
A2, whose "dropout" is read as drop path); colour jitter, repeated augmentation, and the first and
last learning rates come from PVTv2, on which ClusTR builds.

    python -m tokenvit_jax.train --config=configs/clustr_s.py:digits --workdir=runs/digits

A small network, the same for all sizes, on the embedded handwritten digits. Hardware: 2 CPU cores,
2 minutes. Expected result: about 98 % test accuracy (one run of clustr_t: 98.6 %).
"""

from tokenvit_jax.recipes.clustr import clustr_config
from tokenvit_jax.recipes.imagenet import ImageNetRecipe


def get_config(arg: str = ""):
    return clustr_config(
        "clustr_s",
        arg,
        drop_path=0.1,
        recipe=ImageNetRecipe(
            image_size=224,
            batch_size=1024,
            epochs=300,
            warmup_epochs=5,
            learning_rate=1e-3,  # 5e-4 x batch size / 512
            weight_decay=0.05,
            clip_norm=0.0,
            augmentations=(
                "crop",
                "flip",
                "color_jitter",
                "randaugment",
                "erasing",
                "mixup",
                "cutmix",
                "repeated",
            ),
        ),
    )
