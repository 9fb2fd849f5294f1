"""Files of weights: what is read from them, and messages about the others."""

import contextlib
import sys
import types
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from tokenvit_jax.errors import UserError
from tokenvit_jax.weights import read_arrays

ARRAYS = {"a.weight": np.arange(3, dtype=np.float32), "b.bias": np.ones((2, 2), np.float32)}


class Tensor:
    """Stands for torch.Tensor: what the reader uses of it."""

    is_sparse = False

    def __init__(self, array):
        self._array = array

    def detach(self):
        return self

    float = detach

    def is_floating_point(self):
        return self._array.dtype.kind == "f"

    def numpy(self):
        if self._array is None:
            raise RuntimeError("quantised")
        return self._array


TENSORS = {name: Tensor(array) for name, array in ARRAYS.items()}
OTHERS = {name: Tensor(array + 1) for name, array in ARRAYS.items()}


@pytest.fixture
def read_torch(monkeypatch, tmp_path):
    """Returns a function that reads a file with some content, in place of PyTorch."""

    def read(content, **options):
        def load(path, map_location, weights_only):
            assert weights_only is True
            if isinstance(content, Exception):
                raise content
            return content

        safe_globals = lambda classes: contextlib.nullcontext()  # noqa: E731
        torch = types.ModuleType("torch")
        torch.Tensor, torch.load = Tensor, load
        torch.serialization = types.SimpleNamespace(safe_globals=safe_globals)
        monkeypatch.setitem(sys.modules, "torch", torch)
        path = tmp_path / "w.pth"
        zipfile.ZipFile(path, "w").close()
        return read_arrays(path, **options)

    return read


def check(found, offset=0):
    assert found.keys() == ARRAYS.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, ARRAYS[name] + offset)


@pytest.mark.parametrize(
    "content",
    [
        TENSORS,
        {"epoch": 3, 1: Tensor(np.ones(1)), **TENSORS},
        {"model": TENSORS, "optimizer": {"state": {}}, "epoch": 3},
        {"state_dict": TENSORS, "args": object()},
        {"net": TENSORS},
        {"model_ema": TENSORS},
        {"state_dict": {f"module.{name}": tensor for name, tensor in TENSORS.items()}},
        {"model": {f"_orig_mod.module.{name}": tensor for name, tensor in TENSORS.items()}},
    ],
)
def test_files_of_torch(read_torch, content):
    check(read_torch(content))


def test_moving_average(read_torch, caplog):
    for key, average in (("model", "model_ema"), ("state_dict", "state_dict_ema")):
        content = {key: TENSORS, average: OTHERS}
        check(read_torch(content))
        (message,) = caplog.messages
        assert message.endswith("also holds a moving average of the weights: see --ema")
        caplog.clear()
        check(read_torch(content, ema=True), offset=1)
        assert not caplog.messages
    with pytest.raises(UserError, match=r"^--ema: --source=.*w\.pth holds no moving average"):
        read_torch({"model": TENSORS}, ema=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list; valid: arrays by name"),
        (Tensor(np.ones(3)), "holds a Tensor; valid: arrays by name"),
        ({1: Tensor(np.ones(3))}, "holds no arrays with names"),
        ({"model": "x"}, "holds no arrays with names"),
        ({"a": Tensor(None)}, "holds an array that cannot be read: "),
        (RuntimeError("Weights only load failed"), "is refused: .*KEY is 'state_dict' in files of"),
        (RuntimeError("a TorchScript archive"), r"is refused: .*torch\.jit\.load\(FILE, 'cpu'\)"),
    ],
)
def test_files_of_torch_that_hold_something_else(read_torch, content, message):
    with pytest.raises(UserError, match=f"^--source=.*w.pth {message}"):
        read_torch(content)


@pytest.mark.parametrize("wrapper", ["module.", "model.", "net.", "model.module.", "backbone."])
def test_names_that_begin_with_a_wrapper(tmp_path, wrapper):
    save_file({wrapper + name: array for name, array in ARRAYS.items()}, tmp_path / "w")
    check(read_arrays(tmp_path / "w"))


@pytest.mark.parametrize("start", [b"PK", b"\x80"])
def test_safetensors_files_whose_header_looks_like_another_file(tmp_path, start):
    """A file begins with the length of its header, which has any bytes."""
    path = tmp_path / "w.safetensors"
    save_file(ARRAYS, path, metadata={"note": ""})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    modulus = 256 ** len(start)
    padding = (int.from_bytes(start, "little") - length) % modulus
    save_file(ARRAYS, path, metadata={"note": "x" * padding})
    assert path.read_bytes().startswith(start)
    check(read_arrays(path))


def test_numpy_archives(tmp_path):
    np.savez(tmp_path / "w.npz", **ARRAYS)
    check(read_arrays(tmp_path / "w.npz"))
    (tmp_path / "half.npz").write_bytes((tmp_path / "w.npz").read_bytes()[:200])
    with pytest.raises(UserError, match=r"half\.npz is a damaged archive: its end is missing"):
        read_arrays(tmp_path / "half.npz")
    np.savez(tmp_path / "o.npz", a=np.array([{}], object))
    with pytest.raises(UserError, match=r"o\.npz is a damaged NumPy archive: .*pickle"):
        read_arrays(tmp_path / "o.npz")
