"""Counts the products in a compiled program (HLO), 2 operations per multiply-add."""

import json
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tokenvit_jax.ahead.hlo_text import ARRAY, Instruction, sizes
from tokenvit_jax.ahead.instructions import Launch

_PASSES = re.compile(r"(?i)(?:alg_)?dot_(bf16|tf32)\w*?_x(\d)")


class Work(NamedTuple):
    """Products of a kernel.

    Attributes:
      operations: their number, 2 per multiply-add, times the passes of the precision.
      precision: "bfloat16", "default" or "float32", as in the files of devices.
    """

    operations: float
    precision: str


def of_instruction(instruction: Instruction, operands: list[str]) -> Iterator[Work]:
    """Yields the products of a product, a convolution or a call of a library.

    Args:
      instruction: the instruction; any other has none.
      operands: shapes of its operands.
    """
    if instruction.opcode in ("dot", "convolution", "custom-call"):
        multiply_adds = _multiply_adds(instruction, operands)
        if multiply_adds:
            precision, passes = _precision(instruction, operands[0])
            yield Work(2.0 * multiply_adds * passes, precision)


def of_launches(launches: tuple[Launch, ...]) -> Iterator[Work]:
    """Yields the products that the launches of a kernel compute in matrix units."""
    for launch in launches:
        for precision, operations in launch.counts.products.items():
            yield Work(launch.blocks * launch.warps * operations, precision)


def _multiply_adds(instruction: Instruction, operands: list[str]) -> float:
    """Returns the multiply-adds of a product, a convolution or a call of a library."""
    shapes = [ARRAY.search(operand) for operand in operands]
    if len(operands) < 2 or not shapes[0] or not shapes[1]:
        return 0
    first, second = (sizes(shape[2]) for shape in shapes[:2])
    result = sizes(ARRAY.search(instruction.shape)[2])
    target = instruction.target
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        return math.prod(result) * math.prod(first[i] for i in sizes(contracted[1]))
    if instruction.opcode == "convolution":
        return _convolution(instruction.rest, first, second, result)
    if target.startswith("__cublas"):
        config = _backend_config(instruction)["gemm_backend_config"]
        contracted = config["dot_dimension_numbers"]["lhs_contracting_dimensions"]
        return math.prod(result) * math.prod(first[int(i)] for i in contracted)
    if target.startswith("__cudnn$conv"):
        return _library_convolution(instruction, first, second, result)
    if target.startswith("__cudnn$fmha"):
        return _library_attention(instruction, first)
    return 0


def _backend_config(instruction: Instruction) -> dict:
    """Returns the settings of a call of a library, which stand at the end of its line."""
    start = instruction.rest.find("backend_config=") + len("backend_config=")
    return json.JSONDecoder().raw_decode(instruction.rest, start)[0]


def _library_convolution(instruction, first, second, result) -> float:
    """Returns the multiply-adds of a convolution of cuDNN, forward or backward.

    All three have a large array of images with the channels of the filter's output, and a filter:
    each of its entries meets each place of this array once.
    """
    filters = re.search(r"dim_labels=\w+_(\w+)->", instruction.rest)[1]
    kind = instruction.target.removeprefix("__cudnn$conv")
    if kind == "BackwardFilter":
        outputs, kernel = second, result
    else:
        outputs, kernel = (first if kind == "BackwardInput" else result), second
    return math.prod(outputs) * math.prod(kernel) / kernel[filters.index("o")]


def _library_attention(instruction, query) -> float:
    """Returns the multiply-adds of cuDNN's attention: 2 products forward, 5 backward."""
    config = _backend_config(instruction)["cudnn_fmha_backend_config"]
    logits = math.prod(map(int, config["intermediate_tensor_shape"]["dimensions"]))
    return logits * query[-1] * (5 if "Backward" in instruction.target else 2)


def _convolution(rest: str, images: list[int], kernel: list[int], result: list[int]) -> float:
    """Returns the multiply-adds of a convolution without those on padding and on holes."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    of_images, of_kernel, of_result = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", rest)
    window = dict(part.split("=") for part in window[1].split()) if window else {}
    pairs = 1
    for i, axis in enumerate(sorted(filter(str.isdigit, of_result))):
        sizes = (
            images[of_images.index(axis)],
            kernel[of_kernel.index(axis)],
            result[of_result.index(axis)],
        )
        pairs *= _pairs(window, i, *sizes)
    batch_and_channels = result[of_result.index("b")] * result[of_result.index("f")]
    return pairs * batch_and_channels * kernel[of_kernel.index("i")]


def _pairs(window: dict[str, str], axis: int, length: int, kernel: int, result: int) -> int:
    """Returns the number of pairs of a place in the result and a kernel entry that meet a pixel."""

    def setting(name, default):
        return window[name].split("x")[axis] if name in window else default

    low = int(str(setting("pad", "0_0")).split("_")[0])
    stride, dilation = int(setting("stride", 1)), int(setting("rhs_dilate", 1))
    holes = int(setting("lhs_dilate", 1))
    places = np.arange(result)[:, None] * stride - low + np.arange(kernel) * dilation
    meets = (places >= 0) & (places <= (length - 1) * holes) & (places % holes == 0)
    return int(meets.sum())


def _precision(instruction: Instruction, operand: str) -> tuple[str, int]:
    """Returns the precision of a product, and how often it passes through the units."""
    if ARRAY.search(operand)[1] in ("bf16", "f16"):
        return "bfloat16", 1
    passes = _PASSES.search(instruction.rest)
    if passes:
        return ("bfloat16" if passes[1].lower() == "bf16" else "default"), int(passes[2])
    asked = re.search(r"operand_precision\W+(\w+)", instruction.rest)
    full = asked is not None and asked[1].lower() in ("high", "highest")
    return ("float32" if full else "default"), 1
