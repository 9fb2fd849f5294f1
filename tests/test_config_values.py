"""Every shipped config sets exactly these entries; all others have their defaults."""

import pytest
from flax.traverse_util import flatten_dict
from shipped_configs import CASES, LEVELS, load_config

from tokenvit_jax.published import TOKEN_POOLING
from tokenvit_jax.tasks import default_config

IMAGENET = {
    "augment.crop_scale": (0.08, 1.0), "augment.flip": 0.5, "augment.randaugment.num_ops": 2,
    "batch_size": 1024, "checkpoint_every_steps": 1251, "data.eval_batch_size": 1024,
    "data.workers": "auto", "dataset": "imagenet2012", "dtype": "bfloat16",
    "eval_every_steps": 1251, "label_smoothing": 0.1, "model_overrides.remat": False,
    "num_steps": 375_300, "mix.mixup": 0.8, "mix.cutmix": 1.0,
}  # fmt: skip
DIGITS = {
    "augment.rotation": 10.0, "augment.translation": 0.05, "batch_size": 64,
    "checkpoint_every_steps": 100, "data.eval_batch_size": 120, "dataset": "digits",
    "eval_every_steps": 50, "image_size": 64, "label_smoothing": 0.1, "log_every_steps": 10,
    "model_overrides.drop_path": 0.0, "model_overrides.remat": False, "num_steps": 400,
    "optimizer.learning_rate": 2e-3, "optimizer.warmup_steps": 40,
}  # fmt: skip
SEGMENTER = {
    "augment.flip": 0.5, "augment.max_class_share": 0.75, "augment.photometric": True,
    "augment.scale_range": (0.5, 2.0), "data.eval_batch_size": 8,
    "data.normalization": "inception", "data.workers": "auto", "dtype": "bfloat16",
    "model_overrides.drop_path": 0.1, "model_overrides.norm_epsilon": 1e-5,
    "model_overrides.position_resize": "bilinear", "model_overrides.position_size": (384, 384),
    "model_overrides.remat": False, "optimizer.name": "sgd", "optimizer.power": 0.9,
    "optimizer.schedule": "polynomial", "optimizer.weight_decay": 0.0,
}  # fmt: skip


def overrides(**settings):
    return {f"model_overrides.{name}": value for name, value in settings.items()}


PYRAMID = overrides(dims=(16, 32, 64, 128), num_heads=(1, 2, 4, 8), depths=(1, 1, 2, 1))
CLUSTR = overrides(
    ratios=((64, 16), (16, 4), (4, 1), (1,)), aggregation="clusters", assign="nearest", adaptive=0.0
)
DGT = overrides(centroid_rule="constant", centroid_old_weight=0.9)
PALE = overrides(mode="parallel", position="cpe", mask_padding=False, token_head=False)
DEIT = overrides(qk_norm="none")
SWIN_DIGITS = PYRAMID | overrides(depths=(2, 2, 2, 1), window_size=4)
TOKENS = {
    "mix.mixup": 0.0, "mix.cutmix": 0.0, "mix.mixtoken": 1.0, "token_labels.weight": 0.5,
    "model_overrides.token_head": True,
}  # fmt: skip


def search(penalty):
    return {
        "model_overrides.token_reducer.method": "soft_extract",
        "model_overrides.token_reducer.diagonal": True,
        "model_overrides.token_reducer.penalty": penalty,
        "model_overrides.token_reducer.learning_rate_factor": 10.0,
    }


POOLED = {
    f"model_overrides.token_reducer.{name}": value
    for name, value in {
        "keep": (), "method": "weighted_kmedoids", "initial": "score", "carry": False,
        "diagonal": True,
    }.items()
}  # fmt: skip

