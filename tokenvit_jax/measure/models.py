"""Times the forward pass and the training step of models, their variants and models in PyTorch.

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

from tokenvit_jax.kernels.platforms import default_forms
from tokenvit_jax.measure import timm_peers, torch_peers
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
      compiled: the compiled program of jax; None for models in PyTorch.
    """

    program: Program
    macs: int
    compiled: jax.stages.Compiled | None = None


class Work(NamedTuple):
    """A batch and the loss of a training step.

    Attributes:
      images: (B, H, W, C), normalised.
      targets: tree of arrays with a leading axis B.
      loss: ``loss(params, state, images, targets) -> loss (), (anything, new state)``; `state` are
        the variables besides the parameters.
    """

    images: jax.Array
    targets: Any
    loss: Callable[..., tuple[jax.Array, tuple[Any, dict]]]


class Subject(NamedTuple):
    """A model that will be timed.

    Attributes:
      model: ``model(images, train=False)`` is its forward pass.
      work: function from (height, width) and a batch size to a random batch and the loss.
    """

    model: nn.Module
    work: Callable[[tuple[int, int], int], Work]


class Kind(NamedTuple):
    """The models of a task and their peers.

    Attributes:
      subject: ``subject(name, dtype=..., **overrides)`` returns one of the models.
      peer: the module of a peer, from its name, (height, width) and "forward" or "train".
      package: Python package of the peers.
    """

    subject: Callable[..., Subject]
    peer: Callable[[str, tuple[int, int], str], torch_peers.TorchWork]
    package: str

    def model(self, name: str, **overrides: Any) -> nn.Module:
        """Returns a model that computes in float32."""
        return self.subject(name, dtype=jnp.dtype("float32"), **overrides).model


def _classifier(name, **settings):
    model = create_model(name, **settings)
    return Subject(model, functools.partial(_classification_work, model))


def _classification_work(model, image_size, batch_size):
    labels = np.random.default_rng(1).integers(1000, size=batch_size)
    return Work(normal(0, (batch_size, *image_size, 3)), jnp.asarray(labels), loss_of(model))


CLASSIFICATION = Kind(_classifier, timm_peers.timm_work, "timm")


def benchmark_models(
    names: Sequence[str],
    image_size: tuple[int, int],
    batch_size: int,
    dtype: jnp.dtype,
    modes: Sequence[str],
    *,
    against: Sequence[str] = (),
    insertions: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    kind: Kind = CLASSIFICATION,
) -> list[dict[str, Any]]:
    """Times models in turns.

    Args:
      names: names of the models, for classification some of :func:`tokenvit_jax.list_models`.
      image_size: height and width [pixels].
      batch_size: images per batch.
      dtype: type of the computation.
      modes: "forward", "train" or both; "train" is forward, backward and gradient descent.
      against: names of peers.
      insertions: model -> label of a variant -> overrides of the model; each variant takes turns
        with its model.
      kind: the task of the models; for classification they have 1000 classes.

    Returns:
      For each mode, a row per model, then a row per peer, named "PACKAGE/NAME". A row holds the
      settings; "gmacs", 10^9 multiply-adds of the forward pass of one image; "images_per_second";
      "gmacs_per_second", their product; "ratio_to_NAME", this product divided by the product of the
      peer NAME; and the numbers of :func:`tokenvit_jax.measure.timing.describe_times`. If any
      model has variants, a row also holds "speedup", its images per second divided by the plain
      model's; "saved", the plain model's multiply-adds divided by its own; and
      "speedup_over_saved".

    Raises:
      UserError: a model or a peer is unknown, or the images are too small for it; see also
        :func:`tokenvit_jax.measure.torch_peers.import_package`.
    """
    rows = []
    for mode in modes:
        setting = (image_size, batch_size, dtype, mode)
        contenders, plain = build_contenders(names, *setting, against, insertions, kind)
        rows += compare_contenders(contenders, *setting, against, plain, kind.package)
        del contenders  # before those of the next mode
    return rows


