"""DGT-T on ImageNet-1K (Liu et al. 2022, Tables 1 and 2).

    python -m tokenvit_jax.train --config=configs/dgt_t.py --workdir=runs/dgt_t

Hardware: 8 accelerators with at least 32 GB, in bfloat16; fewer need --config.accumulate_steps.
Expected result: not yet trained (the paper reports 83.8 % top-1). The paper's supplement, which
holds its training settings, is not available; the values below are CMT's and Swin's (Liu et al.
2021, Section 4.1).

    python -m tokenvit_jax.train --config=configs/dgt_t.py:swin_block --workdir=runs/swin_block

The same network and training with another block in place of DGT's (Table 4c): swin_block,
cswin_block or cmt_block. They have 23.74, 23.76 and 24.13 M parameters and 4.03, 4.13 and 3.68
GMACs (DGT-T: 24.09 M and 4.33). Expected results: not yet trained (the paper reports 82.8, 83.0 and
83.4 % top-1, against 83.8 % for its own block).

    python -m tokenvit_jax.train --config=configs/dgt_t.py:digits --workdir=runs/digits

The same network, shrunk, on the embedded handwritten digits. Hardware: 2 CPU cores, 2 minutes.
Expected result: 99 % test accuracy (99.7 % measured).

    python -m tokenvit_jax.prepare fashion_mnist --manual_dir=DOWNLOADS --data_dir=DATA
    python -m tokenvit_jax.train --config=configs/dgt_t.py:fashion_mnist \\
        --workdir=runs/fashion_mnist --config.data.data_dir=DATA

The same small network on Fashion-MNIST, for 5 epochs. Hardware: 2 CPU cores, 50 minutes next to
other work. Expected result: about 91 % test accuracy (one run: 90.7 % of the 10,000 images).
"""

from tokenvit_jax.recipes.dgt import OTHER_BLOCKS, dgt_config
from tokenvit_jax.recipes.imagenet import ImageNetRecipe


def get_config(arg: str = ""):
    return dgt_config(
        "dgt_t",
        arg,
        drop_path=0.1,
        other_blocks=OTHER_BLOCKS,
        recipe=ImageNetRecipe(
            image_size=224,
            batch_size=1024,
            epochs=300,
            warmup_epochs=20,
            learning_rate=1e-3,
            weight_decay=0.05,
            clip_norm=5.0,  # Swin's code
            augmentations=("crop", "flip", "randaugment", "erasing", "mixup", "cutmix"),
        ),
    )