DISTILLED = {"model_overrides.distilled": True, "distillation.weight": 0.5}
FASHION_MNIST = {
    "augment.flip": 0.5, "augment.translation": 0.05, "batch_size": 128,
    "checkpoint_every_steps": 468, "data.eval_batch_size": 500, "dataset": "fashion_mnist",
    "eval_every_steps": 468, "image_size": 32, "model_overrides.drop_path": 0.0,
    "model_overrides.remat": False, "num_steps": 2340, "optimizer.learning_rate": 2e-3,
    "optimizer.warmup_steps": 234,
}  # fmt: skip
# Argument of `finetune` -> entries that differ from training on ImageNet-1K from scratch.
FINETUNE = IMAGENET | overrides(drop_path=0.1) | {"augment.erasing": 0.25}
SWIN_FINETUNE = FINETUNE | {
    "clip_norm": 5.0, "num_steps": 37_534, "optimizer.end_learning_rate": 4e-7,
    "optimizer.learning_rate": 4e-5, "optimizer.warmup_learning_rate": 4e-8,
    "optimizer.warmup_steps": 6256, "optimizer.weight_decay": 1e-8,
}  # fmt: skip
VIT_FINETUNE = FINETUNE | {
    "num_steps": 125_114, "optimizer.end_learning_rate": 1e-6, "optimizer.layer_decay": 0.65,
    "optimizer.learning_rate": 2e-3, "optimizer.warmup_learning_rate": 0.0,
    "optimizer.warmup_steps": 6256,
}  # fmt: skip
FINETUNING = {
    "vit_b": VIT_FINETUNE, "swin_t": SWIN_FINETUNE, "clustr_s": SWIN_FINETUNE,
    "vit_b,3680": VIT_FINETUNE | {
        "checkpoint_every_steps": 50, "eval_every_steps": 50, "num_steps": 359,
        "optimizer.warmup_steps": 18,
    },
}  # fmt: skip

# Family -> entries on ImageNet-1K, besides the entries of all families.
PUBLISHED = {
    "dgt": {"augment.erasing": 0.25, "clip_norm": 5.0, "optimizer.warmup_steps": 25_020}
    | overrides(num_groups=48, top_k=98) | DGT,
    "clustr": {
        "augment.erasing": 0.25, "augment.color_jitter": 0.4, "data.repeats": 3,
        "optimizer.warmup_steps": 6255,
    } | CLUSTR,
    "pale": {"augment.color_jitter": 0.4, "optimizer.warmup_steps": 25_020}
    | overrides(pale_sizes=(7, 7, 7, 7)) | PALE,
    "deit": {"augment.erasing": 0.25, "data.repeats": 3, "optimizer.warmup_steps": 6255} | DEIT,
    "swin": {"augment.erasing": 0.25, "clip_norm": 5.0, "optimizer.warmup_steps": 25_020},
}  # fmt: skip
PUBLISHED["swinv2"] = PUBLISHED["swin"] | {"image_size": 256}
# Family -> the small network for the digits.
SHRUNK = {
    "dgt": PYRAMID | overrides(stem_dim=16, head_dim=128, num_groups=8, top_k=24) | DGT,
    "clustr": PYRAMID | overrides(mlp_ratios=(4, 4, 4, 4)) | CLUSTR,
    "pale": PYRAMID | PALE
    | overrides(num_heads=(2, 2, 4, 8), pale_sizes=(4, 2, 2, 2), position_size=(64, 64)),
    "deit": DEIT | overrides(
        dim=64, depth=6, num_heads=4, patch_size=8, position_size=(64, 64), init_std=0.1
    ),
    "swin": SWIN_DIGITS,
    "swinv2": SWIN_DIGITS | overrides(pretrained_window_sizes=(4, 4, 4, 2)),
}  # fmt: skip
# Argument -> entries besides the family's.
OF_GROUPS = ("num_groups", "top_k", "centroid_rule", "centroid_old_weight")
VARIANTS = {
    "": {}, "digits": {},
    "tokens": TOKENS, "digits_tokens": TOKENS,
    "search": search(1e-3) | {"num_steps": 37_530}, "digits_search": search(3e-3),
    "pooled": POOLED, "digits_pooled": POOLED,
    "distilled": DISTILLED, "digits_distilled": DISTILLED,
}  # fmt: skip
SIZES = {
    name: overrides(drop_path=drop_path)
    for name, drop_path in {
        "dgt_t": 0.1, "dgt_s": 0.3, "dgt_b": 0.5, "clustr_t": 0.1, "clustr_s": 0.1,
        "clustr_b": 0.3, "pale_t": 0.1, "pale_s": 0.3, "pale_b": 0.5, "deit_ti": 0.1,
        "deit_s": 0.1, "deit_e318": 0.1, "deit_e252": 0.1, "deit_b": 0.1, "swin_t": 0.2,
        "swin_s": 0.3, "swin_b": 0.5, "swinv2_t": 0.2, "swinv2_s": 0.3, "swinv2_b": 0.5,
    }.items()
}  # fmt: skip
SIZES["clustr_b"] |= {"clip_norm": 1.0}


