"""Chooses the form of an operator by the platform that it is compiled for.

A *form* is one implementation of an operator. The default form uses XLA's operations and runs
everywhere; a CPU can have another one; GPUs and TPUs can have kernels. All forms give the same
values, break ties alike and have the same gradients. :data:`tokenvit_jax.kernels.forms.FORMS` lists
the forms of every operator and the reasons for them.

The environment variable ``TOKENVIT_JAX_KERNELS=off`` makes GPUs and TPUs take the default forms.
"""

import contextlib
import functools
import os
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tokenvit_jax.kernels.forms import FORMS
from tokenvit_jax.kernels.gpus import MIN_CAPABILITY, traced_gpu


class Misfit(NamedTuple):
    """A kernel that could not take its arguments, so that the default form ran.

    Attributes:
      operator: key of :data:`tokenvit_jax.kernels.forms.FORMS`.
      platform: "cuda" or "tpu".
      reason: what the kernel cannot take.
      shapes: shapes of the arguments.
    """

    operator: str
    platform: str
    reason: str
    shapes: tuple[tuple[int, ...], ...]


_noted: ContextVar[list[Misfit] | None] = ContextVar("noted misfits", default=None)


@contextlib.contextmanager
def noted_misfits() -> Iterator[list[Misfit]]:
    """Collects the misfits of everything that is traced in the context."""
    misfits: list[Misfit] = []
    token = _noted.set(misfits)
    try:
        yield misfits
    finally:
        _noted.reset(token)


_default_only = jax.make_user_context(False)  # jax.jit does not mix up what it traced in both


def default_forms() -> contextlib.AbstractContextManager[None]:
    """Leaves kernels out of what is traced in the context, for outputs that nobody reads.

    The initialisation of a model traces its layers for the shapes of their parameters; tracing the
    kernels, too, would take as long again.
    """
    return _default_only(True)


_platform = jax.make_user_context(None)  # whose forms are traced; None: any may be needed


@contextlib.contextmanager
def traced_for(device: jax.Device) -> Iterator[None]:
    """Traces programs in the context for one device: only forms for it, and equal kernels once.

    Elsewhere a program may still be lowered for any platform, so that all forms are traced.
    """
    with _platform(platform_of(device)), kernels_traced_once():
        yield


