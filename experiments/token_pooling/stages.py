"""Trains a small DeiT (stage 1 of Token Pooling) and tunes it with a token reducer (stage 3).

The DeiT has 64 patches and 6 blocks and is trained on the embedded digits; its configuration is
recipes.vit.deit_digits_config.
"""

import functools
from collections.abc import Callable, Sequence

import jax
from matplotlib.axes import Axes
from ml_collections import ConfigDict

from experiments import plots
from experiments.costs import count_macs
from experiments.runs import ShortRun, train
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
ABOUT = (
    "This is NOT ImageNet: handwritten digits of 64 x 64 pixels, 360 test images, so one image is "
    "0.003. A DeiT with 6 blocks and 64 patches is trained for 400 steps"
)


def base_config(seed: int, qk_norm: str = "none") -> ConfigDict:
    """Returns the configuration of stage 1."""
    config = deit_digits_config(MODEL)
    config.seed = seed
    config.model_overrides.qk_norm = qk_norm
    return config


@functools.cache
def train_base(seed: int, qk_norm: str = "none") -> ShortRun:
    """Trains stage 1, once per process."""
    run = train(base_config(seed, qk_norm))
    print(f"base, seed {seed}, qk_norm {qk_norm}: test accuracy {run.accuracy:.4f}", flush=True)
    return run


def tune(
    seed: int, reducer: dict | None, *, num_steps: int = TUNED_STEPS, qk_norm: str = "none"
) -> ShortRun:
    """Trains stage 3 from the base of a seed, with the same batches for all methods.

    Args:
      seed: seed of the base; the batches differ from the base's batches.
      reducer: attributes of `TokenReducer` by name; None: all patches stay.
      num_steps: length of training, including 10 steps of warm-up; the learning rate is half of
        stage 1's.
      qk_norm: normalisation of queries and keys in the base.
    """
    config = base_config(seed + 100, qk_norm)
    config.num_steps = num_steps
    config.optimizer.learning_rate /= 2
    config.optimizer.warmup_steps = 10
    if reducer:
        config.model_overrides.token_reducer = reducer
    run = train(config, initial=train_base(seed, qk_norm).variables)
    # The compiled steps of earlier runs are no longer needed.
    jax.clear_caches()
    print(f"{reducer}, seed {seed}: {run.accuracy:.4f}, loss {run.test_loss:.4f}", flush=True)
    return run


def shrinking_keep(num_patches: int, depth: int, last: float) -> tuple[int, ...]:
    """Returns K of every block; each block drops the same share of its patches.

    Args:
      num_patches: N, before the first block.
      depth: number of blocks.
      last: share of the N patches that leaves the last block, in (0, 1].
    """
    return tuple(int(num_patches * last ** (block / depth)) for block in range(1, depth + 1))


def mmacs(run: ShortRun) -> float:
    """Counts 10^6 multiply-adds of one image of 64 x 64 pixels."""
    return count_macs(run.model, (64, 64)) / 1e6


def format_keep(keep: Sequence[int]) -> str:
    """Formats K of all blocks."""
    return f"K = {', '.join(map(str, keep))}"


def draw_results(
    axis: Axes,
    groups: Sequence[Sequence[ShortRun]],
    read: Callable[[ShortRun], float],
    colors: Sequence[str],
    title: str,
) -> None:
    """Draws a row for every group of runs, one point per seed.

    Args:
      axis: the panel.
      groups: runs over seeds.
      read: function that returns the drawn value of a run.
      colors: colour of each group.
      title: title of the panel.
    """
    plots.draw_seeds(axis, [[read(run) for run in group] for group in groups], colors)
    axis.set_title(title, fontsize=9)