def on_side(side):
    """Returns the entries of ADE20K for crops with this side."""
    return {
        "augment.short_side": side, "batch_size": 8, "checkpoint_every_steps": 2526,
        "data.eval_short_side": side, "data.eval_size": (2 * side, 2 * side),
        "data.label_size": (2100, 2100), "dataset": "ade20k", "eval_every_steps": 5052,
        "head_overrides.depth": 2, "image_size": side, "inference.stride": side,
        "num_steps": 161_680,
    }  # fmt: skip


SEGMENTER_DATASETS = {
    "pascal_context": SEGMENTER | {
        "augment.short_side": 520, "batch_size": 16, "checkpoint_every_steps": 312,
        "data.eval_short_side": 520, "data.eval_size": (1120, 1120), "data.label_size": (500, 500),
        "dataset": "pascal_context", "eval_every_steps": 2496, "head_overrides.depth": 2,
        "image_size": 480, "inference.stride": 320, "num_steps": 79_968,
    },
    "cityscapes": SEGMENTER | {
        "augment.short_side": 1024, "batch_size": 8, "checkpoint_every_steps": 371,
        "data.eval_short_side": 1024, "data.eval_size": (1024, 2048),
        "data.label_size": (1024, 2048), "dataset": "cityscapes", "eval_every_steps": 1484,
        "head_overrides.depth": 1, "image_size": 768, "inference.stride": 512,
        "num_steps": 80_325, "optimizer.learning_rate": 1e-2,
    },
    "scenes": {
        "batch_size": 16, "checkpoint_every_steps": 500, "data.eval_batch_size": 20,
        "dataset": "scenes", "eval_every_steps": 500, "head_overrides.depth": 1,
        "head_overrides.head_dim": 24, "image_size": 128, "num_steps": 3000,
        "optimizer.warmup_steps": 100,
    } | overrides(
        dim=96, depth=8, num_heads=4, patch_size=8, position_size=(128, 128), drop_path=0.0,
        remat=False, init_std=0.1,
    ),
}  # fmt: skip


MAPS_ADE20K = {
    "augment.flip": 0.5, "augment.max_class_share": 0.75, "augment.photometric": True,
    "augment.scale_range": (0.5, 2.0), "augment.short_side": 512, "batch_size": 16,
    "checkpoint_every_steps": 4000, "data.eval_batch_size": 8, "data.eval_short_side": 512,
    "data.eval_size": (2048, 2048), "data.label_size": (2100, 2100), "data.workers": "auto",
    "dataset": "ade20k", "dtype": "bfloat16", "eval_every_steps": 16_000, "image_size": 512,
    "inference.window": "whole", "optimizer.end_learning_rate": 0.0,
    "optimizer.schedule": "polynomial",
}  # fmt: skip
UPERNET = MAPS_ADE20K | {
    "head": "upernet", "num_steps": 160_000, "optimizer.learning_rate": 6e-5,
    "optimizer.warmup_learning_rate": 6e-11, "optimizer.warmup_steps": 1500,
    "optimizer.weight_decay": 0.01,
}  # fmt: skip
SEMANTIC_FPN = MAPS_ADE20K | {
    "head": "semantic_fpn", "num_steps": 80_000, "optimizer.learning_rate": 1e-4,
    "optimizer.power": 0.9, "optimizer.weight_decay": 1e-4,
} | overrides(drop_path=0.1, remat=False)  # fmt: skip
UPERNET_DROP_PATH = {"clustr_s": 0.1, "dgt_b": 0.5, "pale_b": 0.5}
MAPS_SCENES = {
    "batch_size": 16, "checkpoint_every_steps": 500, "data.eval_batch_size": 20,
    "dataset": "scenes", "eval_every_steps": 500, "head_overrides.channels": 32,
    "head_overrides.init_std": 0.1, "image_size": 128, "log_every_steps": 50, "model": "swin_t",
    "num_steps": 1000, "optimizer.learning_rate": 3e-3, "optimizer.warmup_steps": 100,
} | overrides(
    dims=(24, 48, 96, 96), num_heads=(1, 2, 4, 4), depths=(1, 1, 6, 1), window_size=8,
    drop_path=0.0, remat=False,
)  # fmt: skip


