"""Reads files of torch.save as data: PyTorch's own reader, which runs no code from them.

What training programs keep beside the arrays (flags, paths, histories of metrics) becomes empty
stand-ins: the classes of these objects are neither imported nor called.
"""

import logging
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np

from tokenvit_jax.errors import UserError
from tokenvit_jax.weights.rules import reason, shown

# First bytes of a file of torch.save before PyTorch 1.6; later files are zip archives.
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PICKLES = 4  # the magic number, the version, facts about the machine, the content

# Keys under which training programs keep the arrays; those of moving averages: see _is_average.
_ARRAYS = {
    "model", "state_dict", "model_state_dict", "module", "net", "network", "params", "student",
    "teacher",
}  # fmt: skip
_AVERAGES = {"ema", "average", "averaged", "avg", "swa"}  # words of such keys
# Keys under which there are no weights of a model.
_OTHER_STATE = re.compile(r"optim|sched|scaler|callback|loops|_extra_state|rng|hyper_param")
_DEPTH = 5  # nested dictionaries that are searched for arrays
_SPARSE_LIMIT = 2**31  # elements of a sparse tensor that is made dense

# Packages, and further classes, whose objects training programs keep beside the arrays.
_RECORD_PACKAGES = {
    "addict", "argparse", "datetime", "decimal", "lightning", "lightning_fabric", "ml_collections",
    "mmcv", "mmengine", "numpy", "omegaconf", "pathlib", "pytorch_lightning", "typing", "uuid",
    "yacs",
}  # fmt: skip
_RECORDS = {
    "collections.defaultdict", "collections.deque", "functools.partial", "types.SimpleNamespace",
    "torch.torch_version.TorchVersion",
    *(f"builtins.{name}" for name in (
        "bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "range", "slice",
        "str", "tuple",
    )),
}  # fmt: skip
# torch.save writes the names that Python 2 knew.
_PYTHON_2 = {
    "__builtin__.long": "builtins.int", "__builtin__.unicode": "builtins.str",
    "__builtin__.xrange": "builtins.range",
}  # fmt: skip
# Packages whose classes PyTorch itself checks.
_CHECKED_BY_TORCH = {"torch", "collections", "_codecs"}
_BUILTINS = {f"builtins.{name}" for name in ("bytearray", "complex", "set")}

_ADVICE = (
    "If you trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=False)[KEY], "
    "'FILE.safetensors'), where KEY is 'state_dict' in files of timm, Lightning and mmengine, else "
    "most often 'model'; a whole model has .state_dict() in place of [KEY]"
)


