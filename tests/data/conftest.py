import pytest
from imagenet_archives import BROKEN, TRUNCATED, encode, write_archives

from tokenvit_jax.data.datasets import imagenet2012


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """A small ImageNet: one training image is truncated, one validation image is broken."""
    folder = tmp_path_factory.mktemp("archives")
    write_archives(folder, corrupt={TRUNCATED: encode(11)[:-200], BROKEN: b"no image"})
    return folder


@pytest.fixture(scope="session")
def prepared(archives, tmp_path_factory):
    """The `data_dir` into which the small ImageNet was prepared."""
    data_dir = tmp_path_factory.mktemp("prepared")
    imagenet2012.prepare(archives, data_dir)
    return data_dir
