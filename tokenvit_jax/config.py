"""Every entry of a training configuration, with its meaning and default.

A file in ``configs/`` starts from :func:`default_config` or :func:`imagenet_recipe` and changes
what its paper says. Entries can be overridden on the command line with ``--config.a.b=value``; a
key that is not listed here fails at once.
"""

from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError

IMAGENET_TRAIN_IMAGES = 1_281_167


def default_config() -> ConfigDict:
    """Returns the configuration that all others start from: no augmentation, no regularisation."""
    config = ConfigDict()
    # The network: a name of `tokenvit_jax.list_models()` and arguments of `create_model`.
    config.model = "dgt_t"
    config.model_overrides = ConfigDict()
    config.dtype = "float32"  # compute: "float32" | "bfloat16"; parameters stay float32
    config.seed = 0

    # The data.
    config.dataset = "digits"  # a name of `tokenvit_jax.data.list_datasets()`
    config.image_size = 224  # height and width, pixels
    config.batch_size = 128  # images per step, all devices of all processes together
    config.data = ConfigDict()
    config.data.data_dir = "~/tensorflow_datasets"  # where `prepare` wrote the dataset
    config.data.workers = 0  # worker processes that read ahead; 0: read in the training process
    config.data.on_corrupt = "raise"  # unreadable image: "raise" | "skip" (counted and logged)
    config.data.repeats = 1  # repeated augmentation: times an image occurs in a pass
    config.data.eval_batch_size = 128  # images per evaluation step, all devices together
    config.data.eval_crop = 0.875  # centre crop / resized shorter side
    config.augment = ConfigDict()
    config.augment.crop_scale = (1.0, 1.0)  # random resized crop: area; (1, 1): no crop
    config.augment.crop_ratio = (3 / 4, 4 / 3)  # random resized crop: width / height
    config.augment.flip = 0.0  # probability of a horizontal flip
    config.augment.color_jitter = 0.0  # strength of brightness, contrast, saturation
    config.augment.randaugment = ConfigDict()
    config.augment.randaugment.num_ops = 0  # operations per image; 0: none
    config.augment.randaugment.magnitude = 9.0  # 0 to 10
    config.augment.randaugment.magnitude_std = 0.5  # of the normal noise on the magnitude
    config.augment.erasing = 0.0  # probability of random erasing, pixel noise
    config.augment.rotation = 0.0  # largest random rotation, degrees
    config.augment.translation = 0.0  # largest random shift, as a part of the side

    # Mixing of the images of a batch, inside the step.
    config.mix = ConfigDict()
    config.mix.mixup = 0.0  # alpha of the Beta distribution; 0: off
    config.mix.cutmix = 0.0  # alpha of the Beta distribution; 0: off
    config.mix.probability = 1.0  # of mixing a batch at all
    config.mix.switch_probability = 0.5  # of CutMix rather than Mixup where both are on

    # Optimisation.
    config.num_steps = 1000
    config.accumulate_steps = 1  # micro-batches per step, one after another
    config.label_smoothing = 0.0
    config.clip_norm = 0.0  # largest global norm of the gradient; 0: off
    config.ema_decay = 0.0  # moving average of the parameters, used for evaluation; 0: off
    config.optimizer = ConfigDict()  # AdamW with linear warm-up and cosine decay per step
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05  # not on norms, biases, scales and positions
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.warmup_steps = 0
    config.optimizer.warmup_learning_rate = 1e-6  # at step 0
    config.optimizer.end_learning_rate = 1e-5  # at the last step
    # Weight of the old query centroid in Eq. 4 of DGT: "literal" (0.1 x learning rate, the text of
    # the paper), "swapped" (1 - 0.1 x learning rate) or "constant" (`centroids.old_weight`). The
    # default is a choice on weak evidence: the rules do not differ in accuracy (experiments/dgt).
    config.centroids = ConfigDict()
    config.centroids.rule = "constant"
    config.centroids.old_weight = 0.9

    # Devices.
    config.parallel = "jit"  # "jit" (over a mesh of all devices) | "pmap"
    config.mesh = ConfigDict()
    config.mesh.fsdp = 1  # devices over which parameters and optimizer state are sharded ("jit")

    # What is written into the workdir, and when.
    config.log_every_steps = 50
    config.eval_every_steps = 1000
    config.checkpoint_every_steps = 1000
    config.keep_last_checkpoints = 2
    config.keep_best_checkpoints = 1  # by eval/accuracy
    config.profile = ""  # steps of a profiler trace, "first:last"; "": none
    return config


def imagenet_recipe(*, epochs: int = 300, warmup_epochs: int = 20) -> ConfigDict:
    """Returns the ImageNet-1K recipe that Swin, CMT and their successors share.

    AdamW, weight decay 0.05, learning rate 1e-3 at batch 1024, cosine decay over 300 epochs after
    20 epochs of warm-up, RandAugment 9 / 0.5, Mixup 0.8, CutMix 1.0, erasing 0.25, label
    smoothing 0.1. A config states what differs from it.
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


def dgt_config(model: str, arg: str, *, drop_path: float) -> ConfigDict:
    """Returns the configuration of a DGT: the published one for ``arg`` "", else "digits"."""
    if arg == "digits":
        return dgt_digits_config(model)
    if arg:
        raise UserError(f"config argument {arg!r} is not valid; valid: none, digits")
    config = imagenet_recipe()
    config.model = model
    config.model_overrides = {
        "num_groups": 48, "top_k": 98, "drop_path": drop_path, "remat": False
    }  # fmt: skip
    return config


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
