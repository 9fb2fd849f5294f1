"""Models of timm, in PyTorch, as peers of a benchmark: the same batch, the same work.

On a GPU PyTorch runs what `torch.compile` makes of a model. On CPU it runs eagerly, with as many
threads as JAX has. bfloat16 is autocast: the parameters stay float32, as in the models here.

Threads of PyTorch that wait for one another keep their CPUs busy, which stalls small models for
seconds where other processes run. OMP_WAIT_POLICY=PASSIVE in the environment lets them sleep.

torch and timm are imported by the functions that need them.
"""

import importlib
import os
import platform
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax

from tokenvit_jax.errors import UserError, did_you_mean


class Peer(NamedTuple):
    """A model of timm that is ready to be timed.

    call: one forward pass or training step, which has ended when it returns. macs: multiply-adds
    of the forward pass of one image. compile_seconds: None where nothing is compiled.
    """

    call: Callable[[], None]
    macs: int
    compile_seconds: float | None


def timm_peer(
    name: str, image_size: tuple[int, int], batch_size: int, dtype: str, mode: str
) -> Peer:
    """Builds a model of timm with 1000 classes, random weights and random images.

    A training step is what :func:`tokenvit_jax.benchmark.train_step_of` does: cross entropy,
    backward and plain gradient descent.

    Args:
        name: of an architecture of timm.
        image_size: height and width, pixels.
        batch_size: images.
        dtype: "float32" | "bfloat16", of the computation.
        mode: "forward" | "train".

    Raises:
        UserError: torch or timm is not installed, PyTorch does not support the device that JAX
            uses, timm has no model of this name, or the model does not take such images.
    """
    torch, _ = import_timm()
    device = torch_device()
    model = _create(name, image_size)
    macs = count_torch_macs(model, torch.zeros(1, 3, *image_size))
    model.to(device).train(mode == "train")
    compute = torch.compile(model) if device == "cuda" else model
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, *image_size, generator=generator).to(device)
    labels = torch.randint(1000, (batch_size,), generator=generator).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def forward():
        with torch.inference_mode(), autocast:
            compute(images)

    def train():
        with autocast:
            loss = torch.nn.functional.cross_entropy(compute(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def call():
        forward() if mode == "forward" else train()
        if device == "cuda":
            torch.cuda.synchronize()

    if device == "cpu":
        return Peer(call, macs, compile_seconds=None)
    start = time.perf_counter()
    call()
    return Peer(call, macs, compile_seconds=time.perf_counter() - start)


def count_torch_macs(model: Callable, *args: Any) -> int:
    """Counts the multiply-adds of matrix products, convolutions and attention in a call."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The fused attention of the CPU has no formula there: count it as its two matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*args)
    return counter.get_total_flops() // 2


def environment() -> dict[str, Any]:
    """Returns how PyTorch runs, and its version and timm's."""
    torch, timm = import_timm()
    if torch_device() == "cpu":
        how = {"threads": torch.get_num_threads(), "mode": "eager"}
    else:
        how = {"device": torch.cuda.get_device_name(), "mode": "torch.compile"}
    how = {f"torch {key}": value for key, value in how.items()}
    return {"timm": timm.__version__, "torch": torch.__version__, **how}


def share_memory() -> None:
    """Keeps JAX from taking most of a GPU's memory for itself; before JAX looks for devices."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def torch_device() -> str:
    """Makes PyTorch use what JAX uses, and returns the name of the device.

    On CPU that is the number of threads; on a GPU it is TF32 for the products of float32 arrays.

    Raises:
        UserError: PyTorch does not support the device.
    """
    import torch

    backend = jax.default_backend()
    if backend == "cpu":
        linux = platform.system() == "Linux"  # XLA has as many threads as CPUs it may run on
        torch.set_num_threads(len(os.sched_getaffinity(0)) if linux else os.cpu_count())
        return "cpu"
    if backend == "gpu" and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        return "cuda"
    raise UserError(
        f"--against needs JAX and PyTorch on one device; JAX uses the {backend}, which this "
        "PyTorch does not: install a PyTorch for it, or set JAX_PLATFORMS=cpu"
    )


def import_timm() -> tuple[ModuleType, ModuleType]:
    """Imports torch and timm.

    Raises:
        UserError: one of them, or what it needs, is not installed.
    """
    try:
        import torch

        import_torchvision()
        import timm
    except ModuleNotFoundError as error:
        raise UserError(
            f"--against needs PyTorch and timm, but {error.name} is not installed: "
            "pip install torch timm"
        ) from error
    return torch, timm


def import_torchvision() -> ModuleType:
    """Imports torchvision, which timm needs, even if its wheel is for another build of PyTorch.

    Its compiled operators do not load then. No model uses them, but the import describes them to
    the compiler, in a module of its own, and fails because they do not exist.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        description = "torchvision._meta_registrations"
        sys.modules[description] = ModuleType(description)
        return importlib.import_module("torchvision")


def _create(name, image_size):
    """Returns a model that has been tried with an image of the size."""
    torch, timm = import_timm()
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models())
        raise UserError(f"--against: timm {timm.__version__} has no model {name!r}{hint}")
    # Only models that are built for one size have the argument img_size.
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    size = {"img_size": image_size} if fixed else {}
    try:
        model = timm.create_model(name, num_classes=1000, **size).eval()
        with torch.inference_mode():
            model(torch.zeros(1, 3, *image_size))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        height, width = image_size
        raise UserError(f"timm's {name} does not take {height}x{width} images: {error}") from error
    return model
