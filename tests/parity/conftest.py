"""The peers to compare with; tests that ask for one are skipped where it is not installed."""

import pytest


@pytest.fixture(scope="session")
def torchvision():
    pytest.importorskip("torch")
    from torchvision_shim import import_torchvision

    try:
        return import_torchvision()
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed")


@pytest.fixture(scope="session")
def timm(torchvision):
    return pytest.importorskip("timm")
