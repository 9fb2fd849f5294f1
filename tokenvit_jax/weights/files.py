"""Reads files of published weights without running code from them."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tokenvit_jax.errors import UserError


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a file of weights.

    Args:
      path: a safetensors file, or a file that torch.save wrote, which needs PyTorch; it holds
        arrays by name, possibly inside "model" or "state_dict".

    Returns:
      Name -> array.

    Raises:
      UserError: the file does not exist, is damaged, or is a pickle that needs to run code.
    """
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise UserError(f"--source={path}: {error.strerror}") from error
    if start == b"PK" or start[:1] == b"\x80":  # a ZIP archive of torch.save, or an older pickle
        return _read_torch(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"--source={path} is neither a safetensors file nor one that torch.save wrote: {error}"
        ) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError(
            f"--source={path} was written by torch.save: reading it needs PyTorch (pip install "
            "torch), or a copy written by safetensors.torch.save_file"
        ) from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # errors of pickle, zipfile and torch
        raise UserError(
            f"--source={path} is refused: it holds more than arrays, and reading it could run "
            "code. If you trust it: safetensors.torch.save_file(torch.load(FILE, "
            "weights_only=False)['model'], 'FILE.safetensors')"
        ) from error
    for key in ("model", "state_dict"):
        found = found.get(key, found)
    return {name: tensor.float().numpy() for name, tensor in found.items()}