DPT = {
    "augment.brightness_range": (0.9, 1.1), "augment.color_range": (0.9, 1.1),
    "augment.flip": 0.5, "augment.gamma_range": (0.9, 1.1), "augment.rotation": 2.5,
    "batch_size": 16, "data.eval_batch_size": 8, "data.normalization": "inception",
    "data.workers": "auto", "dtype": "bfloat16", "model": "vit_b_r50",
    "model_overrides.remat": False, "optimizer.backbone_factor": 0.1,
    "optimizer.end_learning_rate": 1e-6, "optimizer.learning_rate": 1e-4,
    "optimizer.weight_decay": 0.0,
}  # fmt: skip
DPT_DATASETS = {
    "kitti": DPT | {
        "augment.frame": "kitti", "checkpoint_every_steps": 1447, "data.depth_size": (376, 1242),
        "data.eval_size": (352, 1216), "data.frame": "kitti", "dataset": "kitti_depth",
        "depth.crop": "garg", "depth.scale": 0.00006016, "depth.shift": 0.00579,
        "eval_every_steps": 1447, "image_size": (352, 704), "num_steps": 34_737,
    },
    "nyu": DPT | {
        "augment.brightness_range": (0.75, 1.25), "augment.frame": "nyu",
        "checkpoint_every_steps": 1514, "data.depth_size": (480, 640),
        "data.eval_size": (480, 640), "dataset": "nyu_depth_v2", "depth.crop": "eigen_nyu",
        "depth.limits": (1e-3, 10.0), "depth.scale": 0.000305, "depth.shift": 0.1378,
        "eval_every_steps": 1514, "image_size": (416, 544), "num_steps": 36_346,
    },
    "scenes": {
        "augment.flip": 0.5, "batch_size": 16, "checkpoint_every_steps": 100,
        "data.eval_batch_size": 20, "dataset": "depth_scenes", "depth.limits": (1e-3, 20.0),
        "depth.shift": 0.05, "eval_every_steps": 100, "head_overrides.channels": 32,
        "head_overrides.level_channels": (24, 48, 96, 96), "image_size": 128, "model": "vit_ti",
        "log_every_steps": 25, "num_steps": 300, "optimizer.warmup_steps": 50,
    } | overrides(
        dim=96, depth=4, num_heads=4, patch_size=8, position_size=(128, 128), drop_path=0.0,
        remat=False, init_std=0.1,
    ),
}  # fmt: skip


