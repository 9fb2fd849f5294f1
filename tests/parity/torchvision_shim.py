"""Lets torchvision be imported beside a PyTorch for which its compiled operators do not load.

torchvision's wheel wants the CUDA libraries; importing it without them fails only because it
describes operators that were not registered. Declaring them is enough for everything in Python.
"""

import importlib
import sys
from types import ModuleType

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = None  # the declarations live as long as this object


def import_torchvision() -> ModuleType:
    """Imports torchvision, with declared operators if its compiled ones do not load."""
    global _library
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        import torch

        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in _OPERATORS:
            _library.define(operator)
        return importlib.import_module("torchvision")
