"""Measures where a forward pass and a training step spend their time on CPU, by parts of the model.

    python -m experiments.profile_steps

`jax.profiler` traces one call each at 224 x 224 pixels, batch 8. Every operation of the compiled
program is assigned to a part by the layer that it comes from. XLA fuses some products of attention
with the softmax, so both are one part. Writes docs/benchmarks/cpu_profile.md.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import tokenvit_jax as tv
from experiments import pages
from tokenvit_jax.measure.models import train_step_of
from tokenvit_jax.measure.timing import normal
from tokenvit_jax.memory import keep_pages

CALLS = (
    ("dgt_t", "training"),
    ("clustr_t", "training"),
    ("clustr_t", "forward"),
    ("pale_t", "training"),
)
BATCH_SIZE = 8
# An operation belongs to the first part whose pattern occurs in the name of the operation's origin.
PARTS = {
    "clustering and merging": "density_peaks|assign_clusters|merge_tokens|cluster_sums",
    "depthwise convolutions": "depthwise|cpe",
    "attention: groups, products, softmax": "attend_in_groups|dot_product_attention|pale_attention",
    "linear layers, strided convolutions": "dot_general|conv_general",
    "GELU and BatchNorm of the feed-forward network": "/ffn|/mlp",
    "other normalisation": "norm",
    "the rest": "",
}
RESULT = Path(__file__).parent.parent / "docs" / "benchmarks" / "cpu_profile.md"


def compile_call(name: str, mode: str) -> tuple[Any, Callable[[], Any]]:
    """Returns the compiled call of a model and a function that runs it once more.

    Args:
      name: name of the model.
      mode: "training" or "forward".
    """
    model = tv.create_model(name)
    images, labels = normal(0, (BATCH_SIZE, 224, 224, 3)), jnp.arange(BATCH_SIZE)
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(images[:1])
    if mode == "forward":
        forward = jax.jit(lambda v, x: model.apply(v, x, train=False))
        program = forward.lower(variables, images).compile()
        return program, lambda: jax.block_until_ready(program(variables, images))
    program = jax.jit(train_step_of(model)).lower(variables, images, labels).compile()
    return program, lambda: jax.block_until_ready(program(variables, images, labels))


def trace(run: Callable[[], Any]) -> list[tuple[str, int]]:
    """Returns the duration [ns] of every operation of one run, by its name in the program."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        return [
            (event.name, event.duration_ns)
            for plane in data.planes
            for line in plane.lines
            for event in line.events
        ]


def shares(name: str, mode: str) -> dict[str, float]:
    """Returns the share of the time for each of PARTS."""
    program, run = compile_call(name, mode)
    origins = dict(re.findall(r'%?([\w.\-]+) = .*?op_name="([^"]+)"', program.as_text()))
    run()
    times = Counter()
    for operation, nanoseconds in trace(run):
        if operation in origins or re.match(r"(transpose_)?copy", operation):
            origin = origins.get(operation, "")
            part = next(part for part, pattern in PARTS.items() if re.search(pattern, origin))
            times[part] += nanoseconds
    return {part: times[part] / times.total() for part in PARTS}


def main() -> None:
    """Measures and writes the page."""
    keep_pages()
    columns = [shares(*call) for call in CALLS]
    lines = [
        "Written by `python -m experiments.profile_steps`, which explains the method. Shares of",
        "the time of one call at 224 x 224, batch 8.",
        "",
        *pages.table(
            ["part", *(f"`{name}`, {mode}" for name, mode in CALLS)],
            ([part, *(f"{column[part]:.0%}" for column in columns)] for part in PARTS),
        ),
    ]
    text = "\n".join(lines) + "\n"
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
