"""Fine-tunes a trained classifier on a dataset with other classes.

    python -m tokenvit_jax.train --config=configs/finetune.py:vit_b,3680,128 --workdir=runs/pets \\
        --config.initial.workdir=runs/vit_b --config.dataset=DATASET --config.data.data_dir=DATA

The argument is a model, `vit_b`, `swin_t` or `clustr_s`, the number of training images (without it:
ImageNet-1K's) and the batch size (without it: 1024); the numbers of steps and the learning rates
follow from them. `initial.workdir` is any run of this model, also one that `convert` wrote from
published weights; settings of the network that this file does not name, such as the patch size,
come from there. The classifier is new if the classes are others.

- `vit_b`: the recipe of MAE for ViT-B (He et al. 2022, Table 9, and its code): AdamW for 100 epochs
  with layer-wise learning-rate decay 0.65, peak 2e-3 at a batch size of 1024.
- `swin_t`: the recipe of Swin's code for weights from ImageNet-22K (22kto1k_finetune): AdamW for 30
  epochs, peak 4e-5 at a batch size of 1024, weight decay 1e-8.
- `clustr_s`: the paper has no recipe for fine-tuning; these are Swin's values.

--config.optimizer.freeze=backbone trains the classifier only (linear probe). Hardware: 8
accelerators in bfloat16 for batches of 1024; fewer or smaller ones need --config.accumulate_steps.
Expected result: not yet trained.
"""

from tokenvit_jax.recipes.finetune import finetune_config


def get_config(arg: str = ""):
    return finetune_config(arg)
