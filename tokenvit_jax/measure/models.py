"""Times the forward pass and the training step of models, their variants and timm's models.

Models differ in size, so they are compared by images per second times the multiply-adds (MACs) of
one image: their speed at equal MACs.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tokenvit_jax.measure import timm_peers
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.measure.timing import (
    Program,
    build_all,
    check_memory,
    compile_program,
    describe_times,
    normal,
    time_in_turns,
)
from tokenvit_jax.models import create_model
from tokenvit_jax.ops.packed import map_packed

# Values of an array whose update on a GPU takes less time than a launch.
_SMALL_ARRAY = 2**18

SECONDS = 10.0  # approximate time to spend on each model


class Contender(NamedTuple):
    """A model that is ready to be timed.

    Attributes:
      program: compiled program, whose call takes no arguments.
      macs: multiply-adds of the forward pass of one image.
      compiled: the compiled program of jax; None for models of timm.
    """

    program: Program
    macs: int
    compiled: jax.stages.Compiled | None = None


def benchmark_models(
    names: Sequence[str],
    image_size: tuple[int, int],
    batch_size: int,
    dtype: jnp.dtype,
    modes: Sequence[str],
    *,
    against: Sequence[str] = (),
    insertions: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Times models with 1000 classes, in turns.

    Args:
      names: some of :func:`tokenvit_jax.list_models`.
      image_size: height and width [pixels].
      batch_size: images per batch.
      dtype: type of the computation.
      modes: "forward", "train" or both; "train" is forward, backward and gradient descent.
      against: names of timm models.
      insertions: model -> label of a variant -> overrides of `create_model`; each variant takes
        turns with its model.

    Returns:
      For each mode, a row per model, then a row per timm model, named "timm/NAME". A row holds the
      settings; "gmacs", 10^9 multiply-adds of the forward pass of one image; "images_per_second";
      "gmacs_per_second", their product; "ratio_to_NAME", this product divided by the product of the
      timm model NAME; and the numbers of :func:`tokenvit_jax.measure.timing.describe_times`. If any
      model has variants, a row also holds "speedup", its images per second divided by the plain
      model's; "saved", the plain model's multiply-adds divided by its own; and
      "speedup_over_saved".

    Raises:
      UserError: a model is unknown, or the images are too small for it; see also
        :func:`tokenvit_jax.measure.timm_peers.timm_peer`.
    """
    setting = (image_size, batch_size, dtype)
    return [
        row for mode in modes for row in _benchmark_mode(names, *setting, mode, against, insertions)
    ]


def _benchmark_mode(names, image_size, batch_size, dtype, mode, against, insertions):
    setting = (image_size, batch_size, dtype, mode)
    contenders, plain = build_contenders(names, *setting, against, insertions)
    return compare_contenders(contenders, *setting, against, plain)


