"""The qualitative claims of the Pale Transformer on the embedded digits, over several seeds.

    python -m experiments.pale.comparison

Modes of attention (Table 8) and position encodings (Table 9). This is NOT ImageNet: turned and
shifted digits of 64 x 64, a shrunk Pale-T, 160 steps. Writes comparison.md and comparison.png here.
"""

from pathlib import Path

from experiments.short_runs import make_hard, write_comparison
from tokenvit_jax.recipes.pale import pale_digits_config

SEEDS = (0, 1, 2)
SETTINGS = {
    "axial": {"pale_sizes": (1, 1, 1, 1)},
    "cross-shaped": {"mode": "cross"},
    "pale, sequential": {"mode": "sequential"},
    "pale, vanilla": {"mode": "vanilla"},
    "pale, parallel": {},
    "pale, parallel, APE": {"position": "ape"},
    "pale, parallel, no position": {"position": "none"},
}
FOLDER = Path(__file__).parent


def make_config():
    return make_hard(pale_digits_config("pale_t"))


if __name__ == "__main__":
    results, lines = write_comparison(
        FOLDER, make_config, SETTINGS, SEEDS, network="Shrunk Pale-T", column="attention"
    )
    (FOLDER / "comparison.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
