"""Files of weights: what is read from them, and messages about the others.

tests/parity/test_torch_files.py has the files that torch.save writes.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import pickle
import random
import sys
import types
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tokenvit_jax.errors import UserError
from tokenvit_jax.weights import read_arrays
from tokenvit_jax.weights.own import is_own, read_own, write_own
from tokenvit_jax.weights.torch_files import LEGACY, choose

ARRAYS = {"a.weight": np.arange(3, dtype=np.float32), "b.bias": np.ones((2, 2), np.float32)}


def check(found, offset=0):
    assert found.keys() == ARRAYS.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, ARRAYS[name] + offset)


def safetensors(header, data=bytes(16)):
    """Returns a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def archive(**members):
    """Returns a zip archive; "_" in place of "." in the names of its members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as writer:
        for name, content in members.items():
            writer.writestr(name.replace("_", "."), content)
    return file.getvalue()


def npy(shape, dtype="<f4"):
    """Returns a file of numpy with a header and almost no numbers."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(16)


def twice():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as writer, pytest.warns(UserWarning, match="Duplicate name"):
        for _ in range(2):
            writer.writestr("a.npy", npy((4,)))
    return file.getvalue()


GOOD = safetensors({"a": entry()})
NPZ = npz(a=np.ones(4, np.float32))
REFUSED = {  # kind -> content of the file, words of the message
    "empty": (b"", "is empty: it has 0 bytes"),
    "one byte": (b"\x08", "is truncated: it has 1 bytes"),
    "zeros": (bytes(1000), "is damaged: it begins with zeros"),
    "text": (b"not weights at all", "is neither a safetensors file, a NumPy archive, nor a file"),
    "a web page": (b"<!DOCTYPE html><html>", "is a web page: the download failed; valid: a safet"),
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid",
        "is a pointer of Git LFS: fetch",
    ),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(30), r"is compressed \(gzip\): unpack it first"),
    "tar": (
        b"w.pth".ljust(257, b"\0") + b"ustar" + bytes(250),
        "is a tar archive: unpack it first",
    ),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(30), "is an HDF5 file; valid"),
    "a pickle of code": (
        pickle.dumps({"model": ARRAYS, "x": pathlib.Path("a")}),
        r"is refused: it is a pickle that holds more than NumPy arrays \(pathlib",
    ),
    "a pickle of a function": (
        pickle.dumps({"model": ARRAYS, "x": print}),
        r"is refused: it is a pickle that holds more than NumPy arrays \(builtins\.print\)",
    ),
    "a cut pickle": (pickle.dumps(ARRAYS)[:-9], "is truncated or damaged: "),
    "a pickle of objects": (
        pickle.dumps({"a": np.array([None, 1])}),
        "a has the type object; valid: numbers",
    ),
    "a pickle without names": (pickle.dumps([1.0] * 9), "holds an object of type list; valid"),
    "the start of a legacy file": (LEGACY[:9], "is truncated: it has 9 bytes"),
    ".npy": (npy((4,)), "is one NumPy array without a name"),
    "no arrays": (safetensors({}, b""), "holds no arrays with names"),
    "a cut header": (GOOD[:30], "is truncated or damaged: its header should have 62 bytes"),
    "a header of 2^60 bytes": (
        (2**60).to_bytes(8, "little") + b"{}" * 20,
        "is truncated or damaged: its header should have",
    ),
    "cut arrays": (GOOD[:-1], "is truncated: its arrays need 16 bytes, it has 15"),
    "too many bytes": (GOOD + b"x", "is damaged, or no safetensors file: .*not fully covered"),
    "2^60 numbers": (safetensors({"a": entry(shape=(2**60,))}), "is damaged, or no safetensors"),
    "an offset of 2^60": (
        safetensors({"a": entry(offsets=(0, 2**60))}),
        "is truncated: its arrays need 1152921504",
    ),
    "negative offsets": (safetensors({"a": entry(offsets=(-16, 0))}), "is damaged, or no safetens"),
    "offsets of another type": (safetensors({"a": entry(offsets="x")}), "is damaged, or no safete"),
    "entries of another type": (safetensors({"a": 3}), "is damaged, or no safetensors file"),
    "a header that is a list": (
        safetensors(b"{" + b"[" * 99),
        "is damaged, or no safetensors file",
    ),
    "deep nesting": (safetensors(b'{"a":' + b"[" * 99999), "is damaged, or no safetensors file"),
    "no UTF-8": (safetensors(b"{\xff\xff"), "is damaged, or no safetensors file"),
    "a name twice": (
        safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)),
        "a occurs twice in",
    ),
    "a type of no whole bytes": (
        safetensors({"a": entry("F4", (32,))}),
        "a has the type F4; valid",
    ),
    "an unknown type": (safetensors({"a": entry("X9")}), "is damaged, or no safetensors file"),
    "too many axes": (
        safetensors({"a": entry(shape=(4, *[1] * 99))}),
        "a cannot be read: .*dimens",
    ),
    "no elements": (
        safetensors({"a": entry(shape=(1, 0), offsets=(0, 0))}, b""),
        r"no elements: \(1",
    ),
    "no elements of a great shape": (
        safetensors({"a": entry(shape=(0, 2**50), offsets=(0, 0))}, b""),
        "no elements",
    ),
    "names that become the same": (
        safetensors({"a.w": entry(), "module.a.w": entry(offsets=(16, 32))}, bytes(32)),
        "holds both (module.)?a.w and (module.)?a.w, which are the same without",
    ),
    "a cut archive": (NPZ[:200], "is truncated: an archive without its end"),
    "PK": (b"PK" + bytes(30), "is truncated: an archive without its end"),
    "an empty archive": (archive(), "is an archive of other files than arrays"),
    "an archive of something else": (
        archive(a_txt="x"),
        "is an archive of other files than arrays",
    ),
    "a damaged archive": (
        NPZ[:150] + b"x" + NPZ[151:],
        "is a damaged archive: Bad CRC-32 for file",
    ),
    "pickled objects": (npz(a=np.array([{}], object)), "is refused: a holds pickled objects"),
    "a member that is no array": (archive(a_npy="x"), "is damaged: a cannot be read"),
    "a member of 2^60 numbers": (archive(a_npy=npy((2**60,))), "is damaged: a cannot be read"),
    "a member of 2^36 numbers": (archive(a_npy=npy((2**36,))), "is damaged: a cannot be read"),
    "a header of a member that is code": (
        archive(a_npy=npy("exit()")),
        "is damaged: a cannot be re",
    ),
    "a member twice": (twice(), "holds two members named a.npy"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind, tmp_path):
    content, message = REFUSED[kind]
    path = tmp_path / "w"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^--source={path}.*{message}") as caught:
        read_arrays(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def damages(content, trials=300):
    """Yields damaged copies of a file: cut, with flipped bits, zeros or more bytes."""
    rng = random.Random(0)
    for _ in range(trials):
        damaged, place = bytearray(content), rng.randrange(len(content))
        kind = rng.choice(("cut", "flip", "zeros", "insert"))
        if kind == "cut":
            del damaged[place:]
        elif kind == "flip":
            damaged[place] ^= 1 << rng.randrange(8)
        elif kind == "zeros":
            damaged[place : place + 20] = bytes(min(20, len(content) - place))
        else:
            damaged[place:place] = rng.randbytes(rng.randrange(1, 20))
        yield damaged


def test_damaged_files(tmp_path):
    """One line, or the right numbers; in a safetensors file numbers have no checksum."""
    path, own = tmp_path / "w", tmp_path / "own"
    save_file(ARRAYS, path)
    write_own(own, {"params": ARRAYS}, {"config": {"model": "vit_ti"}})

    def read_both(path):
        return read_own(path) if is_own(path) else read_arrays(path)

    for content, read in (
        (path.read_bytes(), read_arrays),
        (npz(**ARRAYS), read_arrays),
        (own.read_bytes(), read_both),
    ):
        refused = 0
        for damaged in damages(content):
            path.write_bytes(damaged)
            try:
                found = read(path)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 500
            else:
                if content[:2] == b"PK" and found.keys() == ARRAYS.keys():
                    check(found)
        assert 150 < refused < 300


@pytest.mark.parametrize(
    "dtype",
    [np.float64, np.float16, ">f4", jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2],
)
def test_floating_point_numbers_become_float32(tmp_path, dtype):
    arrays = {name: array.astype(dtype) for name, array in ARRAYS.items()}
    if arrays["a.weight"].dtype.itemsize == 1:  # safetensors does not write numpy arrays of 8 bits
        name = {jnp.float8_e4m3fn: "F8_E4M3", jnp.float8_e5m2: "F8_E5M2"}[dtype]
        header = {
            "a.weight": entry(name, (3,), (0, 3)), "b.bias": entry(name, (2, 2), (3, 7)),
        }  # fmt: skip
        data = b"".join(array.tobytes() for array in arrays.values())
        (tmp_path / "w").write_bytes(safetensors(header, data))
    elif dtype == ">f4":
        np.savez(tmp_path / "w.npz", **arrays)
        os.rename(tmp_path / "w.npz", tmp_path / "w")
    else:
        save_file(arrays, tmp_path / "w")
    found = read_arrays(tmp_path / "w")
    check(found)
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "bool", "complex64", "<U3"])
def test_other_types_stay(tmp_path, dtype):
    np.savez(tmp_path / "w.npz", a=np.ones(3).astype(dtype))
    assert read_arrays(tmp_path / "w.npz")["a"].dtype == dtype