def platform_of(device: jax.Device) -> str:
    """Returns the platform of a device, as forms name it: "cpu", "cuda", "tpu" or another."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version else "cuda"


_traced: ContextVar[dict[Hashable, Callable[..., Any]] | None] = ContextVar("traced", default=None)


@contextlib.contextmanager
def kernels_traced_once() -> Iterator[None]:
    """Traces and lowers kernels of equal blocks only once in the context.

    Tracing and lowering a Pallas kernel takes up to a second, and a model calls the same kernel in
    every block. In the context, kernels that differ neither in their code nor in the values that
    they hold are one function under `jax.jit`, which keeps what it traced.
    """
    token = _traced.set({})
    try:
        yield
    finally:
        _traced.reset(token)


def by_platform(
    operator: str,
    *args: Any,
    default: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    tpu: Callable[..., Any] | None = None,
    misfits: Mapping[str, str | None] = MappingProxyType({}),
    shared: tuple[int, ...] = (),
) -> Any:
    """Computes ``form(*args)`` by the form for the platform that this is compiled for.

    Args:
      operator: key of :data:`tokenvit_jax.kernels.forms.FORMS`, which has an entry for each form.
      args: arrays or trees of arrays, whose leading axis is the batch, or None.
      default: form for platforms without one of their own, and where a kernel does not fit.
      cpu: form for CPUs.
      cuda: kernel for NVIDIA GPUs. Under jit over a mesh, kernels see one device's part of the
        batch; the leading axis of each result is divided over the devices, too.
      tpu: kernel for TPUs.
      misfits: platform -> why its kernel cannot take these arguments; None: it can.
      shared: numbers of the arguments that have no batch axis, such as parameters.

    Returns:
      The result of the form.
    """
    given = {"cpu": cpu, "cuda": cuda, "tpu": tpu, "default": default}
    given = {platform: form for platform, form in given.items() if form is not None}
    if given.keys() != FORMS[operator].keys():
        raise KeyError(f"FORMS[{operator!r}] is for {[*FORMS[operator]]}, not {[*given]}")
    general, only = _general_misfit(args, shared), _platform.value
    forms = {}
    for platform in [name for name in given if name != "default"]:  # in order, for caches
        if only not in (None, platform) or (platform != "cpu" and _default_only.value):
            continue
        reason = None if platform == "cpu" else general or misfits.get(platform)
        if platform == "cuda":
            reason = reason or _old_gpu()
        if reason:
            _note(Misfit(operator, platform, reason, _shapes(args)))
        elif platform == "cpu":
            forms[platform] = cpu
        elif os.environ.get("TOKENVIT_JAX_KERNELS") != "off":
            forms[platform] = on_each_device(_traced_once(given[platform]), shared)
    if only is not None or not forms:
        return forms.get(only, default)(*args)
    return lax.platform_dependent(*args, **forms, default=default)


def on_each_device(run: Callable[..., Any], shared: tuple[int, ...] = ()) -> Callable[..., Any]:
    """Makes ``run`` see each device's part of a batch that jit divides over a mesh.

    Without this, the compiler would gather the batch in front of a kernel, which it cannot divide.

    Args:
      run: function of arrays (B, ...) that returns arrays (B', ...).
      shared: numbers of the arguments that have no batch axis.

    Returns:
      A function like ``run``, for B a multiple of :func:`num_devices`. If no argument has a batch
      axis, it calls ``run`` as it is. Attention by cuDNN is differentiated through it; for other
      kernels, operators define the gradients.
    """
    if num_devices() == 1:
        return run
    mesh = jax.sharding.get_abstract_mesh()

    def mapped(*args):
        if len(shared) == len(args):
            return run(*args)
        specs = tuple(P() if i in shared else P(mesh.axis_names) for i in range(len(args)))
        return jax.shard_map(
            run, mesh=mesh, in_specs=specs, out_specs=P(mesh.axis_names), check_vma=False
        )(*args)

    return mapped


def num_devices() -> int:
    """Returns the number of devices over which jit divides the batch that is being traced.

    A step is traced in the context of its mesh, all of whose axes divide the batch. Inside
    `jax.pmap` and `jax.shard_map(check_vma=False)`, where arrays are one device's part, this is 1.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return 1
    return mesh.size


def device_batch(batch: int) -> int:
    """Returns the number of images on a device, which decides about forms and sizes of chunks.

    Args:
      batch: number of images; symbolic while a model is exported for any number (`jax.export`).

    Returns:
      The number of images on one device; all of them if they do not divide evenly; 1 for none, and
      for a symbolic number, because shapes and forms must be known then.
    """
    if not isinstance(batch, int):
        return 1
    return max(batch if batch % num_devices() else batch // num_devices(), 1)


def _general_misfit(args, shared):
    """Returns why no kernel can take the arguments, or None."""
    divided = [x for i, x in enumerate(args) if i not in shared]
    batches = {x.shape[0] for x in jax.tree.leaves(divided)}
    if not all(isinstance(batch, int) for batch in batches):
        return "the number of images is symbolic"
    if 0 in batches:
        return "there are no images"
    if any(x.dtype == jnp.float64 for x in jax.tree.leaves(args)):
        return "float64"
    devices = num_devices()
    if any(batch % devices for batch in batches):
        return f"{devices} devices do not divide the batch"
    return None


def _traced_once(kernel):
    """Returns a kernel under `jax.jit`, the same function for equal kernels, or the kernel itself.

    See :func:`kernels_traced_once`.
    """
    known = _traced.get()
    if known is None:
        return kernel
    try:
        return known.setdefault(_identity(kernel), jax.jit(kernel))
    except TypeError:  # it holds something that cannot be compared, such as an array
        return kernel


def _identity(value):
    """Returns what makes two functions equal: code and values that they hold.

    Raises:
      TypeError: a value has no hash.
    """
    if isinstance(value, functools.partial):
        keywords = sorted(value.keywords.items())
        return (_identity(value.func), *map(_identity, value.args), *map(_identity, keywords))
    if isinstance(value, tuple):
        return (type(value), *map(_identity, value))
    if isinstance(value, types.FunctionType) and value.__closure__:
        held = (cell.cell_contents for cell in value.__closure__)
        return (value.__code__, _identity(value.__defaults__), *map(_identity, held))
    hash(value)
    return type(value), value


def _old_gpu():
    """Returns why kernels do not run on the GPU that a program is traced for, or None."""
    gpu = traced_gpu()
    if gpu is None or gpu.capability >= MIN_CAPABILITY:
        return None  # None: programs may also be lowered for a GPU that is elsewhere
    found, oldest = (".".join(map(str, x)) for x in (gpu.capability, MIN_CAPABILITY))
    return f"compute capability {found} is below {oldest}"


def _note(misfit):
    misfits = _noted.get()
    if misfits is not None:
        misfits.append(misfit)


def _shapes(args):
    return tuple(x.shape for x in jax.tree.leaves(args))
