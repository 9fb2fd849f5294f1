"""Measures where a forward pass and a training step spend their time, by parts of the model.

    python -m experiments.profile_steps

`jax.profiler` traces one call each at 224 x 224 pixels: 8 images in float32 on a CPU, 128 in
bfloat16 on an accelerator. Every operation of the compiled program is assigned to a part by the
layer that it comes from. XLA fuses some products of attention with the softmax, so both are one
part. On a GPU, kernels of libraries that XLA launches as part of a graph do not tell their layer.
Writes docs/benchmarks/cpu_profile.md, or gpu_profile.md on a GPU.
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
UNKNOWN = "library kernels whose layer is unknown"
FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"


def setting() -> tuple[int, str]:
    """Returns the batch size and the type of the computation on this device."""
    return (8, "float32") if jax.default_backend() == "cpu" else (128, "bfloat16")


def compile_call(name: str, mode: str) -> tuple[Any, Callable[[], Any]]:
    """Returns the compiled call of a model and a function that runs it once more.

    Args:
      name: name of the model.
      mode: "training" or "forward".
    """
    batch_size, dtype = setting()
    model = tv.create_model(name, dtype=jnp.dtype(dtype))
    images, labels = normal(0, (batch_size, 224, 224, 3)), jnp.arange(batch_size)
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(images[:1])
    if mode == "forward":
        forward = jax.jit(lambda v, x: model.apply(v, x, train=False))
        program = forward.lower(variables, images).compile()
        return program, lambda: jax.block_until_ready(program(variables, images))
    step = jax.jit(train_step_of(model), donate_argnums=0)
    program = step.lower(variables, images, labels).compile()

    def run():
        nonlocal variables  # the old variables are donated
        variables, loss = jax.block_until_ready(program(variables, images, labels))
        return loss

    return program, run


def trace(run: Callable[[], Any]) -> list[tuple[str, int]]:
    """Returns the duration [ns] of every operation of one run, by its name in the program.

    On a GPU, an event is a kernel: its statistic "hlo_op" names the operation, and the kernel of a
    fusion bears the fusion's name.
    """
    on_gpu = jax.default_backend() == "gpu"
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        return [
            (
                dict(event.stats).get("hlo_op", event.name) if on_gpu else event.name,
                event.duration_ns,
            )
            for plane in data.planes
            for line in plane.lines
            if not on_gpu or line.name.startswith("Stream")
            for event in line.events
        ]


def shares(name: str, mode: str) -> dict[str, float]:
    """Returns the share of the time for each of PARTS, and on a GPU for UNKNOWN."""
    on_gpu = jax.default_backend() == "gpu"
    program, run = compile_call(name, mode)
    found = re.findall(r'%?([\w.\-]+) = .*?op_name="([^"]+)"', program.as_text())
    origins = dict(found) | {plain(operation): origin for operation, origin in found}
    run()
    times = Counter()
    for operation, nanoseconds in trace(run):
        origin = origins.get(operation, origins.get(plain(operation)))
        if origin is None and re.match(r"(transpose_)?copy|Mem", operation):
            origin = ""
        if origin is not None:
            part = next(part for part, pattern in PARTS.items() if re.search(pattern, origin))
            times[part] += nanoseconds
        elif on_gpu:
            times[UNKNOWN] += nanoseconds
    return {part: times[part] / times.total() for part in (*PARTS, UNKNOWN)}


def plain(operation: str) -> str:
    """Returns the name of the kernel of an operation."""
    return re.sub(r"[.\-]", "_", operation)


def main() -> None:
    """Measures and writes the page."""
    keep_pages()
    columns = [shares(*call) for call in CALLS]
    parts = [part for part in (*PARTS, UNKNOWN) if any(column[part] for column in columns)]
    batch_size, dtype = setting()
    where = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    lines = [
        "Written by `python -m experiments.profile_steps`, which explains the method. Shares of",
        f"the time of one call at 224 x 224, batch {batch_size}, {dtype}; {where}.",
        "",
        *pages.table(
            ["part", *(f"`{name}`, {mode}" for name, mode in CALLS)],
            ([part, *(f"{column[part]:.0%}" for column in columns)] for part in parts),
        ),
    ]
    text = "\n".join(lines) + "\n"
    (FOLDER / f"{jax.default_backend()}_profile.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
