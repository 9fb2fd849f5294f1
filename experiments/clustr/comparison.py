"""The qualitative claims of ClusTR on the embedded digits, over several seeds.

    python -m experiments.clustr.comparison

Clusters against grid pooling (Table 6), several scales against one (Table 7), the two rules of
assignment, and a number of clusters that follows the content (left to future work in the paper,
Section A2) at about as many clusters on average. This is NOT ImageNet: turned and shifted
digits of 64 x 64, a shrunk ClusTR, 160 steps. Writes comparison.md and comparison.png here.
"""

from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from experiments.short_runs import Run, make_hard, write_comparison
from tokenvit_jax.recipes import clustr_digits_config
from tokenvit_jax.tasks.batches import eval_dataset
from tokenvit_jax.training.step import normalize

SEEDS = (0, 1, 2)
ONE_SCALE = ((64,), (16,), (4,), (1,))
# At most twice the clusters, half of them used on average. Stage 3 keeps all tokens at one scale.
TWICE = ((32, 8), (8, 2), (2, 1), (1,))
SETTINGS = {
    "grid pooling, one scale": {"ratios": ONE_SCALE, "aggregation": "grid"},
    "clusters, one scale": {"ratios": ONE_SCALE},
    "clusters, one finer scale": {"ratios": ((16,), (4,), (1,), (1,))},
    "clusters, two scales": {},
    "two scales, rule of the text": {"assign": "parent"},
    "two scales, adaptive": {"ratios": TWICE, "adaptive": 0.5},
}
FOLDER = Path(__file__).parent


def make_config():
    return make_hard(clustr_digits_config("clustr_t"))


def clusters_used(run: Run) -> dict[str, np.ndarray]:
    """Returns, for each clustering with a threshold, how many clusters each test image used.

    Args:
      run: of an adaptive model.
    """
    config = make_config()

    @jax.jit
    def apply(images):
        images = normalize(images, config.data.normalization)
        _, noted = run.model.apply(run.variables, images, train=False, mutable=["intermediates"])
        flat = flatten_dict(noted["intermediates"], sep="/")
        return {name: used[0].sum(1) for name, used in flat.items() if "used" in name}

    batches = [jax.device_get(apply(batch["image"])) for batch in eval_dataset(config)]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def adaptive_table(runs: list[Run]) -> list[str]:
    """How many clusters the adaptive model used on the test images, seed by seed."""
    lines = [
        "| seed | block and scale | most | mean over images | lowest and highest image |",
        "| --- | --- | --- | --- | --- |",
    ]
    for seed, run in zip(SEEDS, runs, strict=True):
        most = static_numbers(run)
        for name, used in clusters_used(run).items():
            cells = f"{most[name]} | {used.mean():.1f} | {used.min()}, {used.max()}"
            lines.append(f"| {seed} | {name} | {cells} |")
    return lines


def static_numbers(run: Run) -> dict[str, int]:
    """Returns the largest number of clusters of each clustering with a threshold."""
    size = make_config().image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    _, noted = jax.eval_shape(
        lambda v, x: run.model.apply(v, x, train=False, mutable=["intermediates"]),
        run.variables,
        images,
    )
    flat = flatten_dict(noted["intermediates"], sep="/")
    return {name: used[0].shape[1] for name, used in flat.items() if "used" in name}


if __name__ == "__main__":
    results, lines = write_comparison(
        FOLDER, make_config, SETTINGS, SEEDS, network="Shrunk ClusTR", column="keys and values"
    )
    lines += [
        "",
        "Clusters that the adaptive model used on the test images:",
        "",
        *adaptive_table(results["two scales, adaptive"]),
    ]
    (FOLDER / "comparison.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
