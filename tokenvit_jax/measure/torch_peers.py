"""Times PyTorch modules as peers, with the same batch size and the same work as our models.

On a GPU, PyTorch runs the output of `torch.compile`. On CPU it runs eagerly, with as many threads
as JAX has. bfloat16 is autocast: the parameters stay float32, as in the models of this package.

PyTorch threads that wait for one another keep their CPUs busy. This stalls small models for seconds
where other processes run; OMP_WAIT_POLICY=PASSIVE in the environment lets the threads sleep.

torch is imported by the functions that need it.
"""

import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from tokenvit_jax.errors import UserError

if TYPE_CHECKING:
    import torch


class Peer(NamedTuple):
    """A PyTorch module that is ready to be timed.

    Attributes:
      call: starts one forward pass or training step; its result waits for the end.
      macs: multiply-adds of the forward pass of one image.
      compile_seconds: time to compile it [s]; None if nothing is compiled.
    """

    call: Callable[[], "Running"]
    macs: int
    compile_seconds: float | None


class TorchWork(NamedTuple):
    """A PyTorch module and the loss of its training.

    Attributes:
      module: takes images (B, 3, H, W).
      targets: random targets from a number of images B and a `torch.Generator`: tensors (B, ...)
        in any tree.
      loss: scalar loss from the module, or what `torch.compile` makes of it, images and targets.
      smallest_batch: images that training needs at least.
    """

    module: "torch.nn.Module"
    targets: Callable[[int, "torch.Generator"], Any]
    loss: Callable[[Callable, "torch.Tensor", Any], "torch.Tensor"]
    smallest_batch: int = 1


class Running:
    """A call that a GPU may still be working at; no tuple, which jax would take apart."""

    def __init__(self, wait: Callable[[], None]):
        """Takes the function that waits for the end."""
        self._wait = wait

    def block_until_ready(self) -> None:
        """Waits for the end; `jax.block_until_ready` calls this."""
        self._wait()


def torch_peer(
    work: TorchWork, image_size: tuple[int, int], batch_size: int, dtype: str, mode: str
) -> Peer:
    """Prepares a PyTorch module with random images.

    A training step does what :func:`tokenvit_jax.measure.models.train_step_of` does: the loss,
    backward and plain gradient descent.

    Args:
      work: the module and its loss.
      image_size: height and width [pixels].
      batch_size: images per batch.
      dtype: "float32" | "bfloat16", type of the computation.
      mode: "forward" | "train".

    Raises:
      UserError: PyTorch does not support the device that JAX uses, or the batch is too small.
    """
    import torch

    if mode == "train" and batch_size < work.smallest_batch:
        raise UserError(
            f"--batch_size={batch_size} is too small for the training step of a peer of --against; "
            f"valid: from {work.smallest_batch}"
        )
    device, module = torch_device(), work.module
    macs = count_torch_macs(module.eval(), torch.zeros(1, 3, *image_size))
    module.to(device).train(mode == "train")
    compute = torch.compile(module) if device == "cuda" else module
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, *image_size, generator=generator).to(device)
    targets = work.targets(batch_size, generator)
    targets = jax.tree.map(lambda x: x.to(device), targets)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)

    def forward():
        with torch.inference_mode(), autocast:
            compute(images)

    def train():
        with autocast:
            loss = work.loss(compute, images, targets)
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
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter has no formula for the CPU's fused attention: count its two matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*args)
    return counter.get_total_flops() // 2


def environment(package: str) -> dict[str, Any]:
    """Returns the versions of a package and of PyTorch, and how PyTorch runs.

    Args:
      package: "timm" | "transformers" | "torchvision".

    Raises:
      UserError: as :func:`import_package` and :func:`torch_device`.
    """
    torch, module = import_package(package)
    if torch_device() == "cpu":
        how = {"threads": torch.get_num_threads(), "mode": "eager"}
    else:
        how = {"device": torch.cuda.get_device_name(), "mode": "torch.compile"}
    how = {f"torch {key}": value for key, value in how.items()}
    return {package: module.__version__, "torch": torch.__version__, **how}


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


def check_peers(package: str) -> None:
    """Raises UserError if the networks of a package cannot be timed on this machine.

    Args:
      package: "timm" | "transformers" | "torchvision".
    """
    import_package(package)
    torch_device()
    if package == "torchvision":
        check_operators()
        import_package("timm")  # the backbone of its detector


def check_operators() -> None:
    """Raises UserError if torchvision is not here with operators for the device of JAX."""
    torch, torchvision = import_package("torchvision")
    device = torch_device()
    try:
        torchvision.ops.nms(torch.zeros(1, 4, device=device), torch.zeros(1, device=device), 0.5)
    except (AttributeError, RuntimeError) as error:
        raise UserError(
            "--against needs the compiled operators of torchvision, which do not load on the "
            f"{device}: install the torchvision that belongs to torch {torch.__version__}"
        ) from error


def import_package(name: str) -> tuple[ModuleType, ModuleType]:
    """Imports torch and a package of models.

    Args:
      name: "timm" | "transformers" | "torchvision".

    Raises:
      UserError: torch, the package or something that they need is not installed or does not load.
    """
    try:
        torch = importlib.import_module("torch")
        if name != "transformers" or importlib.util.find_spec("torchvision"):
            import_torchvision()
        return torch, importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"--against needs PyTorch and {name}, but {error.name} is not installed: "
            f"pip install torch {name}"
        ) from error
    except (
        ImportError,
        OSError,
        RuntimeError,
        AttributeError,
    ) as error:  # builds that do not match
        message = str(error).strip().partition("\n")[0]
        raise UserError(
            f"--against needs PyTorch and {name}, which do not load ({message}): install builds "
            f"that belong together with pip install torch {name}"
        ) from error


def import_torchvision() -> ModuleType:
    """Imports torchvision, even if its wheel is for another build of PyTorch.

    timm needs torchvision, and transformers imports it where it is installed. The compiled
    operators of such a wheel do not load. No model here uses them, but without them the module that
    describes them to `torch.compile` cannot be imported.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        description = "torchvision._meta_registrations"
        sys.modules[description] = ModuleType(description)
        return importlib.import_module("torchvision")
