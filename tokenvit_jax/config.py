"""Every entry of a training configuration, with its meaning and default.

The recipes in :mod:`tokenvit_jax.recipes` start from here. Entries can be overridden on the command
line with ``--config.a.b=value``; a key that is not listed here fails at once.
"""

from typing import Any

from ml_collections import ConfigDict

IMAGENET_TRAIN_IMAGES = 1_281_167


def default_config() -> ConfigDict:
    """Returns the configuration that all others start from: no augmentation, no regularisation."""
    config = ConfigDict()
    # The network: a name of `tokenvit_jax.list_models()` and arguments of `create_model`.
    config.model = "dgt_t"
    config.model_overrides = ConfigDict()
    # Of segmentation: its head, a name of `tasks.segmentation.HEADS`, and arguments of it.
    config.head = "mask_transformer"
    config.head_overrides = ConfigDict()
    config.dtype = "float32"  # compute: "float32" | "bfloat16"; parameters stay float32
    config.seed = 0

    # The run that training starts from: its parameters only.
    config.initial = ConfigDict()
    config.initial.workdir = ""  # a run, or published weights that `convert` wrote; "": random
    config.initial.checkpoint = "last"  # "last", "best" or a step

    # The data.
    config.dataset = "digits"  # a name of `tokenvit_jax.data.list_datasets()`
    config.image_size = 224  # height and width, pixels
    config.batch_size = 128  # images per step, all devices of all processes together
    config.data = ConfigDict()
    config.data.data_dir = "~/tensorflow_datasets"  # where `prepare` wrote the dataset
    config.data.workers = 0  # worker processes that read ahead; 0: read in the training process
    config.data.on_corrupt = "raise"  # unreadable image: "raise" | "skip" (counted and logged)
    config.data.repeats = 1  # repeated augmentation: most times an image occurs in a batch
    config.data.eval_batch_size = 128  # images per evaluation step, all devices together
    config.data.eval_crop = 0.875  # classification: centre crop / resized shorter side
    # Segmentation: images are resized, then shrunk into a buffer if need be, and the predictions
    # are compared with the label maps as they are.
    config.data.eval_short_side = 0  # of the resized image, pixels; 0: image_size
    config.data.eval_size = (0, 0)  # height and width of the buffer; zeros: image_size
    config.data.label_size = (0, 0)  # buffer of the label maps; zeros: that of the images
    config.data.normalization = "imagenet"  # of the pixels: "imagenet" | "inception" (0.5 and 0.5)
    config.augment = ConfigDict()
    config.augment.flip = 0.0  # probability of a horizontal flip
    # Classification only.
    config.augment.crop_scale = (1.0, 1.0)  # random resized crop: area; (1, 1): no crop
    config.augment.crop_ratio = (3 / 4, 4 / 3)  # random resized crop: width / height
    config.augment.color_jitter = 0.0  # strength of brightness, contrast, saturation
    config.augment.randaugment = ConfigDict()
    config.augment.randaugment.num_ops = 0  # operations per image; 0: none
    config.augment.randaugment.magnitude = 9.0  # 0 to 10
    config.augment.randaugment.magnitude_std = 0.5  # of the normal noise on the magnitude
    config.augment.erasing = 0.0  # probability of random erasing, pixel noise
    config.augment.rotation = 0.0  # largest random rotation, degrees
    config.augment.translation = 0.0  # largest random shift, as a part of the side
    # Segmentation only.
    config.augment.short_side = 0  # of the resized image, before the factor; 0: image_size
    config.augment.scale_range = (1.0, 1.0)  # random factor of the size
    config.augment.max_class_share = 1.0  # of a crop's pixels that count; 1: any crop will do
    config.augment.photometric = False  # brightness, contrast, saturation and hue, 1/2 each

    # Mixing of the images of a batch, inside the step.
    config.mix = ConfigDict()
    config.mix.mixup = 0.0  # alpha of the Beta distribution; 0: off
    config.mix.cutmix = 0.0  # alpha of the Beta distribution; 0: off
    config.mix.mixtoken = 0.0  # alpha of the Beta distribution; 0: off; not with the other two
    config.mix.probability = 1.0  # of mixing a batch at all
    config.mix.switch_probability = 0.5  # of CutMix rather than Mixup where both are on

    # Labels of every cell of the last map, for a model with a token head.
    config.token_labels = ConfigDict()
    config.token_labels.weight = 0.0  # of their loss beside that of the class; 0: off
    config.token_labels.teacher = ""  # workdir of a run that labels the images as they are trained
    config.token_labels.teacher_checkpoint = "best"  # "last", "best" or a step
    config.token_labels.files = ""  # folder that `label` wrote, instead of a teacher

    # Optimisation.
    config.num_steps = 1000
    config.accumulate_steps = 1  # micro-batches per step, one after another
    config.label_smoothing = 0.0
    config.clip_norm = 0.0  # largest global norm of the gradient; 0: off
    config.ema_decay = 0.0  # moving average of the parameters, used for evaluation; 0: off
    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # "adamw" | "sgd", with Nesterov's momentum
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05  # not on norms, biases, scales and positions
    config.optimizer.b1 = 0.9  # of the moving average of gradients; of "sgd": the momentum
    config.optimizer.b2 = 0.999  # of that of their squares; of "adamw" only
    config.optimizer.schedule = "cosine"  # "cosine" | "polynomial", per step, after the warm-up
    config.optimizer.power = 1.0  # of "polynomial"; 1: linear
    config.optimizer.warmup_steps = 0  # linear
    config.optimizer.warmup_learning_rate = 1e-6  # at step 0
    config.optimizer.end_learning_rate = 1e-5  # at the last step
    # Weight of the old query centroid in Eq. 4 of DGT: "literal" (0.1 x learning rate, the text of
    # the paper), "swapped" (1 - 0.1 x learning rate) or "constant" (`centroids.old_weight`). The
    # default is a choice on weak evidence: the rules do not differ in accuracy (experiments/dgt).
    config.centroids = ConfigDict()
    config.centroids.rule = "constant"
    config.centroids.old_weight = 0.9

    # Search for the number of tokens of every block: with the token reducer "soft_extract".
    config.retention = ConfigDict()
    config.retention.penalty = 0.0  # of block l: times l times the sum of its parameters
    config.retention.learning_rate_factor = 1.0  # of these parameters, beside all others

    # Of segmentation: an image that is larger than a window is seen in several.
    config.inference = ConfigDict()
    config.inference.window = 0  # side, pixels; 0: image_size
    config.inference.stride = 0  # distance of two windows, pixels; 0: that of their sides

    # Devices.
    config.parallel = "jit"  # "jit" (over a mesh of all devices) | "pmap"
    config.mesh = ConfigDict()
    config.mesh.fsdp = 1  # devices over which parameters and optimizer state are sharded ("jit")

    # What is written into the workdir, and when.
    config.log_every_steps = 50
    config.eval_every_steps = 1000
    config.checkpoint_every_steps = 1000
    config.keep_last_checkpoints = 2
    config.keep_best_checkpoints = 1  # by eval/miou where there is one, else eval/accuracy
    config.profile = ""  # steps of a profiler trace, "first:last"; "": none
    return config


def read_entry(config: ConfigDict, key: str) -> Any:
    """Returns the entry of a configuration that a key such as "data.eval_crop" names."""
    for part in key.split("."):
        config = config[part]
    return config