def build_contenders(
    names: Sequence[str],
    image_size: tuple[int, int],
    batch_size: int,
    dtype: jnp.dtype,
    mode: str,
    against: Sequence[str] = (),
    insertions: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    kind: Kind = CLASSIFICATION,
    failed: dict[str, Exception] | None = None,
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Compiles models, their variants and peers for one mode of :func:`benchmark_models`.

    With `failed`, what cannot be built is left out, as in
    :func:`tokenvit_jax.measure.timing.build_all`.

    Returns:
      The contenders by name, and for each variant the name of its plain model.
    """
    subjects, plain = {}, {}
    for name in names:
        subjects[name] = kind.subject(name, dtype=dtype)
        for label, overrides in insertions.get(name, {}).items():
            subjects[f"{name} {label}"] = kind.subject(name, dtype=dtype, **overrides)
            plain[f"{name} {label}"] = name
    ours = {
        name: functools.partial(_contender, *subject, image_size, batch_size, mode)
        for name, subject in subjects.items()
    }
    setting = (image_size, batch_size, dtype, mode)
    peers = {
        f"{kind.package}/{name}": functools.partial(_peer, kind.peer, name, *setting)
        for name in against
    }
    return build_all(ours, peers, failed), plain


def compare_contenders(
    contenders: Mapping[str, Contender],
    image_size: tuple[int, int],
    batch_size: int,
    dtype: jnp.dtype,
    mode: str,
    against: Sequence[str] = (),
    plain: Mapping[str, str] = MappingProxyType({}),
    package: str = CLASSIFICATION.package,
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
      against: names of the peers among the contenders.
      plain: name of a variant -> name of its plain model.
      package: Python package of the peers.
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
            **{f"ratio_to_{peer}": rates[name] / rates[f"{package}/{peer}"] for peer in against},
            **timings[name],
        }
        for name in contenders
    ]


def _peer(build, name, image_size, batch_size, dtype, mode):
    work = build(name, image_size, mode)
    peer = torch_peers.torch_peer(work, image_size, batch_size, dtype.name, mode)
    return Contender(Program(peer.call, None, peer.compile_seconds, None), peer.macs)


def _contender(model, work_of, image_size, batch_size, mode):
    images, targets, loss = work_of(image_size, batch_size)
    forward = lambda v, x: model.apply(v, x, train=False)  # noqa: E731
    variables = _first_variables(model, images)
    macs = count_macs(forward, variables, images[:1])
    if mode == "forward":
        program = compile_program(forward, variables, images)
        check_memory(program.temp_bytes, f"a forward pass of {batch_size} images")
        called = program._replace(call=lambda: program.call(variables, images))
        return Contender(called, macs, program.call)
    step = train_step_of(model, loss)
    program = compile_program(step, variables, images, targets, donate_argnums=(0,))
    check_memory(program.temp_bytes, f"a training step on {batch_size} images")

    def call():
        nonlocal variables  # the old variables are donated
        variables, loss = program.call(variables, images, targets)
        return variables, loss

    return Contender(program._replace(call=call), macs, program.call)


def _first_variables(model, images):
    """Returns random variables on the device, made by the CPU: it compiles them in less time."""
    one = np.zeros((1, *images.shape[1:]), images.dtype)
    try:
        host = jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        host = jax.devices()[0]
    with default_forms(), jax.default_device(host):  # nobody reads the outputs
        variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(one)
    return jax.device_put(variables, jax.devices()[0])


def loss_of(model: nn.Module) -> Callable[..., tuple[jax.Array, tuple[jax.Array, dict]]]:
    """Returns ``loss(params, state, images, labels) -> cross entropy, (logits, new state)``.

    It is the loss of classification; `state` are the variables besides the parameters.
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


def train_step_of(
    model: nn.Module, loss: Callable[..., tuple[jax.Array, tuple[Any, dict]]] | None = None
) -> Callable[..., tuple[dict, jax.Array]]:
    """Returns ``step(variables, images, targets) -> variables, loss``, plain gradient descent.

    Args:
      model: the model.
      loss: as in :class:`Work`; None: that of classification.
    """
    grad_fn = jax.value_and_grad(loss or loss_of(model), has_aux=True)

    def step(variables, images, targets):
        state = {key: value for key, value in variables.items() if key != "params"}
        (loss, (_, state)), grads = grad_fn(variables["params"], state, images, targets)
        params = map_packed(
            lambda p, g: p - 1e-3 * g, variables["params"], grads, limit=_SMALL_ARRAY
        )
        return model.after_step({"params": params, **state}, jnp.float32(1e-3)), loss

    return step