def build_contenders(
    names: Sequence[str],
    image_size: tuple[int, int],
    batch_size: int,
    dtype: jnp.dtype,
    mode: str,
    against: Sequence[str] = (),
    insertions: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Compiles models, their variants and timm models for one mode of :func:`benchmark_models`.

    Returns:
      The contenders by name, and for each variant the name of its plain model.
    """
    models, plain = {}, {}
    for name in names:
        models[name] = create_model(name, dtype=dtype)
        for label, overrides in insertions.get(name, {}).items():
            models[f"{name} {label}"] = create_model(name, dtype=dtype, **overrides)
            plain[f"{name} {label}"] = name
    ours = {
        name: functools.partial(_contender, model, image_size, batch_size, mode)
        for name, model in models.items()
    }
    peers = {
        f"timm/{name}": functools.partial(_peer, name, image_size, batch_size, dtype, mode)
        for name in against
    }
    return build_all(ours, beside=peers), plain


def compare_contenders(
    contenders: Mapping[str, Contender],
    image_size: tuple[int, int],
    batch_size: int,
    dtype: jnp.dtype,
    mode: str,
    against: Sequence[str] = (),
    plain: Mapping[str, str] = MappingProxyType({}),
    *,
    seconds: float = SECONDS,
) -> list[dict[str, Any]]:
    """Times the result of :func:`build_contenders`, for one mode of :func:`benchmark_models`.

    Args:
      contenders: models by name.
      image_size: height and width [pixels].
      batch_size: images per batch.
      dtype: type of the computation.
      mode: "forward" | "train".
      against: names of the timm models among the contenders.
      plain: name of a variant -> name of its plain model.
      seconds: approximate time to spend on each model [s].
    """
    calls = {name: program.call for name, (program, *_) in contenders.items()}
    times = time_in_turns(calls, seconds=seconds)
    timings = {name: describe_times(contenders[name].program, times[name]) for name in contenders}
    images = {name: 1e3 * batch_size / timing["median_ms"] for name, timing in timings.items()}
    gmacs = {name: contender.macs / 1e9 for name, contender in contenders.items()}
    rates = {name: images[name] * gmacs[name] for name in contenders}

    def gains(name):
        if not plain:
            return {}
        without = plain.get(name, name)
        speedup, saved = images[name] / images[without], gmacs[without] / gmacs[name]
        return {"speedup": speedup, "saved": saved, "speedup_over_saved": speedup / saved}

    return [
        {
            "model": name,
            "image_size": f"{image_size[0]}x{image_size[1]}",
            "batch_size": batch_size,
            "dtype": dtype.name,
            "mode": mode,
            "gmacs": gmacs[name],
            "images_per_second": images[name],
            "gmacs_per_second": rates[name],
            **gains(name),
            **{f"ratio_to_{peer}": rates[name] / rates[f"timm/{peer}"] for peer in against},
            **timings[name],
        }
        for name in contenders
    ]


def _peer(name, image_size, batch_size, dtype, mode):
    peer = timm_peers.timm_peer(name, image_size, batch_size, dtype.name, mode)
    return Contender(Program(peer.call, None, peer.compile_seconds, None), peer.macs)


def _contender(model, image_size, batch_size, mode):
    images = normal(0, (batch_size, *image_size, 3))
    labels = jnp.asarray(np.random.default_rng(1).integers(1000, size=batch_size))
    forward = lambda v, x: model.apply(v, x, train=False)  # noqa: E731
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(images[:1])
    macs = count_macs(forward, variables, images[:1])
    if mode == "forward":
        program = compile_program(forward, variables, images)
        check_memory(program.temp_bytes, f"a forward pass of {batch_size} images")
        called = program._replace(call=lambda: program.call(variables, images))
        return Contender(called, macs, program.call)
    program = compile_program(train_step_of(model), variables, images, labels, donate_argnums=(0,))
    check_memory(program.temp_bytes, f"a training step on {batch_size} images")

    def call():
        nonlocal variables  # the old variables are donated
        variables, loss = program.call(variables, images, labels)
        return variables, loss

    return Contender(program._replace(call=call), macs, program.call)


def loss_of(model: nn.Module) -> Callable[..., tuple[jax.Array, tuple[jax.Array, dict]]]:
    """Returns ``loss(params, state, images, labels) -> cross entropy, (logits, new state)``.

    It is the loss of a training step; `state` are the variables besides the parameters.
    """

    def loss(params, state, images, labels):
        logits, state = model.apply(
            {"params": params, **state},
            images,
            train=True,
            rngs={"dropout": jax.random.key(0), "routing": jax.random.key(1)},
            mutable=list(state),
        )
        log_probs = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_probs, labels[:, None], 1).mean(), (logits, state)

    return loss


def train_step_of(model: nn.Module) -> Callable[..., tuple[dict, jax.Array]]:
    """Returns ``step(variables, images, labels) -> variables, loss``, plain gradient descent."""
    grad_fn = jax.value_and_grad(loss_of(model), has_aux=True)

    def step(variables, images, labels):
        state = {key: value for key, value in variables.items() if key != "params"}
        (loss, (_, state)), grads = grad_fn(variables["params"], state, images, labels)
        params = map_packed(
            lambda p, g: p - 1e-3 * g, variables["params"], grads, limit=_SMALL_ARRAY
        )
        return model.after_step({"params": params, **state}, jnp.float32(1e-3)), loss

    return step
