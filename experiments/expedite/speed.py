"""How much of the saved multiply-adds becomes speed: Segmenter ViT-L/16 at 640 x 640.

    python -m experiments.expedite.speed [--clusters=28,20] [--seconds=60]

Random weights, one image, the plain model and clustered ones in turns in one process; 28 x 28
centres after block 10 with the logits reconstructed is the paper's setting, which saves a third of
the multiply-adds and reached 1.40 times the frames per second on its GPU. "operators": the part of
the time that clustering and reconstruction take by themselves.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from tokenvit_jax import cli
from tokenvit_jax.benchmark import compile_program, environment, time_in_turns
from tokenvit_jax.heads import MaskTransformer
from tokenvit_jax.memory import keep_pages
from tokenvit_jax.models import create_model
from tokenvit_jax.summary import summarize_model
from tokenvit_jax.tasks.segmentation import Segmenter

FLAGS = flags.FlagValues()
flags.DEFINE_string("model", "vit_l", "backbone", flag_values=FLAGS)
flags.DEFINE_list("clusters", ["28"], "sides of the map of centres", flag_values=FLAGS)
flags.DEFINE_integer("image_size", 640, "pixels", flag_values=FLAGS)
flags.DEFINE_integer("alpha", 10, "blocks on all tokens", flag_values=FLAGS)
flags.DEFINE_float("seconds", 60.0, "of measurement, each", flag_values=FLAGS)
flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "of the computation", flag_values=FLAGS
)


def make_models(model, image_size, alpha, sides, dtype):
    """Returns the plain Segmenter of ADE20K and the clustered ones, by name."""
    backbone = create_model(model, position_size=image_size, dtype=dtype)
    head = MaskTransformer(num_classes=150, dtype=dtype)
    models = {"plain": Segmenter(backbone, head)}
    for side in sides:
        expedite = {
            "alpha": alpha,
            "beta": backbone.settings.depth - alpha,
            "clusters": (side, side),
            "where": "logits",
        }
        models[f"{side} x {side}"] = Segmenter(backbone.clone(expedite=expedite), head)
    return models


def operators(backbone):
    """Returns clustering and reconstruction of a clustered host, with logits of 150 classes."""
    settings, expedite = backbone.settings, backbone.settings.expedite
    side = settings.position_size[0] // settings.patch_size
    draw = np.random.default_rng(2)
    tokens, logits = (
        jnp.asarray(draw.normal(size=(1, *shape)), settings.dtype)
        for shape in ((side**2, settings.dim), (expedite.clusters[0] ** 2, 150))
    )

    def run(tokens, logits):
        centers = expedite.cluster(tokens, (side, side))
        return expedite.reconstruct(tokens, centers, logits, (side, side))

    program = compile_program(run, tokens, logits).call
    return lambda: program(tokens, logits)


def main(flag_values):
    keep_pages()
    size = (flag_values.image_size, flag_values.image_size)
    sides = [int(side) for side in flag_values.clusters]
    dtype = jnp.dtype(flag_values.dtype)
    models = make_models(flag_values.model, size, flag_values.alpha, sides, dtype)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, *size, 3)), jnp.float32)
    init = functools.partial(models["plain"].init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)
    draw = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda x: jnp.asarray(draw.normal(size=x.shape).astype(np.float32) * 0.02), shapes
    )
    calls, macs = {}, {}
    for name, model in models.items():
        apply = functools.partial(model.apply, train=False)
        program = compile_program(apply, variables, images).call
        calls[name] = functools.partial(program, variables, images)
        macs[name] = summarize_model(model, size, name).macs / 1e9
        if model.backbone.settings.expedite:
            calls[f"operators of {name}"] = operators(model.backbone)
    times = time_in_turns(calls, seconds=flag_values.seconds)
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    print("| centres | GMACs | saved | frames per second, ratio | of the saved | operators |")
    print("| --- | --- | --- | --- | --- | --- |")
    median = {name: np.median(passed) for name, passed in times.items()}
    for name in models:
        saved, speedup = macs["plain"] / macs[name], median["plain"] / median[name]
        share = median.get(f"operators of {name}", 0.0) / median[name]
        cells = f"{macs[name]:.1f} | {saved:.2f} | {speedup:.2f} | {speedup / saved:.2f}"
        print(f"| {name} | {cells} | {share:.1%} |")
    print(f"rounds: {len(times['plain'])}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