def read_torch(path: Path, ema: bool) -> dict[str, np.ndarray]:
    """Reads the arrays of a file of torch.save.

    Args:
      path: an undamaged zip archive, or a file of a PyTorch before 1.6.
      ema: whether to read the moving average of the arrays in place of the arrays.

    Returns:
      Name -> array; floating-point numbers as float32, other types as they are.

    Raises:
      UserError: PyTorch is not installed, or the file is damaged, holds objects that could run
        code, or no arrays by name.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError(
            f"--source={path} was written by torch.save: reading it needs PyTorch (pip install "
            "torch), or a copy written by safetensors.torch.save_file"
        ) from error
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if not hasattr(torch.serialization, "safe_globals"):
        raise UserError(
            f"--source={path} needs PyTorch 2.6 or later; found {torch.__version__}; or a copy "
            "written by safetensors.torch.save_file"
        )
    tensors = choose(path, _load(path, zipped, torch), torch.Tensor, ema)
    return {name: _to_array(path, name, tensor, torch) for name, tensor in tensors.items()}


def _load(path: Path, zipped: bool, torch: Any) -> Any:
    """Returns the content of a file, with stand-ins for the objects beside the tensors."""
    try:
        names = _class_names(path, zipped)
    except UserError:
        raise
    except Exception as error:  # pickletools raises many kinds
        raise UserError(f"--source={path} is truncated or damaged: {reason(error)}") from error
    stand_ins = {name: kind for name in names if (kind := _stand_in(name))}
    if unknown := [name for name in names if not (name in stand_ins or _is_checked(name))]:
        raise UserError(_refusal(path, unknown))
    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals(list(stand_ins.values())),
            torch.sparse.check_sparse_tensor_invariants(),  # wrong indices end the process else
        ):
            warnings.simplefilter("ignore")  # about versions of pickle
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # errors of pickle, zipfile and torch
        found = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, UnpicklingError) and (found or zipped):  # archives have checksums
            raise UserError(_refusal(path, found)) from error
        raise UserError(f"--source={path} is truncated or damaged: {reason(error)}") from error


def _class_names(path: Path, zipped: bool) -> list[str]:
    """Returns the sorted names of the classes and functions that a file refers to.

    Raises:
      UserError: the file is a TorchScript program.
      Exception: the file is damaged.
    """
    if not zipped:
        with path.open("rb") as file:
            return _names_in(file, _LEGACY_PICKLES)
    with zipfile.ZipFile(path) as archive:
        members = {name.rpartition("/")[2]: name for name in archive.namelist()}
        if "constants.pkl" in members:  # such as OpenAI's files of CLIP
            raise UserError(
                f"--source={path} is refused: it is a TorchScript program. If you trust it: "
                "safetensors.torch.save_file(torch.jit.load(FILE, 'cpu').state_dict(), "
                "'FILE.safetensors')"
            )
        info = archive.getinfo(members["data.pkl"])
        info.CRC = info.CRC or None  # 0: PyTorch was told not to write checksums
        with archive.open(info) as file:
            return _names_in(file, 1)


def _names_in(file: Any, pickles: int) -> list[str]:
    operations = (op for _ in range(pickles) for op in pickletools.genops(file))
    names = {arg.replace(" ", ".") for op, arg, _ in operations if op.name == "GLOBAL"}
    return sorted(_PYTHON_2.get(name, name.replace("__builtin__.", "builtins.")) for name in names)


class _Empty:
    """Stands for an object that is not read."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Empty":
        del args, kwargs
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def __setstate__(self, state: Any) -> None:
        del state


class _Dict:
    """Stands for a kind of dictionary; PyTorch fills only the plain kinds."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return OrderedDict()


class _List:
    """Stands for a kind of list."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return []


def _stand_in(name: str) -> type | None:
    """Returns a class that stands for a class of objects beside the arrays; None: it may run code.

    PyTorch finds the stand-in by the name of the class.
    """
    if name.split(".")[0] not in _RECORD_PACKAGES and name not in _RECORDS:
        return None
    module, _, kind = name.rpartition(".")
    base = _List if kind == "deque" else _Empty
    base = _Dict if kind.lower().endswith(("dict", "cfgnode")) else base
    return type(kind, (base,), {"__module__": module, "__qualname__": kind})


def _is_checked(name: str) -> bool:
    return name.split(".")[0] in _CHECKED_BY_TORCH or name in _BUILTINS


