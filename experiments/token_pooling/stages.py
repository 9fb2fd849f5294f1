"""Stages 1 and 3 of Token Pooling in short: a small DeiT, and what is tuned from it.

64 patches, 6 blocks, the embedded digits: recipes.vit.deit_digits_config.
"""

import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.short_runs import Run, train
from tokenvit_jax.measure.macs import summarize_model
from tokenvit_jax.recipes.vit import deit_digits_config

MODEL = "deit_s"
NUM_PATCHES, DEPTH = 64, 6
TUNED_STEPS = 100
LABELS = {
    "random": "random selection",
    "importance": "importance selection",
    "powerbert": "PoWER-BERT",
    "kmeans": "K-Means",
    "weighted_kmeans": "weighted K-Means",
    "kmedoids": "K-Medoids",
    "weighted_kmedoids": "weighted K-Medoids",
    "tome": "Token Merging",
}
NOT_IMAGENET = "This is NOT ImageNet: handwritten digits of 64 x 64 pixels, 360 test images."


def base_config(seed: int, qk_norm: str = "none") -> ConfigDict:
    """Returns the configuration of stage 1."""
    config = deit_digits_config(MODEL)
    config.seed = seed
    config.model_overrides.qk_norm = qk_norm
    return config


@functools.cache
def train_base(seed: int, qk_norm: str = "none") -> Run:
    """Trains stage 1, once per process."""
    run = train(base_config(seed, qk_norm))
    print(f"base, seed {seed}, qk_norm {qk_norm}: test accuracy {run.accuracy:.4f}", flush=True)
    return run


def tune(
    seed: int, reducer: dict | None, *, num_steps: int = TUNED_STEPS, qk_norm: str = "none"
) -> Run:
    """Trains stage 3 from the base of a seed: all methods see the same batches.

    Args:
      seed: of the base; the batches are others than those of the base.
      reducer: attributes of `TokenReducer` by name; None: all patches stay.
      num_steps: of training, 10 of them warm-up; the learning rate is half of that of stage 1.
      qk_norm: of the base.
    """
    config = base_config(seed + 100, qk_norm)
    config.num_steps = num_steps
    config.optimizer.learning_rate /= 2
    config.optimizer.warmup_steps = 10
    if reducer:
        config.model_overrides.token_reducer = reducer
    run = train(config, initial=train_base(seed, qk_norm))
    # Compiled steps of earlier runs are of no use any more.
    jax.clear_caches()
    print(f"{reducer}, seed {seed}: {run.accuracy:.4f}, loss {run.test_loss:.4f}", flush=True)
    return run


def shrinking_keep(num_patches: int, depth: int, last: float) -> tuple[int, ...]:
    """Returns K of every block: the same part is dropped in each.

    Args:
      num_patches: N, before the first block.
      depth: number of blocks.
      last: part of N that leaves the last block, in (0, 1].
    """
    return tuple(int(num_patches * last ** (block / depth)) for block in range(1, depth + 1))


def mmacs(run: Run) -> float:
    """Counts 10^6 multiply-adds of one image of 64 x 64."""
    return summarize_model(run.model, (64, 64), MODEL).macs / 1e6


def spread(values) -> str:
    """Formats the mean of signed differences and their standard deviation over seeds."""
    return f"{np.mean(values):+.3f} ± {np.std(values, ddof=1):.3f}"
