"""Times timm models in PyTorch as peers, with the same batch size and the same work.

On a GPU, PyTorch runs the output of `torch.compile`. On CPU it runs eagerly, with as many threads
as JAX has. bfloat16 is autocast: the parameters stay float32, as in the models of this package.

PyTorch threads that wait for one another keep their CPUs busy. This stalls small models for seconds
where other processes run; OMP_WAIT_POLICY=PASSIVE in the environment lets the threads sleep.

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
    """A timm model that is ready to be timed.

    Attributes:
      call: starts one forward pass or training step; its result waits for the end.
      macs: multiply-adds of the forward pass of one image.
      compile_seconds: time to compile it [s]; None if nothing is compiled.
    """

    call: Callable[[], "Running"]
    macs: int
    compile_seconds: float | None


class Running:
    """A call that a GPU may still be working at; no tuple, which jax would take apart."""

    def __init__(self, wait: Callable[[], None]):
        """Takes the function that waits for the end."""
        self._wait = wait

    def block_until_ready(self) -> None:
        """Waits for the end; `jax.block_until_ready` calls this."""
        self._wait()


def timm_peer(
    name: str, image_size: tuple[int, int], batch_size: int, dtype: str, mode: str
) -> Peer:
    """Builds a timm model with 1000 classes, random weights and random images.

    A training step does what :func:`tokenvit_jax.measure.models.train_step_of` does: cross-entropy,
    backward and plain gradient descent.

    Args:
      name: name of the timm architecture.
      image_size: height and width [pixels].
      batch_size: images per batch.
      dtype: "float32" | "bfloat16", type of the computation.
      mode: "forward" | "train".

    Raises:
      UserError: torch or timm is not installed, PyTorch does not support the device that JAX
        uses, timm has no model of this name, or the model does not take images of this size.
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
        return running

    running = Running(torch.cuda.synchronize if device == "cuda" else lambda: None)
    if device == "cpu":
        return Peer(call, macs, compile_seconds=None)
    start = time.perf_counter()
    call().block_until_ready()
    return Peer(call, macs, compile_seconds=time.perf_counter() - start)


def count_torch_macs(model: Callable, *args: Any) -> int:
    """Counts the multiply-adds of matrix products, convolutions and attention in a call.

    Args:
      model: PyTorch module or function.
      *args: its arguments.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter has no formula for the CPU's fused attention: count its two matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*args)
    return counter.get_total_flops() // 2


def environment() -> dict[str, Any]:
    """Returns the versions of timm and PyTorch, and how PyTorch runs."""
    torch, timm = import_timm()
    if torch_device() == "cpu":
        how = {"threads": torch.get_num_threads(), "mode": "eager"}
    else:
        how = {"device": torch.cuda.get_device_name(), "mode": "torch.compile"}
    how = {f"torch {key}": value for key, value in how.items()}
    return {"timm": timm.__version__, "torch": torch.__version__, **how}


def share_memory() -> None:
    """Keeps JAX from reserving most of a GPU's memory; call it before JAX looks for devices."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def release_memory() -> None:
    """Gives the memory of deleted models on a GPU back to the others, if PyTorch is in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def torch_device() -> str:
    """Makes PyTorch run like JAX and returns its device, "cpu" or "cuda".

    On CPU PyTorch gets as many threads as JAX; on a GPU it multiplies float32 arrays in TF32.

    Raises:
      UserError: PyTorch does not support the device that JAX uses.
    """
    import torch

    backend = jax.default_backend()
    if backend == "cpu":
        linux = platform.system() == "Linux"  # XLA has one thread for each CPU that it may run on
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
      UserError: torch, timm or a package that they need is not installed.
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

    The compiled operators of such a wheel do not load. No model uses them, but without them the
    module that describes them to `torch.compile` cannot be imported.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        description = "torchvision._meta_registrations"
        sys.modules[description] = ModuleType(description)
        return importlib.import_module("torchvision")


def _create(name, image_size):
    """Creates a timm model and applies it to an image of this size."""
    torch, timm = import_timm()
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models())
        raise UserError(f"--against: timm {timm.__version__} has no model {name!r}{hint}")
    # Only models that are built for one image size have the argument img_size.
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
