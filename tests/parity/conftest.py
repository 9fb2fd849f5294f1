"""The peers to compare with; tests that ask for one are skipped where it is not installed."""

import pytest

from tokenvit_jax.measure import timm_peers


@pytest.fixture(scope="session")
def torchvision():
    pytest.importorskip("torch")
    try:
        return timm_peers.import_torchvision()
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed")


@pytest.fixture(scope="session")
def timm(torchvision):
    return pytest.importorskip("timm")