def test_too_large_for_float32_is_infinite(tmp_path):
    save_file({"a": np.array([1e300])}, tmp_path / "w")
    assert np.isinf(read_arrays(tmp_path / "w")["a"])  # which import_weights refuses


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
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "w.npz", **ARRAYS)
        check(read_arrays(tmp_path / "w.npz"))
    with pytest.raises(UserError, match=r"^--ema: --source=.*w\.npz holds no moving average"):
        read_arrays(tmp_path / "w.npz", ema=True)


# ------------------------------------------------------------------------------------------------
# Names and paths
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapper",
    [
        "module.", "model.", "net.", "backbone.", "encoder.", "_orig_mod.", "model.module.",
        "module.model.", "_orig_mod.module.model.backbone.encoder.", "teacher.", "encoder.module.",
    ],
)  # fmt: skip
def test_names_that_begin_with_a_wrapper(tmp_path, wrapper):
    arrays = {wrapper + name: array for name, array in ARRAYS.items()}
    arrays["n_averaged"] = np.array(3)  # torch's AveragedModel counts
    save_file(arrays, tmp_path / "w")
    check(read_arrays(tmp_path / "w"))


def test_wrappers_within_names(tmp_path):
    save_file(
        {"a._orig_mod.weight": ARRAYS["a.weight"], "b.bias": ARRAYS["b.bias"]}, tmp_path / "w"
    )
    check(read_arrays(tmp_path / "w"))
    parts = {"encoder.a": np.ones(1), "decoder.b": np.ones(1)}  # of Segmenter: no wrappers
    save_file(parts, tmp_path / "w")
    assert read_arrays(tmp_path / "w").keys() == parts.keys()


