"""Pale-T on ImageNet-1K (Wu et al. 2022, Table 2).

    python -m tokenvit_jax.train --config=configs/pale_t.py --workdir=runs/pale_t

Hardware: 8 accelerators in bfloat16; fewer or smaller ones need --config.accumulate_steps. Expected
result: not yet trained (the paper reports 83.4 % top-1). The values below are the paper's, with
RandAugment 9 / 0.5 in place of AutoAugment, as in the code of DeiT and Swin, on which it builds.

    python -m tokenvit_jax.train --config=configs/pale_t.py:tokens \\
        --workdir=runs/pale_t_tokens --config.token_labels.teacher=TEACHER

The starred model, with MixToken and token labels (the paper reports 84.2 % top-1). TEACHER is the
workdir of a trained model of this project. Alternatively, --config.token_labels.files=DIRECTORY
reads labels that `python -m tokenvit_jax.label` wrote.

    python -m tokenvit_jax.train --config=configs/pale_t.py:digits --workdir=runs/digits

A small network, the same for all sizes, on the embedded handwritten digits. Hardware: 2 CPU cores,
2 minutes. Expected result: about 99 % test accuracy (one run of pale_t: 99.2 %).

    python -m tokenvit_jax.train --config=configs/pale_t.py:digits_tokens \\
        --workdir=runs/digits_tokens --config.token_labels.teacher=runs/digits

The same network with MixToken and the token labels of that run (pale_t: 99.2 %; with MixToken
alone, 98.9 %). Labels from files would need --config.augment.rotation=0 and
--config.augment.translation=0.
"""

from tokenvit_jax.recipes.imagenet import ImageNetRecipe
from tokenvit_jax.recipes.pale import pale_config


def get_config(arg: str = ""):
    return pale_config(
        "pale_t",
        arg,
        drop_path=0.1,
        recipe=ImageNetRecipe(
            image_size=224,
            batch_size=1024,
            epochs=300,
            warmup_epochs=20,
            learning_rate=1e-3,
            weight_decay=0.05,
            clip_norm=0.0,
            augmentations=("crop", "flip", "color_jitter", "randaugment", "mixup", "cutmix"),
        ),
    )
