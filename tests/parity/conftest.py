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


@pytest.fixture(scope="session")
def transformers():
    pytest.importorskip("torch")
    library = pytest.importorskip("transformers")
    import transformers.utils
    import transformers.utils.import_utils

    # Its models import torchvision, if there is one, although they do not need it; builds of
    # torchvision that do not match torch fail.
    for module in (transformers.utils, transformers.utils.import_utils):
        module.is_torchvision_available = lambda: False
    return library
