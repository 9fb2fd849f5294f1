"""Reads files of published weights without running code from them."""

import argparse
import logging
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tokenvit_jax.errors import UserError

# Where checkpoints keep their arrays, and the moving average of them: timm, DeiT, Swin, others.
_ARRAYS = ("model", "state_dict", "module", "net", "network", "params")
_AVERAGES = ("model_ema", "state_dict_ema", "ema", "ema_state_dict", "params_ema")
# Names of wrappers (DataParallel, Lightning, torch.compile, DINO) that all arrays of a file may
# begin with.
_WRAPPERS = ("module.", "model.", "_orig_mod.", "net.", "backbone.")


def read_arrays(path: Path, ema: bool = False) -> dict[str, np.ndarray]:
    """Reads the arrays of a file of weights.

    Args:
      path: a safetensors file; a NumPy archive (.npz); or a file that torch.save wrote, which needs
        PyTorch and holds arrays by name, possibly inside "model", "state_dict" or the like.
      ema: whether to read the moving average of the arrays (exponential, EMA) in place of the
        arrays of the last step. A file of torch.save that holds only the average needs no ``ema``.

    Returns:
      Name -> array. A name of a wrapper that all names begin with ("module.") is left out.

    Raises:
      UserError: the file does not exist, is damaged, holds no arrays by name or no average, or is a
        pickle that needs to run code.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"--source={path}: {error.strerror}") from error
    # A safetensors file begins with the length of its header, whose bytes may look like anything.
    is_safetensors = start[8:] == b"{"
    if start[:2] == b"PK" and not is_safetensors and not zipfile.is_zipfile(path):
        raise UserError(f"--source={path} is a damaged archive: its end is missing")
    if not is_safetensors and (start[:2] == b"PK" or start[:1] == b"\x80"):
        arrays = _read_numpy(path) if _is_numpy(path) else _read_torch(path, ema)
    else:
        arrays = _read_safetensors(path)
    if not arrays:
        raise UserError(f"--source={path} holds no arrays with names")
    return _without_wrappers(arrays)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"--source={path} is neither a safetensors file, a NumPy archive, nor a file of "
            f"torch.save: {error}"
        ) from error


def _is_numpy(path: Path) -> bool:
    if not zipfile.is_zipfile(path):  # a file of torch.save as it was before 1.6
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def _read_numpy(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--source={path} is a damaged NumPy archive: {error}") from error


def _read_torch(path: Path, ema: bool) -> dict[str, np.ndarray]:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError(
            f"--source={path} was written by torch.save: reading it needs PyTorch (pip install "
            "torch), or a copy written by safetensors.torch.save_file"
        ) from error
    try:
        # timm's and DeiT's checkpoints hold the flags of the training, which run no code.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about versions of pickle
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # errors of pickle, zipfile and torch
        if "TorchScript" in str(error):  # such as OpenAI's files of CLIP
            raise UserError(
                f"--source={path} is refused: it is a TorchScript program. If you trust it: "
                "safetensors.torch.save_file(torch.jit.load(FILE, 'cpu').state_dict(), "
                "'FILE.safetensors')"
            ) from error
        raise UserError(
            f"--source={path} is refused: it holds more than arrays, and reading it could run "
            "code. If you trust it: safetensors.torch.save_file(torch.load(FILE, "
            "weights_only=False)[KEY], 'FILE.safetensors'), where KEY is 'state_dict' in files of "
            "timm, else most often 'model'"
        ) from error
    tensors = _choose(path, content, torch.Tensor, ema)
    try:
        return {name: _to_array(tensor) for name, tensor in tensors.items()}
    except Exception as error:  # torch raises many kinds, such as for quantised tensors
        raise UserError(f"--source={path} holds an array that cannot be read: {error}") from error


def _choose(path: Path, content: Any, tensor: type, ema: bool) -> dict[str, Any]:
    """Returns the tensors by name that a file of torch.save holds, possibly one level deeper."""
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise UserError(f"--source={path} holds a {kind}; valid: arrays by name")

    def tensors_at(*keys: str) -> Iterator[dict[str, Any]]:
        for key in keys:
            if isinstance(inner := content.get(key), Mapping) and (found := named(inner)):
                yield found

    def named(tree: Mapping) -> dict[str, Any]:
        return {
            key: value
            for key, value in tree.items()
            if isinstance(key, str) and isinstance(value, tensor)
        }

    average = next(tensors_at(*_AVERAGES), None)
    if ema and average is None:
        raise UserError(f"--ema: --source={path} holds no moving average of the weights")
    found = next(tensors_at(*_ARRAYS), None) or named(content)
    if average and found and not ema:
        logging.warning("--source=%s also holds a moving average of the weights: see --ema", path)
    return average if ema or (average and not found) else found


def _to_array(tensor: Any) -> np.ndarray:
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return dense.float().numpy() if dense.is_floating_point() else dense.numpy()


def _without_wrappers(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in arrays):
            shorter = {name.removeprefix(wrapper): array for name, array in arrays.items()}
            return _without_wrappers(shorter)
    return dict(arrays)
