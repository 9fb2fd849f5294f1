"""Reads files of published weights without running code from them."""

import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.weights.pickle_files import START, read_pickle
from tokenvit_jax.weights.rules import reason, shown
from tokenvit_jax.weights.torch_files import LEGACY, read_torch

INDEX = ".index.json"  # end of the name of a file that lists the files of sharded weights
SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".pkl", ".bin", ".ckpt", ".tar")  # of weights
_PART = re.compile(r"(.+-)(\d+)-of-(\d+)(\.\w+)")  # name of one of these files
# Parts of names that wrappers add anywhere (DataParallel, torch.compile, FSDP), ...
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# ... that all names of a file may begin with (Lightning, DINO, Segmenter), in any order, ...
_PREFIXES = (
    "model.", "net.", "network.", "backbone.", "encoder.", "student.", "teacher.", "ema.",
    "ema_model.",
)  # fmt: skip
# ... and names of counters that wrappers add (AveragedModel).
_COUNTERS = {"n_averaged"}
# Types of safetensors -> types of numpy and of jax.
_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2, "F8_E8M0": jnp.float8_e8m0fnu,
    "F8_E4M3FNUZ": jnp.float8_e4m3fnuz, "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    "BOOL": np.bool_, "C64": np.complex64,
}  # fmt: skip
# First bytes of files that are mistaken for weights -> what these files are.
_MISTAKEN = {
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with git lfs pull",
    b"<": "a web page: the download failed",
    b"\x1f\x8b": "compressed (gzip): unpack it first",
    b"BZh": "compressed (bzip2): unpack it first",
    b"\xfd7zXZ": "compressed (xz): unpack it first",
    b"(\xb5/\xfd": "compressed (zstd): unpack it first",
    b"7z\xbc\xaf": "compressed (7z): unpack it first",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "one NumPy array without a name, or pickled objects: save arrays by name with "
    "numpy.savez",
}
METADATA = "__metadata__"  # texts in the header of a safetensors file
_VALID = (
    "valid: a safetensors file, a NumPy archive (.npz), a file of torch.save or a pickle of arrays"
)
_TAR = slice(257, 262)  # where a tar archive says so


def read_arrays(path: Path, ema: bool = False) -> dict[str, np.ndarray]:
    """Reads the arrays of a file of weights.

    Args:
      path: a safetensors file; a NumPy archive (.npz); a file that torch.save wrote, which needs
        PyTorch; or a pickle of NumPy arrays, as detectron2 writes it. The last two hold arrays by
        name, possibly inside "model", "state_dict" or the like. Of weights in several files: their
        index (.index.json) or any of the files.
      ema: whether to read the moving average of the arrays (exponential, EMA) in place of the
        arrays of the last step. A file of torch.save that holds only the average needs no ``ema``.

    Returns:
      Name -> array, floating-point numbers as float32, other types as they are. What wrappers add
      to names ("module.") is left out.

    Raises:
      UserError: a file does not exist, is damaged, holds no arrays by name or no average, holds
        empty arrays, objects that could run code, or holds two arrays of one name.
    """
    arrays = {}
    for part in _parts(path):
        found = _read_file(part, ema)
        if twice := next(iter(found.keys() & arrays.keys()), None):
            raise UserError(f"--source={part}: {shown(twice)} is also in another file beside it")
        arrays |= found
    if not arrays:
        raise UserError(f"--source={path} holds no arrays with names")
    for name, array in arrays.items():
        if not array.size:
            raise UserError(f"--source={path}: {shown(name)} has no elements: {array.shape}")
    return _plain_names(path, {name: _as_float32(array) for name, array in arrays.items()})


def check_file(path: Path) -> int:
    """Returns the size of a file [bytes].

    Raises:
      UserError: there is no such file, with a similar name in its folder, or it is no regular file.
    """
    try:
        if path.is_file():
            return path.stat().st_size
        if path.exists():
            kind = "folder" if path.is_dir() else "device or pipe"
            raise UserError(f"--source={path} is a {kind}; {_VALID}")
        parent = next(folder for folder in path.absolute().parents if folder.is_dir())
        first = path.absolute().relative_to(parent).parts[0]
        hint = did_you_mean(first, sorted(entry.name for entry in parent.iterdir()))
    except OSError as error:
        raise UserError(f"--source={path}: {error.strerror}") from error
    missing = "" if parent / first == path.absolute() else f": {parent} has no folder {first!r}"
    raise UserError(f"--source={path}: no such file or folder{missing}{hint}")