def _refusal(path: Path, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    kinds = f" ({', '.join(map(shown, names[:3]))}{more})" if names else ""
    return (
        f"--source={path} is refused: it holds more than arrays{kinds}, and reading it could run "
        f"code. {_ADVICE}"
    )


# ------------------------------------------------------------------------------------------------
# The arrays among the content
# ------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    keys: tuple[str, ...]  # of the nested dictionaries
    tensors: dict[str, Any]

    @property
    def is_average(self) -> bool:
        return any(map(_is_average, self.keys))

    def __str__(self) -> str:
        return "".join(f"[{shown(key)!r}]" for key in self.keys) or "no key"


def choose(path: Path, content: Any, tensor: type, ema: bool) -> dict[str, Any]:
    """Returns the tensors by name that a file of torch.save holds.

    Args:
      path: the file, for messages.
      content: what the file holds. The tensors may be inside nested dictionaries.
      tensor: class of tensors.
      ema: whether to choose the moving average of the arrays. A file that holds only the average
        needs no ``ema``.

    Raises:
      UserError: there are no tensors by name, no average, or several equally likely dictionaries.
    """
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise UserError(f"--source={path} holds an object of type {kind}; valid: arrays by name")
    found = list(_state_dicts(content, tensor, (), set()))
    average = _largest(path, [one for one in found if one.is_average])
    arrays = _largest(path, [one for one in found if not one.is_average])
    if ema and average is None:
        raise UserError(f"--ema: --source={path} holds no moving average of the weights")
    if average and arrays and not ema:
        logging.warning(
            "--source=%s also holds a moving average of the weights, %s: see --ema", path, average
        )
    chosen = average if ema or arrays is None else arrays
    return chosen.tensors if chosen else {}


def _state_dicts(
    tree: Mapping, tensor: type, keys: tuple[str, ...], seen: set[int]
) -> Iterator[_Found]:
    """Yields the dictionaries of tensors in nested dictionaries, each with its keys."""
    if id(tree) in seen or len(keys) > _DEPTH:  # a dictionary may hold itself
        return
    seen.add(id(tree))
    named = {key: value for key, value in tree.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if isinstance(value, tensor)}
    if any(len(value.shape) for value in tensors.values()):  # numbers alone are no weights
        yield _Found(keys, tensors)
    for key, inner in named.items():
        if isinstance(inner, Mapping) and not _OTHER_STATE.search(key.lower()):
            yield from _state_dicts(inner, tensor, (*keys, key), seen)


def _is_average(key: str) -> bool:
    """Returns whether arrays under a key are averages: "model_ema", DINO's "teacher"."""
    return key == "teacher" or not _AVERAGES.isdisjoint(re.split(r"[^a-z]+", key.lower()))


def _largest(path: Path, found: list[_Found]) -> _Found | None:
    """Returns the dictionary with the most arrays, of those under the usual keys if there are any.

    Raises:
      UserError: several have as many.
    """
    usual = [one for one in found if all(key in _ARRAYS or _is_average(key) for key in one.keys)]
    found = sorted(usual or found, key=lambda one: -len(one.tensors))
    if len(found) > 1 and len(found[0].tensors) == len(found[1].tensors) > 1:
        raise UserError(
            f"--source={path} holds {_listed(found)} with as many arrays; valid: a file with one "
            "of them"
        )
    if len(found) > 1 and len(found[1].tensors) > 1:
        logging.warning(
            "--source=%s holds %s: the first one is read, which has most arrays",
            path,
            _listed(found),
        )
    return found[0] if found else None


def _listed(found: Iterable[_Found]) -> str:
    return ", ".join(map(str, found))


def _to_array(path: Path, name: str, tensor: Any, torch: Any) -> np.ndarray:
    """Returns a tensor as an array, floating-point numbers as float32.

    Raises:
      UserError: the tensor has no plain numbers.
    """
    if problem := _why_unreadable(tensor, torch):
        raise UserError(f"--source={path}: {shown(name)} {problem}; valid: a plain tensor")
    try:
        tensor = tensor.detach()
        dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
        if dense.is_floating_point():
            return dense.float().numpy()
        return dense.resolve_conj().resolve_neg().numpy()
    except Exception as error:  # torch raises many kinds, such as for types that numpy lacks
        raise UserError(
            f"--source={path}: {shown(name)} cannot be read: {reason(error)}"
        ) from error


def _why_unreadable(tensor: Any, torch: Any) -> str | None:
    if tensor.is_quantized:
        return "is quantised"
    if tensor.is_meta:
        return "has a shape but no numbers (device 'meta')"
    if tensor.is_nested:
        return "is nested"
    if tensor.layout != torch.strided:
        return "is sparse and too large" if tensor.numel() > _SPARSE_LIMIT else None
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "repeats its numbers (an expanded view)"
    return None