EPOCH = 7330  # steps
COCO = {
    "augment.flip": 0.5, "batch_size": 16, "checkpoint_every_steps": 1466,
    "data.eval_batch_size": 8, "data.long_side": 1333, "data.workers": "auto", "dataset": "coco",
    "dtype": "bfloat16", "eval_every_steps": EPOCH, "image_size": (800, 1344),
    "model_overrides.remat": False, "num_steps": 12 * EPOCH,
    "optimizer.milestones": (8 * EPOCH, 11 * EPOCH), "optimizer.schedule": "step",
    "optimizer.learning_rate": 1e-4, "optimizer.warmup_learning_rate": 1e-4 / 1000,
    "optimizer.warmup_steps": 500,
}  # fmt: skip
THREE_TIMES = {
    "augment.detr_crop": True, "augment.short_sides": tuple(range(480, 801, 32)),
    "num_steps": 36 * EPOCH, "optimizer.milestones": (27 * EPOCH, 33 * EPOCH),
}  # fmt: skip
# Model -> drop path and weight decay.
DETECTORS = {
    "clustr_s": (0.1, 1e-4), "dgt_t": (0.1, 0.05), "dgt_s": (0.3, 0.05), "dgt_b": (0.5, 0.05),
    "pale_t": (0.2, 1e-3), "pale_s": (0.3, 1e-3), "pale_b": (0.5, 0.05),
    "swin_t": (0.1, 0.05), "swin_s": (0.2, 0.05), "swin_b": (0.3, 0.05),
}  # fmt: skip
OBJECT_SCENES = {
    "batch_size": 16, "checkpoint_every_steps": 300, "data.eval_batch_size": 20,
    "data.max_objects": 4, "dataset": "scene_instances", "eval_every_steps": 600,
    "head_overrides.channels": 32, "head_overrides.max_detections": 20,
    "head_overrides.num_candidates": 100, "image_size": 128, "log_every_steps": 50,
    "model": "swin_t", "num_steps": 600, "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 60,
} | overrides(
    dims=(24, 48, 96, 96), num_heads=(1, 2, 4, 4), depths=(1, 1, 6, 1), window_size=8,
    drop_path=0.0, remat=False,
)  # fmt: skip
NARROW_DETECTORS = {
    "mask_rcnn": {
        "head_overrides.hidden": 128, "head_overrides.num_anchors": 128,
        "head_overrides.num_proposals": 100, "head_overrides.num_rois": 64,
    },
    "retinanet": {"head_overrides.num_convs": 2},
}  # fmt: skip
NARROW_DETECTORS["htc"] = NARROW_DETECTORS["mask_rcnn"] | {
    "head_overrides.num_box_convs": 2, "head_overrides.num_mask_convs": 2,
    "head_overrides.num_stuff": 6, "num_steps": 240, "eval_every_steps": 240,
    "checkpoint_every_steps": 120, "optimizer.warmup_steps": 24,
}  # fmt: skip
HTC_EPOCH = 1833  # steps
HTC = COCO | {
    "augment.jitter": (0.1, 2.0), "batch_size": 64, "checkpoint_every_steps": 366,
    "data.eval_short_side": 1100, "data.long_side": 1536, "eval_every_steps": HTC_EPOCH,
    "head": "htc", "image_size": 1536, "model": "swinv2_l", "num_steps": 36 * HTC_EPOCH,
    "optimizer.backbone_factor": 0.1, "optimizer.learning_rate": 4e-4,
    "optimizer.milestones": (27 * HTC_EPOCH, 33 * HTC_EPOCH),
    "optimizer.warmup_learning_rate": 4e-4 / 1000,
} | overrides(
    drop_path=0.2, pretrained_window_sizes=(12, 12, 12, 6), remat=True, window_size=32
)  # fmt: skip


MASK2FORMER = {
    "augment.flip": 0.5, "batch_size": 16, "checkpoint_every_steps": 5000, "clip_norm": 0.01,
    "data.eval_batch_size": 8, "data.workers": "auto", "dtype": "bfloat16",
    "eval_every_steps": 5000, "head_overrides.num_queries": 100, "optimizer.backbone_factor": 0.1,
    "optimizer.learning_rate": 1e-4, "optimizer.weight_decay": 0.05,
} | overrides(drop_path=0.3, remat=False)  # fmt: skip
MASK_DATASETS = {
    "coco": {
        "augment.jitter": (0.1, 2.0), "data.eval_size": (800, 1344), "data.long_side": 1333,
        "data.result_size": (640, 640), "image_size": 1024, "num_steps": 737_500,
        "optimizer.milestones": (655_556, 710_184), "optimizer.schedule": "step",
    },
    "ade20k": {
        "augment.long_side": 2560, "augment.photometric": True,
        "augment.short_sides": tuple(range(320, 1281, 64)), "data.eval_size": (640, 1024),
        "data.result_size": (2100, 2100), "image_size": 640, "num_steps": 160_000,
        "optimizer.end_learning_rate": 0.0, "optimizer.power": 0.9,
        "optimizer.schedule": "polynomial",
    },
}  # fmt: skip
MASK_SCENES = {
    "augment.jitter": (0.8, 1.25), "batch_size": 8, "checkpoint_every_steps": 600,
    "clip_norm": 1.0, "data.eval_batch_size": 20, "data.max_segments": 6,
    "eval_every_steps": 1200, "head_overrides.channels": 64, "head_overrides.depth": 6,
    "head_overrides.encoder_depth": 1, "head_overrides.encoder_hidden": 128,
    "head_overrides.hidden": 128, "head_overrides.num_heads": 2, "head_overrides.num_queries": 12,
    "image_size": 128, "log_every_steps": 100, "masks.num_points": 512, "model": "swin_t",
    "num_steps": 2400, "optimizer.learning_rate": 1e-3, "optimizer.warmup_steps": 100,
} | overrides(
    dims=(24, 48, 96, 96), num_heads=(1, 2, 4, 4), depths=(1, 1, 6, 1), window_size=8,
    drop_path=0.0, remat=False,
)  # fmt: skip