def _as_float32(array: np.ndarray) -> np.ndarray:
    """Returns floating-point numbers of any width as float32, other arrays as they are."""
    if array.dtype.kind in "biucSUOMm" or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    with np.errstate(over="ignore"):  # an infinite value is refused, with the name of its array
        return array.astype(np.float32, copy=False)


# ------------------------------------------------------------------------------------------------
# Weights in several files
# ------------------------------------------------------------------------------------------------


def _parts(path: Path) -> list[Path]:
    """Returns the files that hold the weights together.

    Raises:
      UserError: some are missing, or the index is damaged.
    """
    if path.name.endswith(INDEX):
        names = _listed_in(path)
    elif (match := _PART.fullmatch(path.name)) and 0 < int(match[2]) <= int(match[3]) <= 9999:
        start, number, count, suffix = match.groups()
        names = [
            f"{start}{part:0{len(number)}d}-of-{count}{suffix}" for part in range(1, int(count) + 1)
        ]
    else:
        return [path]
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise UserError(
            f"--source={path} is one of {len(names)} files of weights; missing beside it: "
            f"{_first(missing)}"
        )
    return [path.parent / name for name in names]


def _listed_in(index: Path) -> list[str]:
    """Returns the sorted names of the files that an index lists."""
    check_file(index)
    try:
        files = set(json.loads(index.read_text())["weight_map"].values())
        plain = all(isinstance(name, str) and name == Path(name).name for name in files)
        if not files or not plain:
            raise ValueError("'weight_map' holds no names of files in its folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"--source={index} is no index of weights: {type(error).__name__} ({reason(error)})"
        ) from error
    return sorted(files)


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shown, names[:3])) + more


# ------------------------------------------------------------------------------------------------
# One file
# ------------------------------------------------------------------------------------------------


def _read_file(path: Path, ema: bool) -> dict[str, np.ndarray]:
    size = check_file(path)
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(f"--source={path}: {error.strerror}") from error
    if not size:
        raise UserError(f"--source={path} is empty: it has 0 bytes")
    if not start.strip(b"\0"):
        raise UserError(f"--source={path} is damaged: it begins with zeros")
    if not is_safetensors(path):
        if start[:2] == b"PK":
            return _read_archive(path, ema)
        if start.startswith(LEGACY):
            return read_torch(path, ema)
        if start.startswith(START) and not LEGACY.startswith(start):
            return read_pickle(path, ema)
        _refuse(path, start, size)
    if ema:
        _refuse_average(path)
    return read_safetensors(path)[0]


def _refuse_average(path: Path) -> None:
    raise UserError(f"--ema: --source={path} holds no moving average of the weights")


def _refuse(path: Path, start: bytes, size: int) -> None:
    """Raises UserError for a file of no known format."""
    for magic, kind in _MISTAKEN.items():
        if start.startswith(magic):
            raise UserError(f"--source={path} is {kind}; {_VALID}")
    if start[_TAR] == b"ustar":
        raise UserError(f"--source={path} is a tar archive: unpack it first; {_VALID}")
    if size < 16 or LEGACY.startswith(start):
        raise UserError(f"--source={path} is truncated: it has {size} bytes; {_VALID}")
    raise UserError(
        f"--source={path} is neither a safetensors file, a NumPy archive, nor a file of torch.save"
    )


