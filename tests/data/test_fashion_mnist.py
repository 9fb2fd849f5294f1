"""Fashion-MNIST: IDX files of a few images."""

import gzip

import numpy as np
import pytest
from make_task import open_dataset

from tokenvit_jax.data import builtin_info, datasets
from tokenvit_jax.errors import UserError

SIZES = {"train": 6, "t10k": 3}


def idx(array):
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


def arrays(part):
    number = SIZES[part]
    pixels = np.random.default_rng(number).integers(0, 256, (number, 28, 28), dtype=np.uint8)
    return {"images-idx3": pixels, "labels-idx1": np.arange(number, dtype=np.uint8) + 4}


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "downloads"
    folder.mkdir()
    for part in SIZES:
        for name, array in arrays(part).items():
            content = idx(array)
            if part == "train":  # compressed, as they are published
                (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (folder / f"{part}-{name}-ubyte").write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["fashion_mnist", "tfds:fashion_mnist"])
def test_images_and_labels(files, tmp_path, name):
    folder = datasets.prepare("fashion_mnist", files, tmp_path)
    assert folder == tmp_path / "fashion_mnist" / "3.0.1"
    for split, part in (("train", "train"), ("test", "t10k")):
        source = open_dataset(name, split, str(tmp_path))
        found = {}
        for index in range(len(source)):
            record = source.read(index)
            assert record["image"].mode == "RGB"
            found[record["label"]] = np.asarray(record["image"])[..., 2]
        expected = arrays(part)
        assert sorted(found) == expected["labels-idx1"].tolist()
        for label, pixels in zip(expected["labels-idx1"], expected["images-idx3"], strict=True):
            np.testing.assert_array_equal(found[label], pixels)
    assert builtin_info("fashion_mnist").classes[9] == "Ankle boot"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("train-images-idx3-ubyte.gz", None, "train-images-idx3-ubyte[.gz] not found in --manual"),
        ("train-images-idx3-ubyte.gz", gzip.compress(b"1" * 99, mtime=0)[:20], "is damaged ("),
        ("t10k-images-idx3-ubyte", b"no idx", "is no complete IDX file of bytes; download it"),
        ("t10k-images-idx3-ubyte", b"", "is no complete IDX file of bytes; download it"),
        ("t10k-labels-idx1-ubyte", idx(np.zeros(2, np.uint8)), "holds an array (3, 28, 28) and"),
        ("t10k-labels-idx1-ubyte", idx(np.zeros(0, np.uint8)), "labels (0,) up to 0; valid: (N"),
        ("t10k-labels-idx1-ubyte", idx(np.zeros((), np.uint8)), "labels () up to 0; valid: (N"),
        ("t10k-labels-idx1-ubyte", idx(np.zeros(3, np.uint8))[:-1], "is no complete IDX file"),
        ("t10k-labels-idx1-ubyte", idx(np.full(3, 10, np.uint8)), "up to 10; valid: (N, 28, 28), "),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(files, tmp_path, name, content, message):
    if content is None:
        (files / name).unlink()
    else:
        (files / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        datasets.prepare("fashion_mnist", files, tmp_path)
    assert message in str(error.value) and name.removesuffix(".gz") in str(error.value)