WHOLE_BODY = {
    "augment.flip": 0.5, "augment.half_body": 0.3, "augment.rotation": 40.0, "augment.scale": 0.5,
    "augment.shift": 0.16, "batch_size": 512, "checkpoint_every_steps": 293,
    "data.eval_batch_size": 256, "data.workers": "auto", "dataset": "coco_wholebody",
    "dtype": "bfloat16", "eval_every_steps": 2930, "image_size": (256, 192), "num_steps": 61_530,
    "optimizer.learning_rate": 5e-4, "optimizer.milestones": (49_810, 58_600),
    "optimizer.schedule": "step", "optimizer.warmup_learning_rate": 5e-7,
    "optimizer.warmup_steps": 500, "optimizer.weight_decay": 0.01,
} | overrides(drop_path=0.1, remat=False)  # fmt: skip
FIGURES = {
    "augment.flip": 0.5, "augment.rotation": 15.0, "augment.scale": 0.2, "augment.shift": 0.05,
    "batch_size": 16, "checkpoint_every_steps": 500, "data.eval_batch_size": 40,
    "dataset": "figures", "eval_every_steps": 1000, "head_overrides.channels": 64,
    "head_overrides.mlp_ratio": 2, "head_overrides.num_heads": 2, "image_size": (128, 96),
    "inference.refinement": "dark", "log_every_steps": 50, "model": "clustr_t",
    "num_steps": 1000, "optimizer.learning_rate": 2e-3, "optimizer.warmup_steps": 50,
    "pose.sigma": 1.5, "pose.unbiased": True,
} | overrides(
    dims=(24, 48, 96, 128), num_heads=(1, 2, 4, 4), depths=(1, 1, 2, 1), mlp_ratios=(4, 4, 4, 4),
    drop_path=0.0,
)  # fmt: skip


TASKS = {
    "segmenter": "segmentation", "upernet": "segmentation", "semantic": "segmentation",
    "dpt": "depth", "mask": "detection", "retinanet": "detection", "htc": "detection",
    "mask2former": "masks", "pose": "pose",
}  # fmt: skip


def entries_of_maps(name, arg):
    """Returns the entries of a head on maps."""
    if arg == "scenes":
        own = {"upernet": "auxiliary_channels", "semantic_fpn": "neck_channels"}[name]
        return MAPS_SCENES | {"head": name, f"head_overrides.{own}": 32}
    if name == "semantic_fpn":
        return SEMANTIC_FPN | {"model": arg}
    entries = {"model": arg} | overrides(drop_path=UPERNET_DROP_PATH.get(arg, 0.3), remat=False)
    return UPERNET | entries | (DGT | overrides(top_k=512) if arg.startswith("dgt") else {})


