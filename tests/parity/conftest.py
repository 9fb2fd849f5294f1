"""Fixtures of PyTorch packages; a test that needs a missing package is skipped."""

import pytest

from tokenvit_jax.measure import torch_peers


@pytest.fixture(scope="session")
def torchvision():
    pytest.importorskip("torch")
    try:
        return torch_peers.import_torchvision()
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed")


@pytest.fixture(scope="session")
def timm(torchvision):
    return pytest.importorskip("timm")
