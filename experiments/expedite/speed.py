"""Measures how many of the saved multiply-adds become speed: Segmenter ViT-L/16 at 640 x 640.

    python -m experiments.expedite.speed [--clusters=28,20] [--seconds=60]

The plain model and clustered models, with random weights and one image, take turns in one process.
The paper's setting is 28 x 28 centres after block 10 with reconstructed logits; it saves a third of
the multiply-adds and reached 1.40 times the frames per second on the authors' GPU. "operators" is
the share of the time that clustering and reconstruction take by themselves.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import pages
from experiments.costs import count_macs
from experiments.expedite.published import TEMPERATURE
from experiments.runs import random_variables
from tokenvit_jax import cli
from tokenvit_jax.heads import MaskTransformer
from tokenvit_jax.measure.timing import compile_program, environment, time_in_turns
from tokenvit_jax.memory import keep_pages
from tokenvit_jax.models import create_model
from tokenvit_jax.tasks.segmentation.model import Segmenter

FLAGS = flags.FlagValues()
flags.DEFINE_string("model", "vit_l", "backbone", flag_values=FLAGS)
flags.DEFINE_list("clusters", ["28"], "sides of the map of centres", flag_values=FLAGS)
flags.DEFINE_integer("image_size", 640, "pixels", flag_values=FLAGS)
flags.DEFINE_integer("alpha", 10, "blocks on all tokens", flag_values=FLAGS)
flags.DEFINE_float("seconds", 60.0, "measuring time of each program", flag_values=FLAGS)
flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "type of the computation", flag_values=FLAGS
)

CLASSES = 150  # of ADE20K
PLAIN = "plain"
COLUMNS = [
    "centres", "GMACs", "saved", "frames per second, ratio", "share of the saving", "operators"
]  # fmt: skip


def make_models(
    model: str, image_size: tuple[int, int], alpha: int, sides: Sequence[int], dtype: jnp.dtype
) -> dict[str, Segmenter]:
    """Returns the plain Segmenter for ADE20K and the clustered ones, by name."""
    backbone = create_model(model, position_size=image_size, dtype=dtype)
    head = MaskTransformer(num_classes=CLASSES, dtype=dtype)
    models = {PLAIN: Segmenter(backbone, head)}
    for side in sides:
        expedite = {
            "alpha": alpha,
            "beta": backbone.settings.depth - alpha,
            "clusters": (side, side),
            "where": "logits",
            "temperature": TEMPERATURE,
        }
        models[f"{side} x {side}"] = Segmenter(backbone.clone(expedite=expedite), head)
    return models


def operators(backbone: nn.Module) -> Callable[[], Any]:
    """Returns a call that only clusters and reconstructs, with logits of all classes.

    Args:
      backbone: a clustered plain host.
    """
    settings, expedite = backbone.settings, backbone.settings.expedite
    side = settings.position_size[0] // settings.patch_size
    draw = np.random.default_rng(2)
    tokens, logits = (
        jnp.asarray(draw.normal(size=(1, *shape)), settings.dtype)
        for shape in ((side**2, settings.dim), (expedite.clusters[0] ** 2, CLASSES))
    )

    def run(tokens, logits):
        centers = expedite.cluster(tokens, (side, side))
        return expedite.reconstruct(tokens, centers, logits, (side, side))

    program = compile_program(run, tokens, logits).call
    return lambda: program(tokens, logits)


def make_calls(models: dict[str, Segmenter], images: jax.Array) -> dict[str, Callable[[], Any]]:
    """Returns the compiled programs that take turns, by name."""
    variables, calls = random_variables(models[PLAIN], images), {}
    for name, model in models.items():
        apply = functools.partial(model.apply, train=False)
        program = compile_program(apply, variables, images).call
        calls[name] = functools.partial(program, variables, images)
        if model.backbone.settings.expedite:
            calls[f"operators of {name}"] = operators(model.backbone)
    return calls


def table(macs: dict[str, float], times: dict[str, Sequence[float]]) -> list[str]:
    """Returns the lines of costs and speeds.

    Args:
      macs: 10^9 multiply-adds of every model.
      times: seconds of every call of every program.
    """
    median, rows = {name: np.median(passed) for name, passed in times.items()}, []
    for name in macs:
        saved, speedup = macs[PLAIN] / macs[name], median[PLAIN] / median[name]
        share = median.get(f"operators of {name}", 0.0) / median[name]
        ratios = [f"{value:.2f}" for value in (saved, speedup, speedup / saved)]
        rows.append([name, f"{macs[name]:.1f}", *ratios, f"{share:.1%}"])
    return pages.table(COLUMNS, rows)


def main(flag_values: flags.FlagValues) -> None:
    """Measures and prints the table."""
    keep_pages()
    size = (flag_values.image_size, flag_values.image_size)
    sides = [int(side) for side in flag_values.clusters]
    dtype = jnp.dtype(flag_values.dtype)
    models = make_models(flag_values.model, size, flag_values.alpha, sides, dtype)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, *size, 3)), jnp.float32)
    macs = {name: count_macs(model, size) / 1e9 for name, model in models.items()}
    times = time_in_turns(make_calls(models, images), seconds=flag_values.seconds)
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    print("\n".join(table(macs, times)))
    print(f"rounds: {len(times[PLAIN])}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
