"""Measures where a forward pass and a training step spend their time, by parts of the model.

    python -m experiments.profile_steps

One call each at 224 x 224 pixels: 8 images in float32 on a CPU, 128 in bfloat16 on an accelerator.
`tokenvit_jax.measure.profile` explains the method. Writes docs/benchmarks/cpu_profile.md, or
gpu_profile.md on a GPU.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import tokenvit_jax as tv
from experiments import pages
from tokenvit_jax.measure.models import train_step_of
from tokenvit_jax.measure.parts import PARTS
from tokenvit_jax.measure.profile import UNKNOWN, times_of_parts
from tokenvit_jax.measure.timing import compile_program, normal
from tokenvit_jax.memory import keep_pages

CALLS = (
    ("dgt_t", "training"),
    ("clustr_t", "training"),
    ("clustr_t", "forward"),
    ("pale_t", "training"),
)
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
        forward = lambda v, x: model.apply(v, x, train=False)  # noqa: E731
        program = compile_program(forward, variables, images).call
        return program, lambda: jax.block_until_ready(program(variables, images))
    step = train_step_of(model)
    program = compile_program(step, variables, images, labels, donate_argnums=(0,)).call

    def run():
        nonlocal variables  # the old variables are donated
        variables, loss = jax.block_until_ready(program(variables, images, labels))
        return loss

    return program, run


def shares(name: str, mode: str) -> dict[str, float]:
    """Returns the share of the time for each of PARTS, and on a GPU for UNKNOWN."""
    program, run = compile_call(name, mode)
    times = times_of_parts(program, run)
    total = sum(times.values())
    return {part: time / total for part, time in times.items()}


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
