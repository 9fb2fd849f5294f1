"""The device under test, and the CPU of the same process, whose results are the expected ones."""

import os

import jax
import pytest

VARIABLE = "TOKENVIT_JAX_TEST_ACCELERATOR"


def pytest_configure() -> None:
    """Keeps the CPU beside the accelerator where JAX_PLATFORMS names the accelerator only."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if VARIABLE in os.environ and platforms and "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")


@pytest.fixture(scope="session")
def accelerator() -> jax.Device:
    """The first accelerator that jax finds, or the CPU where it is to stand in for one."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        pytest.skip(f"{VARIABLE} is not set: run make test-accelerator")
    if wanted not in ("found", "cpu"):
        pytest.fail(f"{VARIABLE}={wanted} is not valid; valid: found, cpu")
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        pytest.skip(f"jax cannot use the devices of JAX_PLATFORMS: {error}")
    if device.platform == "cpu" and wanted != "cpu":
        pytest.skip("jax finds no accelerator: make test-accelerator EXTRA=cuda, or EXTRA=tpu")
    return device


@pytest.fixture(scope="session")
def cpu() -> jax.Device:
    """The CPU, beside the accelerator."""
    return jax.devices("cpu")[0]
