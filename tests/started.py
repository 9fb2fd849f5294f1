"""Starts programs in processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def environment(compiled: Path, devices: int = 1) -> dict[str, str]:
    """Returns the environment of a process with a number of devices, without kernels.

    Args:
      compiled: folder in which processes share compiled programs.
      devices: number of virtual devices of the process.
    """
    kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    kept.append(f"--xla_force_host_platform_device_count={devices}")
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(kept),
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TOKENVIT_JAX_KERNELS": "off",  # their tracing takes seconds in each process
    }


def start(
    arguments: list[object], env: dict[str, str], process_group: int | None = None
) -> subprocess.Popen:
    """Starts Python with arguments, in the repository."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=process_group,
    )


def start_several(count: int, arguments: list[object], env: dict[str, str]):
    """Starts a command in several processes, which find each other."""
    flags = f"--coordinator={free_address()}", f"--num_processes={count}"
    return [start([*arguments, *flags, f"--process_id={i}"], env) for i in range(count)]


def free_address() -> str:
    """Returns an address at which nothing listens yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def finish(process: subprocess.Popen, status: int = 0, timeout: float = 300) -> tuple[str, str]:
    """Returns output and errors of a process that ends with a status, without a traceback."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == status, err
    assert "Traceback" not in err
    return out, err
