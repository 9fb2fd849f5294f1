import pytest
from imagenet_archives import BROKEN, TRUNCATED, encode, write_archives

from tokenvit_jax.data.datasets import imagenet2012


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """A small ImageNet with one truncated training image and one broken validation image."""
    folder = tmp_path_factory.mktemp("archives")
    write_archives(folder, corrupt={TRUNCATED: encode(11)[:-200], BROKEN: b"no image"})
    return folder


@pytest.fixture(scope="session")
def prepared(archives, tmp_path_factory):
    """Its data_dir."""
    data_dir = tmp_path_factory.mktemp("prepared")
    imagenet2012.prepare(archives, data_dir)
    return data_dir
