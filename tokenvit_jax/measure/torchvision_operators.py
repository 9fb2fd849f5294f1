"""torchvision's compiled operators, to be timed beside ours.

torch and torchvision are imported by the functions that need them. A wheel of torchvision for
another build of PyTorch has no compiled operators that load.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from tokenvit_jax.errors import UserError
from tokenvit_jax.measure.torch_peers import Running, check_operators, torch_device
from tokenvit_jax.ops import roi_levels


def has_operators() -> bool:
    """Returns whether torchvision is here, with operators for the device that JAX uses."""
    try:
        check_operators()
    except UserError:
        return False
    return True


def calls(run: Callable[..., Any], inputs: Sequence[jax.Array]) -> dict[str, Callable[[], Any]]:
    """Returns "torchvision" -> a function that starts an operator, and keeps its result as `found`.

    Args:
      run: function of the package and the inputs as tensors.
      inputs: arrays.

    Returns:
      Nothing if :func:`has_operators` does not hold.
    """
    if not has_operators():
        return {}
    import torch
    import torchvision

    device = torch_device()
    tensors = [torch.from_numpy(np.array(x)).to(device) for x in inputs]
    running = _running(torch, device)

    def call():
        call.found = run(torchvision, *tensors)
        return running

    return {"torchvision": call}


def _running(torch, device):
    return Running(torch.cuda.synchronize if device == "cuda" else lambda: None)


def roi_align_calls(
    maps: Sequence[jax.Array], strides: Sequence[int], boxes: jax.Array, *, size: int, mode: str
) -> dict[str, Callable[[], Any]]:
    """Returns "torchvision" -> a function that starts `torchvision.ops.roi_align` on each map.

    Maps and features are channels first, as there; regions are divided over the maps before.

    Args:
      maps: the pyramid (B, h, w, C).
      strides: strides of the maps [pixels].
      boxes: regions (B, R, 4).
      size: bins along an axis.
      mode: "forward", or "train" for forward and backward.

    Returns:
      Nothing if :func:`has_operators` does not hold.
    """
    if not has_operators():
        return {}
    import torch
    from torchvision.ops import roi_align

    device = torch_device()
    levels = np.asarray(roi_levels(boxes, len(maps))).ravel()
    image = np.repeat(np.arange(boxes.shape[0]), boxes.shape[1])
    rois = np.concatenate([image[:, None], np.asarray(boxes).reshape(-1, 4)], 1)
    pairs = []
    for level, x in enumerate(maps):
        x = torch.from_numpy(np.array(x, np.float32)).to(device)
        x = x.permute(0, 3, 1, 2).contiguous().to(getattr(torch, str(maps[0].dtype)))
        own = torch.from_numpy(rois[levels == level].astype(np.float32)).to(x)
        pairs.append((x.requires_grad_(mode == "train"), own, 1 / strides[level]))
    weights = [torch.randn(len(own), x.shape[1], size, size).to(x) for x, own, _ in pairs]
    running = _running(torch, device)

    def call():
        features = [roi_align(x, own, size, scale, 0, True) for x, own, scale in pairs]
        if mode == "train":
            torch.autograd.grad(features, [x for x, _, _ in pairs], weights)
        return running

    return {"torchvision": call}
