"""Describes the devices that programs can be compiled for, and makes them available to JAX.

A target is a kind of device with a number or a topology: "h100", "h100x8", "v5e:16x16".
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from tokenvit_jax.ahead.device_files import Device, list_devices, read_device
from tokenvit_jax.errors import UserError, did_you_mean

# Platform -> extra, and its packages, one of which is needed.
_EXTRAS = {
    "cuda": ("aot-gpu", ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")),
    "tpu": ("aot-tpu", ("libtpu",)),
}
# libtpu reads the environment of a TPU host. On other hosts it would look for one and complain.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # without it, only one program at a time can use libtpu
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: as on the command line.
      device: kind of device.
      shape: (number of GPUs,), or the TPU topology.
    """

    name: str
    device: Device
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """Number of devices."""
        return math.prod(self.shape)

    @property
    def in_one_host(self) -> bool:
        """Whether one host has all devices."""
        return all(side <= most for side, most in zip(self.shape, self.device.host, strict=True))


def parse_target(text: str) -> Target:
    """Returns the target with a name such as "h100", "h100x8" or "v5e:16x16".

    Raises:
      UserError: there is no such device, number or topology.
    """
    known = list_devices()
    # The longest name, so that "rtx4090" is no "rt".
    names = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    found = re.fullmatch(rf"({names})(?:([x:])(\d{{1,6}}(?:x\d{{1,6}})*))?", text, re.ASCII)
    if not found:
        name = next((name for name in known if text.startswith(name)), None)
        if name is not None:
            shapes = _valid_shapes(read_device(name))
            raise UserError(f"--target={text} is not valid; valid: {shapes}")
        raise UserError(
            f"--target={text} is not valid{did_you_mean(text, known)}; valid: {', '.join(known)}, "
            "also several GPUs (h100x8) or a TPU topology (v5e:16x16)"
        )
    name, separator, numbers = found.groups()
    device = read_device(name)
    shape = tuple(map(int, numbers.split("x"))) if numbers else (1,) * len(device.host)
    if separator not in (None, "x" if device.platform == "cuda" else ":"):
        shape = ()
    target = Target(text, device, shape)
    if not _exists(target):
        raise UserError(f"--target={text} is not valid; valid: {_valid_shapes(device)}")
    return target


def _exists(target: Target) -> bool:
    """Returns whether a target is a part of one host, or consists of whole hosts."""
    shape, host, largest = target.shape, target.device.host, target.device.largest
    if len(shape) != len(host) or min(shape) < 1:
        return False
    if target.in_one_host:
        return True
    sides = zip(shape, host, largest, strict=True)
    return all(side % step == 0 and side <= most for side, step, most in sides)


def _valid_shapes(device: Device) -> str:
    name, host, largest = device.name, device.host, device.largest
    if device.platform == "cuda":
        return f"{name}, {name}x2 to {name}x{host[0]}, or multiples of {host[0]} to {largest[0]}"
    join = lambda sides: "x".join(map(str, sides))  # noqa: E731
    return (
        f"{name}, {name}:{join(host)} or a part of it, or whole hosts: multiples of its "
        f"{len(host)} sides, such as {name}:{join(2 * side for side in host)}, up to "
        f"{name}:{join(largest)}"
    )


# ------------------------------------------------------------------------------------------------
# Devices of JAX
# ------------------------------------------------------------------------------------------------


def prepare_jax() -> None:
    """Keeps JAX from using devices of this machine; call it before the first computation."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if jax.config.jax_platforms != "cpu":
        jax.config.update("jax_platforms", "cpu")


def devices_of(target: Target) -> list[jax.Device]:
    """Returns devices of a target, which programs can be compiled for, but not run on.

    Raises:
      UserError: a package is missing or does not fit this version of JAX.
    """
    device = target.device
    extra, package = _EXTRAS[device.platform]
    if not any(map(_is_installed, package)):
        raise UserError(
            f"--target={target.name} needs {package[0]}; beside the clone: "
            f"pip install './tokenvit_jax[{extra}]' jax=={jax.__version__}"
        )
    try:
        return _topology(target).devices
    except Exception as error:  # of the plugin, of any type
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"--target={target.name}: the compiler cannot be used ({reason}); its packages must "
            f"fit: pip install './tokenvit_jax[{extra}]' jax=={jax.__version__}"
        ) from error


def compiler_options(device: Device) -> dict[str, Any]:
    """Returns the options of a compilation without a device."""
    if device.platform == "tpu":
        # The compiler unrolls what a fusion does with the blocks that it holds on the chip. Half of
        # the memory for blocks (16 MiB on a v5e) takes .6 of the time; bytes, memory and operations
        # of DGT-T's training step stay within 1.5 %.
        return {"xla_tpu_scoped_vmem_limit_kib": 8 * 1024}
    # Products written in Triton need the autotuner, which needs a device.
    return {"xla_gpu_enable_triton_gemm": False}


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the folder above
        return False


def _topology(target: Target) -> topologies.TopologyDescription:
    device, shape = target.device, target.shape
    if device.platform == "cuda":
        hosts = max(1, shape[0] // device.host[0])
        name = f"1x{hosts}x{shape[0] // hosts}"  # partitions, hosts, devices of a host
        return topologies.get_topology_desc(name, "cuda", topology=name, **device.compiler)
    name = f"{device.name}:{'x'.join(map(str, shape))}"
    host = shape if target.in_one_host else device.host
    host = (*host, 1)[:3]
    return topologies.get_topology_desc(name, "tpu", chips_per_host_bounds=host, **device.compiler)
