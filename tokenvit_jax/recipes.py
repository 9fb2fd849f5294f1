"""Published training recipes, and the settings of the shrunk networks for the embedded digits.

A file in ``configs/`` names its model here and says what differs.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from tokenvit_jax.config import IMAGENET_TRAIN_IMAGES, default_config
from tokenvit_jax.data import dataset_info
from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.published import TOKEN_POOLING


def imagenet_recipe(*, epochs: int = 300, warmup_epochs: int = 20) -> ConfigDict:
    """Returns the ImageNet-1K recipe that Swin, CMT and their successors share.

    AdamW, weight decay 0.05, learning rate 1e-3 at batch 1024, cosine decay over 300 epochs after
    20 epochs of warm-up, gradients clipped to norm 5, RandAugment 9 / 0.5, Mixup 0.8, CutMix 1.0,
    erasing 0.25, label smoothing 0.1. A config states what differs from it.
    """
    config = default_config()
    config.dataset = "imagenet2012"
    config.dtype = "bfloat16"
    config.batch_size = 1024
    config.data.workers = 16
    config.data.eval_batch_size = 1024
    steps_per_epoch = IMAGENET_TRAIN_IMAGES // config.batch_size
    config.num_steps = epochs * steps_per_epoch
    config.augment.crop_scale = (0.08, 1.0)
    config.augment.flip = 0.5
    config.augment.randaugment.num_ops = 2
    config.augment.erasing = 0.25
    config.mix.mixup = 0.8
    config.mix.cutmix = 1.0
    config.label_smoothing = 0.1
    config.clip_norm = 5.0
    config.optimizer.warmup_steps = warmup_epochs * steps_per_epoch
    config.eval_every_steps = steps_per_epoch
    config.checkpoint_every_steps = steps_per_epoch
    return config


def digits_recipe() -> ConfigDict:
    """Returns a recipe for the embedded digits that takes about two minutes on two CPU cores.

    1,437 training and 360 test images of handwritten digits (scikit-learn), 8 x 8 pixels enlarged
    to 64 x 64, slightly turned and shifted.
    """
    config = default_config()
    config.dataset = "digits"
    config.image_size = 64
    config.batch_size = 64
    config.data.eval_batch_size = 120
    config.num_steps = 400
    config.augment.rotation = 10.0
    config.augment.translation = 0.05
    config.label_smoothing = 0.1
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 40
    config.log_every_steps = 10
    config.eval_every_steps = 50
    config.checkpoint_every_steps = 100
    return config


# ------------------------------------------------------------------------------------------------
# DGT
# ------------------------------------------------------------------------------------------------


def dgt_config(model: str, arg: str, *, drop_path: float) -> ConfigDict:
    """Returns the configuration of a DGT: the published one for ``arg`` "", else "digits"."""

    def published():
        config = imagenet_recipe()
        config.model = model
        config.model_overrides = {
            "num_groups": 48, "top_k": 98, "drop_path": drop_path, "remat": False
        }  # fmt: skip
        return config

    return _choose(arg, {"": published, "digits": lambda: dgt_digits_config(model)})


def dgt_digits_config(model: str) -> ConfigDict:
    """Returns the configuration of a DGT that is shrunk to the embedded digits."""
    config = digits_recipe()
    config.model = model
    config.model_overrides = {
        "stem_dim": 16, "dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8),
        "depths": (1, 1, 2, 1), "head_dim": 128, "drop_path": 0.0, "remat": False,
        # Groups matter in stages 1 (256 tokens) and 2 (64 tokens).
        "num_groups": 8, "top_k": 24,
    }  # fmt: skip
    return config


# ------------------------------------------------------------------------------------------------
# ClusTR
# ------------------------------------------------------------------------------------------------


# Written out so that the command line can change them.
CLUSTR_ATTENTION = {
    "ratios": ((64, 16), (16, 4), (4, 1), (1,)),
    "aggregation": "clusters",
    "assign": "nearest",
    "adaptive": 0.0,
}


def clustr_config(model: str, arg: str, *, drop_path: float, clip_norm: float = 0.0) -> ConfigDict:
    """Returns the configuration of a ClusTR: the published one for ``arg`` "", else "digits".

    Table A2; where it is silent, the code of PVTv2, which it names as its base.
    """

    def published():
        config = imagenet_recipe(warmup_epochs=5)
        config.model = model
        config.model_overrides = {"drop_path": drop_path, "remat": False, **CLUSTR_ATTENTION}
        config.clip_norm = clip_norm
        config.augment.color_jitter = 0.4
        config.data.repeats = 3
        return config

    return _choose(arg, {"": published, "digits": lambda: clustr_digits_config(model)})


def clustr_digits_config(model: str) -> ConfigDict:
    """Returns the configuration of a ClusTR that is shrunk to the embedded digits.

    The published token reductions: 256, 64 and 16 tokens become 4 and 16, or 4 and all.
    """
    config = digits_recipe()
    config.model = model
    config.model_overrides = {
        "dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8), "depths": (1, 1, 2, 1),
        "mlp_ratios": (4, 4, 4, 4), "drop_path": 0.0, "remat": False, **CLUSTR_ATTENTION,
    }  # fmt: skip
    return config


# ------------------------------------------------------------------------------------------------
# Pale Transformer
# ------------------------------------------------------------------------------------------------


# Written out so that the command line can change them.
PALE_ATTENTION = {
    "mode": "parallel", "position": "cpe", "mask_padding": False, "token_head": False
}  # fmt: skip


def pale_config(model: str, arg: str, *, drop_path: float) -> ConfigDict:
    """Returns the configuration of a Pale Transformer.

    Args:
      model: its name.
      arg: "": the published one; "tokens": of the starred models, with MixToken and token labels;
        "digits" and "digits_tokens": shrunk to the embedded digits.
      drop_path: stochastic depth.
    """

    def published():
        config = imagenet_recipe()
        config.model = model
        config.model_overrides = {
            "drop_path": drop_path, "remat": False, "pale_sizes": (7, 7, 7, 7), **PALE_ATTENTION
        }  # fmt: skip
        config.clip_norm = 0.0
        config.augment.color_jitter = 0.4
        config.augment.erasing = 0.0
        return config

    return _choose(
        arg,
        {
            "": published,
            "tokens": lambda: _with_token_labels(published()),
            "digits": lambda: pale_digits_config(model),
            "digits_tokens": lambda: _with_token_labels(pale_digits_config(model)),
        },
    )


def pale_digits_config(model: str) -> ConfigDict:
    """Returns the configuration of a Pale Transformer that is shrunk to the embedded digits."""
    config = digits_recipe()
    config.model = model
    config.model_overrides = {
        "dims": (16, 32, 64, 128), "num_heads": (2, 2, 4, 8), "depths": (1, 1, 2, 1),
        "drop_path": 0.0, "remat": False,
        # Maps of 16, 8, 4 and 2 rows and columns: 4, 4, 2 and 1 groups of them.
        "pale_sizes": (4, 2, 2, 2), "position_size": (64, 64), **PALE_ATTENTION,
    }  # fmt: skip
    return config


def _with_token_labels(config: ConfigDict) -> ConfigDict:
    """MixToken instead of Mixup and CutMix, and a dense loss of weight 0.5 (Jiang et al. 2021)."""
    config.mix.mixup, config.mix.cutmix, config.mix.mixtoken = 0.0, 0.0, 1.0
    config.token_labels.weight = 0.5
    config.model_overrides.token_head = True
    return config


# ------------------------------------------------------------------------------------------------
# DeiT, with Token Pooling
# ------------------------------------------------------------------------------------------------

SEARCH_EPOCHS = 30


def deit_config(model: str, arg: str) -> ConfigDict:
    """Returns the configuration of a DeiT, or of a stage of Token Pooling in it.

    Args:
      model: its name.
      arg: "": DeiT, the first stage; "search": the second one, which finds how many tokens every
        block needs; "pooled": the third, with so many tokens; "level0" to "level7": the third with
        the numbers of the paper, for the models that it reports; "digits", "digits_search" and
        "digits_pooled": the three stages, shrunk to the embedded digits.
    """
    levels = TOKEN_POOLING.get(model, ())
    configs = {
        "": lambda: _deit(model),
        "search": lambda: _search(_deit(model, epochs=SEARCH_EPOCHS), penalty=1e-3),
        "pooled": lambda: _pooled(_deit(model)),
        "digits": lambda: deit_digits_config(model),
        "digits_search": lambda: _search(deit_digits_config(model), penalty=3e-3),
        "digits_pooled": lambda: _pooled(deit_digits_config(model)),
    }
    for number, level in enumerate(levels):
        configs[f"level{number}"] = lambda keep=level.keep: _pooled(_deit(model), keep)
    return _choose(arg, configs)


def _deit(model, epochs=300):
    """Touvron et al. 2021, Table 9; there RandAugment takes the place of colour jitter."""
    config = imagenet_recipe(epochs=epochs, warmup_epochs=5)
    config.model = model
    config.model_overrides = {"drop_path": 0.1, "remat": False, "qk_norm": "none"}
    config.clip_norm = 0.0
    config.data.repeats = 3
    return config


def deit_digits_config(model: str) -> ConfigDict:
    """Returns the configuration of a DeiT that is shrunk to the embedded digits: 64 patches."""
    config = digits_recipe()
    config.model = model
    config.model_overrides = {
        "dim": 64, "depth": 6, "num_heads": 4, "patch_size": 8, "position_size": (64, 64),
        "drop_path": 0.0, "remat": False, "qk_norm": "none", "init_std": 0.1,
    }  # fmt: skip
    return config


def _search(config, penalty):
    config.model_overrides.token_reducer = {"method": "soft_extract", "diagonal": True}
    config.retention.penalty = penalty
    config.retention.learning_rate_factor = 10.0
    return config


def _pooled(config, keep=()):
    """keep: tokens of every block; (): those that a search found."""
    config.model_overrides.token_reducer = {
        "keep": keep, "method": "weighted_kmedoids", "initial": "score", "carry": False,
        "diagonal": True,
    }  # fmt: skip
    return config


# ------------------------------------------------------------------------------------------------
# Swin Transformer
# ------------------------------------------------------------------------------------------------


def swin_config(model: str, arg: str, *, drop_path: float) -> ConfigDict:
    """Returns the configuration of a Swin Transformer of either version.

    Args:
      model: its name.
      arg: "": the published one; "digits": shrunk to the embedded digits.
      drop_path: stochastic depth.
    """

    def published():
        config = imagenet_recipe()
        config.model = model
        config.model_overrides = {"drop_path": drop_path, "remat": False}
        if _is_v2(model):
            config.image_size = 256
        return config

    return _choose(arg, {"": published, "digits": lambda: swin_digits_config(model)})


def swin_digits_config(model: str) -> ConfigDict:
    """Returns the configuration of a Swin Transformer that is shrunk to the embedded digits."""
    config = digits_recipe()
    config.model = model
    config.model_overrides = {
        "dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8),
        # Maps of 16, 8, 4 and 2 rows and columns: 16, 4, 1 and 1 windows, in the first two stages
        # shifted by every second block.
        "depths": (2, 2, 2, 1), "window_size": 4,
        "drop_path": 0.0, "remat": False,
    }  # fmt: skip
    if _is_v2(model):
        config.model_overrides.pretrained_window_sizes = (4, 4, 4, 2)
    return config


def _is_v2(model):
    return model.startswith("swinv2")


# ------------------------------------------------------------------------------------------------
# Segmenter
# ------------------------------------------------------------------------------------------------


class SegmenterSetting(NamedTuple):
    """What the code of Segmenter sets for a dataset, and how large its evaluation images are.

    epochs. eval_epochs: between two evaluations. batch_size. learning_rate. short_side: of the
    resized images, pixels. crop: side of the crops and the windows, pixels. stride: of the windows,
    pixels. depth: blocks of the mask transformer. eval_size: of the buffer of the resized images;
    what is longer shrinks to fit. label_size: of the largest label map.
    """

    epochs: int
    eval_epochs: int
    batch_size: int
    learning_rate: float
    short_side: int
    crop: int
    stride: int
    depth: int
    eval_size: tuple[int, int]
    label_size: tuple[int, int]


# Strudel et al. 2021; github.com/rstrudel/segmenter, segm/config.yml. The buffers hold images whose
# longer side is up to twice the shorter one: few of ADE20K and Pascal-Context have a longer one.
SEGMENTER = {
    "ade20k": SegmenterSetting(
        epochs=64, eval_epochs=2, batch_size=8, learning_rate=1e-3,
        short_side=512, crop=512, stride=512, depth=2,
        eval_size=(1024, 1024), label_size=(2100, 2100),
    ),
    "pascal_context": SegmenterSetting(
        epochs=256, eval_epochs=8, batch_size=16, learning_rate=1e-3,
        short_side=520, crop=480, stride=320, depth=2,
        eval_size=(1120, 1120), label_size=(500, 500),
    ),
    "cityscapes": SegmenterSetting(
        epochs=216, eval_epochs=4, batch_size=8, learning_rate=1e-2,
        short_side=1024, crop=768, stride=512, depth=1,
        eval_size=(1024, 2048), label_size=(1024, 2048),
    ),
}  # fmt: skip


def segmenter_config(model: str, arg: str, *, ade20k_side: int = 512) -> ConfigDict:
    """Returns the configuration of a Segmenter.

    Args:
      model: its backbone.
      arg: "": on ADE20K; "pascal_context" and "cityscapes": on these; "scenes": shrunk to the
        embedded scenes.
      ade20k_side: of the images of ADE20K, the shorter one, and of their crops and windows, pixels.
    """
    side = ade20k_side
    ade20k = SEGMENTER["ade20k"]._replace(
        short_side=side, crop=side, stride=side, eval_size=(2 * side, 2 * side)
    )
    configs = {"": functools.partial(_segmenter, model, "ade20k", ade20k)}
    for dataset in ("pascal_context", "cityscapes"):
        configs[dataset] = functools.partial(_segmenter, model, dataset, SEGMENTER[dataset])
    return _choose(arg, configs | {"scenes": lambda: segmenter_scenes_config(model)})


def _segmenter(model, dataset, setting):
    """Strudel et al. 2021, Section 4.1, and their code; without the dropout of its decoder."""
    config = default_config()
    config.dataset = dataset
    config.dtype = "bfloat16"
    config.model = model
    config.model_overrides = {
        "drop_path": 0.1, "remat": False, "norm_epsilon": 1e-5,
        # Those of the weights that training starts from.
        "position_size": (384, 384), "position_resize": "bilinear",
    }  # fmt: skip
    config.head_overrides = {"depth": setting.depth}
    config.image_size = setting.crop
    config.inference.stride = setting.stride
    _read_scenes(config, setting)
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = setting.learning_rate
    config.optimizer.weight_decay = 0.0
    config.optimizer.schedule = "polynomial"
    config.optimizer.power = 0.9
    images = dataset_info(dataset).splits["train"]
    steps_per_epoch = images // setting.batch_size
    config.num_steps = setting.epochs * images // setting.batch_size
    config.eval_every_steps = setting.eval_epochs * steps_per_epoch
    config.checkpoint_every_steps = steps_per_epoch
    return config


def _read_scenes(config, setting):
    """The augmentation of mmsegmentation, and the buffers of the evaluation."""
    config.batch_size = setting.batch_size
    config.data.workers = 10
    config.data.eval_batch_size = 8
    config.data.eval_short_side = setting.short_side
    config.data.eval_size = setting.eval_size
    config.data.label_size = setting.label_size
    config.data.normalization = "inception"
    config.augment.short_side = setting.short_side
    config.augment.scale_range = (0.5, 2.0)
    config.augment.max_class_share = 0.75
    config.augment.flip = 0.5
    config.augment.photometric = True


def segmenter_scenes_config(model: str) -> ConfigDict:
    """Returns the configuration of a Segmenter that is shrunk to the embedded scenes: 256 patches.

    2,000 training and 200 test images of 128 x 128 pixels: digits pasted on photographs.
    """
    config = default_config()
    config.dataset = "scenes"
    config.model = model
    config.model_overrides = {
        "dim": 96, "depth": 8, "num_heads": 4, "patch_size": 8, "position_size": (128, 128),
        "drop_path": 0.0, "remat": False, "init_std": 0.1,
    }  # fmt: skip
    config.head = "mask_transformer"
    config.head_overrides = {"depth": 1, "head_dim": 24}
    config.image_size = 128
    config.batch_size = 16
    config.data.eval_batch_size = 20
    config.num_steps = 3000
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.log_every_steps = 50
    config.eval_every_steps = 500
    config.checkpoint_every_steps = 500
    return config


def _choose(arg: str, configs: dict[str, Callable[[], ConfigDict]]) -> ConfigDict:
    if arg not in configs:
        valid = ", ".join(name or "none" for name in configs)
        hint = did_you_mean(arg, configs)
        raise UserError(f"config argument {arg!r} is not valid{hint}; valid: {valid}")
    return configs[arg]()
