"""DeiT-S on ImageNet-1K, and Token Pooling in it (Marin et al. 2021).

    python -m tokenvit_jax.train --config=configs/deit_s.py --workdir=runs/deit_s

DeiT (Touvron et al. 2021) without distillation; the values below are from its Table 9. Hardware: 8
accelerators in bfloat16; fewer or smaller ones need --config.accumulate_steps. Expected result: not
yet trained (the paper reports 79.8 % top-1).

    python -m tokenvit_jax.train --config=configs/deit_s.py:distilled --workdir=runs/distilled \\
        --config.distillation.teacher=TEACHER

With a distillation token that learns the classes of a teacher (Eq. 3), which sees the same images
after all augmentation and mixing. The teacher is any run with the same classes, also one that
`convert` wrote; --config.distillation.kind=soft takes its probabilities (Eq. 2). The same argument
works for deit_ti and deit_b. Expected result: not yet trained (the paper reports 81.2 % top-1 with
a RegNetY-16GF as teacher).

    python -m tokenvit_jax.train --config=configs/deit_s.py:search --workdir=runs/search \\
        --config.initial.workdir=runs/deit_s
    python -m tokenvit_jax.train --config=configs/deit_s.py:pooled --workdir=runs/pooled \\
        --config.initial.workdir=runs/search

Stages 2 and 3 of Token Pooling. The search takes 30 epochs to find how many tokens every block
needs; a larger --config.model_overrides.token_reducer.penalty keeps fewer tokens (the paper varies
the penalty without saying how; this has not been tried on ImageNet yet). Then the model trains with
these numbers of tokens for the full schedule. `evaluate` reads the numbers from the workdir:
--workdir=runs/pooled, without --config.

    python -m tokenvit_jax.train --config=configs/deit_s.py:level3 --workdir=runs/level3 \\
        --config.initial.workdir=runs/deit_s

Stage 3 with the paper's numbers of tokens, level0 (most) to level7; `published.TOKEN_POOLING` lists
their costs and accuracies. --config.model_overrides.token_reducer.method selects another reducer.

    python -m tokenvit_jax.train --config=configs/deit_s.py:digits --workdir=runs/digits
    python -m tokenvit_jax.train --config=configs/deit_s.py:digits_search \\
        --workdir=runs/digits_search --config.initial.workdir=runs/digits
    python -m tokenvit_jax.train --config=configs/deit_s.py:digits_pooled \\
        --workdir=runs/digits_pooled --config.initial.workdir=runs/digits_search

The three stages of a small network, the same for all sizes, on the embedded handwritten digits.
Hardware: 2 CPU cores, 2 minutes each. Expected result: about 96, 98 and 97 % test accuracy (one run
of deit_s: 96.1, 98.6 and 97.5 %, with 15, 7, 5, 5, 5 and 0 of 64 patches after the six blocks).
"""

from tokenvit_jax.recipes.imagenet import ImageNetRecipe
from tokenvit_jax.recipes.vit import deit_config


def get_config(arg: str = ""):
    return deit_config(
        "deit_s",
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
            augmentations=("crop", "flip", "randaugment", "erasing", "mixup", "cutmix", "repeated"),
        ),
    )
