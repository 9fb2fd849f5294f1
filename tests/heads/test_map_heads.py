"""Heads on maps against mmsegmentation's, in training and evaluation, and their blocks in float64.

The arrays in `golden` are of UPerHead, FCNHead, FPN and FPNHead of mmsegmentation 1.x with random
weights, without dropout: logits, the loss, and running statistics after a step. The images have
72 x 104 pixels, so that maps at strides 16 and 32 are rounded up to 5 x 7 and 3 x 4 cells.
"""

import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tokenvit_jax.heads import FcnHead, SemanticFpn, UperNet
from tokenvit_jax.heads.upernet import POOL_SIDES
from tokenvit_jax.ops import resize_bilinear
from tokenvit_jax.tasks.segmentation.losses import pixel_cross_entropy

SIZE = (72, 104)
UPERNET = UperNet(7, channels=10, dropout=0.0)
FCN = FcnHead(7, channels=9, dropout=0.0)
FPN = SemanticFpn(7, channels=11, neck_channels=14, dropout=0.0)
# File of arrays, head, and the factor of its loss.
CASES = [("upernet", UPERNET, 1.0), ("fcn_aux", FCN, 0.4), ("semantic_fpn", FPN, 1.0)]

# Pattern of mmsegmentation's names -> our module.
MODULES = [
    (r"psp_modules\.(\d)\.1", lambda i: f"pool_{POOL_SIDES[i]}"),
    (r"(?:neck\.)?lateral_convs\.(\d)", lambda i: f"lateral_{i + 1}"),
    (r"neck\.fpn_convs\.(\d)", lambda i: f"output_{i + 1}"),
    (r"fpn_convs\.(\d)", lambda i: f"fpn_{i + 1}"),
    (r"scale_heads\.(\d)\.(\d)", lambda i, j: f"scale_{i + 1}_{j // 2 + 1}"),
    ("fpn_bottleneck", lambda: "fusion"),
    ("bottleneck", lambda: "bottleneck"),
    (r"convs\.0", lambda: "convolution"),
    ("conv_seg", lambda: "classifier"),
]
ARRAYS = {"running_mean": "mean", "running_var": "var", "bias": "bias"}


def ours(name, array):
    """Returns the path and the array of one of mmsegmentation's variables in this project."""
    name = re.sub(r"^(decode|auxiliary)_head\.", "", name)
    module = next(
        f"{make(*map(int, found.groups()))}{name[found.end() :]}"
        for pattern, make in MODULES
        if (found := re.match(pattern, name))
    )
    *path, kind = module.split(".")
    if "bn" in path:
        path = ["norm" if part == "bn" else part for part in path]
        kind = "scale" if kind == "weight" else ARRAYS[kind]
    else:
        path = path[:1] if name.startswith("neck") else path  # no BatchNorm: "conv" is all
        kind, array = ("kernel", array.transpose(2, 3, 1, 0)) if kind == "weight" else (kind, array)
    collection = "batch_stats" if kind in ("mean", "var") else "params"
    return (collection, *path, kind), array


@functools.cache
def golden(name):
    arrays = dict(np.load(Path(__file__).parent / "golden" / f"{name}_72x104.npz"))
    maps = [arrays[f"in/{i}"].transpose(0, 2, 3, 1) for i in range(4) if f"in/{i}" in arrays]
    pick = lambda start: unflatten_dict(  # noqa: E731
        dict(ours(k.removeprefix(start), v) for k, v in arrays.items() if k.startswith(start))
    )
    return arrays, maps if len(maps) > 1 else maps[0], pick("w/"), pick("after_train_step_")


@pytest.mark.parametrize(("name", "head", "weight"), CASES)
def test_a_head_equals_mmsegmentation(name, head, weight):
    arrays, maps, variables, after = golden(name)

    @jax.jit
    def run(variables):
        logits = head.apply(variables, maps, train=False)
        trained, state = head.apply(variables, maps, train=True, mutable=["batch_stats"])
        to_pixels = functools.partial(resize_bilinear, size=SIZE)
        return logits, trained, state, pixel_cross_entropy(logits, arrays["labels"], to_pixels)

    logits, trained, state, loss = run(variables)
    near = functools.partial(np.testing.assert_allclose, rtol=2e-5)
    for found, expected in ((logits, arrays["out_eval"]), (trained, arrays["out_train"])):
        near(found, expected.transpose(0, 2, 3, 1), atol=2e-6 * np.abs(expected).max())
    near(weight * loss, arrays["loss/loss_ce"])
    for path, expected in flatten_dict(after).items():  # the running variance is unbiased
        near(flatten_dict(state)[path], expected, atol=1e-6)