def test_paths(tmp_path):
    (tmp_path / "weights.pth").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # to open one would wait for ever
    for name, message in (
        ("weigths.pth", r"weigths.pth: no such file or folder \(did you mean 'weights.pth'\?\)$"),
        ("foldr/w", r": .* has no folder 'foldr' \(did you mean 'folder'\?\)$"),
        ("folder", "/folder is a folder; valid: a safetensors file"),
        ("pipe", "/pipe is a device or pipe; valid: a safetensors file"),
        ("weights.pth/x", "/weights.pth/x: no such file or folder: .* has no folder 'weights.pth'"),
        ("x" * 999, "File name too long"),
    ):
        with pytest.raises(UserError, match=f"^--source={tmp_path}.*{message}"):
            read_arrays(tmp_path / name)


def test_weights_in_several_files(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    files = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    weight_map = dict(zip(ARRAYS, files, strict=True))
    for name, file in weight_map.items():
        save_file({name: ARRAYS[name]}, tmp_path / file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in (index.name, *files):
        check(read_arrays(tmp_path / name))
    save_file({"a.weight": np.ones(3)}, tmp_path / files[1])
    with pytest.raises(UserError, match=r"00002-of-00002.*: a.weight is also in another file"):
        read_arrays(index)
    (tmp_path / files[1]).unlink()
    for name in (index.name, files[0]):
        with pytest.raises(UserError, match=rf"one of 2 files of .*missing beside it: {files[1]}$"):
            read_arrays(tmp_path / name)
    for content in ("", "[]", "{}", '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 3}}',
                    '{"weight_map": {}}', '{"weight_map": "x"}', "[" * 99999, '"\xff'):  # fmt: skip
        index.write_bytes(content.encode("latin1"))
        with pytest.raises(UserError, match=r"index.json is no index of weights: \w+ \("):
            read_arrays(index)


# ------------------------------------------------------------------------------------------------
# Files of torch.save, without PyTorch
# ------------------------------------------------------------------------------------------------


class Tensor:
    """Stands for torch.Tensor: what the reader uses of it."""

    layout, is_quantized, is_meta, is_nested = "strided", False, False, False

    def __init__(self, array):
        self._array, self.shape = array, array.shape

    def detach(self):
        return self

    float = untyped_storage = detach

    def is_floating_point(self):
        return self._array.dtype.kind == "f"

    def numel(self):
        return self._array.size

    def element_size(self):
        return self._array.itemsize

    @property
    def nbytes(self):
        return lambda: self._array.nbytes

    def numpy(self):
        return self._array


TENSORS = {name: Tensor(array) for name, array in ARRAYS.items()}
OTHERS = {name: Tensor(array + 1) for name, array in ARRAYS.items()}


@pytest.fixture
def read_torch(monkeypatch, tmp_path):
    """Returns a function that reads an archive in place of PyTorch, which finds some content."""

    def read(content, pickled=(), **options):
        stand_ins = {}

        def load(path, map_location, weights_only):
            assert weights_only is True
            if isinstance(content, Exception):
                raise content
            return content

        @contextlib.contextmanager
        def safe_globals(classes):
            stand_ins.update({f"{kind.__module__}.{kind.__name__}": kind for kind in classes})
            yield

        torch = types.ModuleType("torch")
        torch.Tensor, torch.load, torch.strided = Tensor, load, "strided"
        torch.serialization = types.SimpleNamespace(safe_globals=safe_globals)
        torch.sparse = types.SimpleNamespace(check_sparse_tensor_invariants=contextlib.nullcontext)
        monkeypatch.setitem(sys.modules, "torch", torch)
        path = tmp_path / "w.pth"
        with zipfile.ZipFile(path, "w") as writer:
            writer.writestr("w/data.pkl", pickle.dumps(pickled, protocol=2))
        return read_arrays(path, **options), stand_ins

    return read


def test_files_of_torch(read_torch):
    flags = argparse.Namespace(lr=np.float64(1e-3))
    found, stand_ins = read_torch({"state_dict": TENSORS, "args": None}, flags)
    check(found)
    assert "argparse.Namespace" in stand_ins and "numpy.dtype" in stand_ins
    assert argparse.Namespace not in stand_ins.values()  # no class of the file is called
    for content, message in (
        ([1, 2], "holds an object of type list; valid: arrays by name"),
        (
            pickle.UnpicklingError("GLOBAL a.b was not"),
            r"is refused: .*\(a.b\).*KEY is 'state_dict'",
        ),
    ):
        with pytest.raises(UserError, match=f"^--source=.*w.pth {message}"):
            read_torch(content)
    with pytest.raises(UserError, match=r"is refused: it holds more than arrays \(posix.system\)"):
        read_torch(TENSORS, os.system)


def test_without_pytorch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "w").write_bytes(LEGACY)
    with pytest.raises(UserError, match=r"was written by torch\.save: reading it needs PyTorch"):
        read_arrays(tmp_path / "w")


@pytest.mark.parametrize(
    "content",
    [
        TENSORS,
        {"epoch": 3, 1: Tensor(np.ones(1)), **TENSORS},
        {"model": TENSORS, "optimizer": {"state": {0: OTHERS}}, "loss": Tensor(np.array(1.0))},
        {"model_ema": TENSORS},
        {"state_dict": {"model": TENSORS}},
        {"ema": {"module": TENSORS, "decay": 0.9}},
        {"weights": TENSORS, "callbacks": {"best": OTHERS}},
    ],
)
def test_nested_dictionaries(content, tmp_path):
    assert choose(tmp_path, content, Tensor, ema=False) == TENSORS


def test_moving_average(tmp_path, caplog):
    for key, average in (
        ("model", "model_ema"), ("state_dict", "state_dict_ema"), ("student", "teacher"),
    ):  # fmt: skip
        content = {key: TENSORS, average: OTHERS}
        assert choose(tmp_path, content, Tensor, ema=False) == TENSORS
        (message,) = caplog.messages
        assert message.endswith(
            f"also holds a moving average of the weights, ['{average}']: see --ema"
        )
        caplog.clear()
        assert choose(tmp_path, content, Tensor, ema=True) == OTHERS
        assert not caplog.messages
    with pytest.raises(UserError, match=r"^--ema: --source=.* holds no moving average"):
        choose(tmp_path, {"model": TENSORS}, Tensor, ema=True)
    with pytest.raises(UserError, match=r"holds \['model'\], \['net'\] with as many arrays"):
        choose(tmp_path, {"model": TENSORS, "net": OTHERS}, Tensor, ema=False)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("module", [b"numpy._core", b"numpy.core"])
def test_pickles_of_arrays(tmp_path, protocol, module):
    """As detectron2 writes them: {"model": {name: array}, ...}, by any release of NumPy."""
    arrays = {**ARRAYS, "half": np.arange(3, dtype=np.float16), "step": np.int64(7)}
    content = {"model": arrays, "__author__": "somebody", "matching_heuristics": True}
    data = pickle.dumps(content, protocol)
    if module == b"numpy.core" and protocol < 4:  # later protocols store the lengths of names
        data = data.replace(b"numpy._core", module)
    (tmp_path / "w.pkl").write_bytes(data)
    found = read_arrays(tmp_path / "w.pkl")
    assert found["half"].dtype == np.float32
    for name in ARRAYS:
        np.testing.assert_array_equal(found[name], ARRAYS[name])


def test_pickles_run_no_code(tmp_path):
    marker = tmp_path / "marker"

    class Attack:
        def __reduce__(self):
            return pathlib.Path.touch, (marker,)

    for content in (
        {"model": {"a": np.ones(3), "b": Attack()}},
        Attack(),
        {"a": np.array([Attack()])},
    ):
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match="is refused: it is a pickle that holds more"):
            read_arrays(tmp_path / "w.pkl")
    assert not marker.exists()