def entries_of_detector(name, arg):
    if arg == "scenes":
        return OBJECT_SCENES | {"head": name} | NARROW_DETECTORS[name]
    if name == "htc":
        return HTC | (overrides(window_size=48) if arg.endswith("_48") else {})
    model = arg.removesuffix("_3x")
    drop_path, weight_decay = DETECTORS[model]
    entries = COCO | {"head": name, "model": model, "optimizer.weight_decay": weight_decay}
    if arg.endswith("_3x"):
        entries |= THREE_TIMES
        drop_path = {"swin_t": 0.2}.get(model, drop_path)
    if model == "clustr_s":
        entries["optimizer.decay"] = "all"
        if name == "mask_rcnn":
            entries |= {
                "optimizer.learning_rate": 2e-4,
                "optimizer.warmup_learning_rate": 2e-4 / 1000,
            }
    entries |= overrides(drop_path=drop_path)
    return entries | (DGT | overrides(top_k=392) if model.startswith("dgt") else {})


def entries_of_masks(arg):
    if arg.startswith("scenes"):
        kind = arg.removeprefix("scenes").strip("_") or "panoptic"
        dataset = "scene_instances" if kind == "instance" else "scene_segments"
        return MASK_SCENES | {"dataset": dataset, "inference.kind": kind}
    dataset, kind, model = arg.split("_", 2)
    names = {"coco_instance": "coco", "ade20k_semantic": "ade20k"}
    entries = MASK2FORMER | MASK_DATASETS[dataset] | {"model": model, "inference.kind": kind}
    entries["dataset"] = names.get(f"{dataset}_{kind}", f"{dataset}_{kind}")
    if model == "swin_l" and kind != "semantic":
        entries["head_overrides.num_queries"] = 200
    if model in ("swin_b", "swin_l"):
        entries |= overrides(window_size=12)
    return entries | (DGT | overrides(top_k=512) if model.startswith("dgt") else {})


def entries_of_pose(arg):
    if arg == "figures":
        return FIGURES
    decay = {"optimizer.decay": "all"} if arg.startswith("clustr") else {}
    return WHOLE_BODY | {"model": arg} | decay | (DGT if arg.startswith("dgt") else {})


def expected_entries(name, arg):
    if name == "pose":
        return entries_of_pose(arg)
    if name == "mask2former":
        return entries_of_masks(arg)
    if name in NARROW_DETECTORS:
        return entries_of_detector(name, arg)
    if name == "dpt":
        return DPT_DATASETS[arg]
    if name in ("upernet", "semantic_fpn"):
        return entries_of_maps(name, arg)
    if name == "finetune":
        model, _, _ = arg.partition(",")
        return {"model": model, "initial.workdir": f"runs/{model}"} | FINETUNING[arg]
    family, size = name.split("_")
    if family == "segmenter":
        ade20k = SEGMENTER | on_side(640 if size == "l" else 512)
        return {"model": f"vit_{size}"} | ({"": ade20k} | SEGMENTER_DATASETS)[arg]
    if arg.startswith("level"):
        keep = TOKEN_POOLING[name][int(arg[-1])].keep
        return expected_entries(name, "pooled") | overrides(**{"token_reducer.keep": keep})
    if arg.endswith("_block"):  # neither groups nor centroids
        entries = expected_entries(name, "").items()
        entries = {k: v for k, v in entries if not k.endswith(OF_GROUPS)}
        return entries | overrides(block=arg.removesuffix("_block"))
    if arg == "fashion_mnist":
        return {"model": name} | FASHION_MNIST | SHRUNK[family]
    if "digits" in arg:
        entries = DIGITS | SHRUNK[family]
    else:
        entries = IMAGENET | PUBLISHED[family] | SIZES[name]
    return {"model": name} | entries | VARIANTS[arg]


def typed(value):
    """Makes tuples differ from lists, and integers from floats."""
    return type(value), tuple(map(typed, value)) if isinstance(value, tuple | list) else value


@pytest.mark.parametrize(("name", "arg"), CASES + LEVELS)
def test_entries(name, arg):
    config = load_config(name, arg)
    found = flatten_dict(config.to_dict(), sep=".")
    task = TASKS.get(name.split("_")[0], "classification")
    default = default_config(task)
    expected = flatten_dict(default.to_dict(), sep=".") | expected_entries(name, arg)
    assert {key: typed(found[key]) for key in found} == {
        key: typed(expected[key]) for key in expected
    }