def is_safetensors(path: Path) -> bool:
    """Returns whether a file begins like a safetensors file, which may be damaged.

    It begins with the length of its header, whose bytes may look like those of any other file.
    """
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def read_header(path: Path) -> dict[str, Any]:
    """Returns the header of a safetensors file.

    Raises:
      UserError: the file is truncated or damaged.
    """
    size = check_file(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise UserError(
                f"--source={path} is truncated or damaged: its header should have {length} bytes, "
                f"the whole file has {size}"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_once)
        entries = [entry for name, entry in header.items() if name != METADATA]
        last = max((entry["data_offsets"][1] for entry in entries), default=0)
        if last > size - 8 - length:
            raise UserError(
                f"--source={path} is truncated: its arrays need {last} bytes, it has "
                f"{size - 8 - length}"
            )
        with safe_open(path, "np"):  # checks the header
            return header
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError,
            IndexError, RecursionError) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--source={path} is damaged, or no safetensors file: {reason}") from error


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the arrays of a safetensors file by name, and its texts by name.

    Raises:
      UserError: the file is truncated or damaged, or an array has a type that numpy lacks.
    """
    header = read_header(path)
    metadata = header.pop(METADATA, {})
    size = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    with path.open("rb") as file:
        file.seek(-size, os.SEEK_END)
        data = np.fromfile(file, np.uint8)
    return {name: _array_in(path, name, entry, data) for name, entry in header.items()}, metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a dictionary of pairs; raises ValueError for a key that occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{shown(twice)} occurs twice in its header")
    return found


def _array_in(path: Path, name: str, entry: Mapping[str, Any], data: np.ndarray) -> np.ndarray:
    start, stop = entry["data_offsets"]
    if entry["dtype"] not in _TYPES:
        valid = ", ".join(_TYPES)
        raise UserError(
            f"--source={path}: {shown(name)} has the type {entry['dtype']}; valid: {valid}"
        )
    try:
        array = data[start:stop].view(np.dtype(_TYPES[entry["dtype"]]))
        return array.reshape(entry["shape"])
    except ValueError as error:  # more axes than numpy has
        raise UserError(
            f"--source={path}: {shown(name)} cannot be read: {reason(error)}"
        ) from error


def _read_archive(path: Path, ema: bool) -> dict[str, np.ndarray]:
    """Reads a zip archive: of numpy.savez or of torch.save."""
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(f"--source={path} is truncated: an archive without its end")
        names = _checked_names(path)
    except UserError:
        raise
    except Exception as error:  # zipfile raises many kinds for damaged archives
        raise UserError(f"--source={path} is a damaged archive: {reason(error)}") from error
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise UserError(f"--source={path} holds two members named {shown(twice)}")
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return read_torch(path, ema)
    if not names or not all(name.endswith(".npy") for name in names):
        raise UserError(f"--source={path} is an archive of other files than arrays; {_VALID}")
    if ema:
        _refuse_average(path)
    return _read_numpy(path)


def _checked_names(path: Path) -> list[str]:
    """Returns the names of an archive's files after a comparison of their checksums.

    PyTorch does not compare them. It may be told not to write them either, and writes 0 then.
    """
    with zipfile.ZipFile(path) as archive:
        files = [info for info in archive.infolist() if not info.is_dir()]
        for info in files:
            if info.CRC:
                with archive.open(info) as file:
                    while file.read(2**20):
                        pass
        return [info.filename for info in files]


def _read_numpy(path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    with np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            try:
                arrays[name] = archive[name]
                if not isinstance(arrays[name], np.ndarray):  # numpy gives the bytes of other files
                    raise ValueError("it is no file of numpy")
            except Exception as error:  # numpy raises many kinds for damaged headers
                if "allow_pickle" in str(error):
                    raise UserError(
                        f"--source={path} is refused: {shown(name)} holds pickled objects, and "
                        "reading them could run code; valid: arrays of numbers"
                    ) from error
                raise UserError(
                    f"--source={path} is damaged: {shown(name)} cannot be read ({reason(error)})"
                ) from error
    return arrays


# ------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------


def _plain_names(path: Path, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arrays without the parts of their names that wrappers add.

    Raises:
      UserError: two arrays would get the same name.
    """
    plain = {name: _without_wrappers(name) for name in arrays if name not in _COUNTERS}
    while prefix := _shared_prefix(plain.values()):
        plain = {name: short.removeprefix(prefix) for name, short in plain.items()}
    names = {}
    for name, short in plain.items():
        if (other := names.setdefault(short, name)) != name:
            raise UserError(
                f"--source={path} holds both {shown(other)} and {shown(name)}, which are the same "
                "without the parts of names that wrappers add; valid: one of them"
            )
    return {short: arrays[name] for short, name in names.items()}


def _without_wrappers(name: str) -> str:
    *parts, last = name.split(".")
    return ".".join([*(part for part in parts if part not in _WRAPPERS), last])


def _shared_prefix(names: Iterable[str]) -> str | None:
    names = list(names)
    for prefix in _PREFIXES:
        if names and all(name.startswith(prefix) for name in names):
            return prefix
    return None
