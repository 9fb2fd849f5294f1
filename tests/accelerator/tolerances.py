"""How far results of an accelerator may be from those of a CPU in float32, and why.

Results differ for two reasons.

Rounding: every array is compared on the scale of its largest number. In float32, products are asked
for in full precision, so that an error is a few times 2^-24, times what sums of some hundred terms
and exponentials make of it. In bfloat16, operands and results are rounded to 8 bits (2^-9 of
themselves), and so may be the weights of an attention; sums are float32. The expected values are
computed in float32 from the same rounded inputs.

Choices: which of two keys, centres or groups is the nearest may fall the other way if they are
nearly equal, and then whole rows differ. In float32 this takes two distances within 1e-6, in
bfloat16 two within 1e-2 where an operator compares in its compute type. So operators that choose
may have a share of other numbers; nobody else may.

A whole network adds up the errors of its layers. There, and in its gradient, the norm of the
difference is compared with the norm of the expected tree, so that few other choices weigh little.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Tolerance(NamedTuple):
    """Bounds of one type.

    Attributes:
      rounding: largest difference of two numbers, as a part of the largest number of the array.
      other: share of the numbers of an array that may differ by more, if an operator chooses.
      network: norm of the difference of a network's outputs, as a part of the norm.
      gradient: the same of the gradient of all its parameters.
    """

    rounding: float
    other: float
    network: float
    gradient: float


TOLERANCES = {
    "float32": Tolerance(rounding=2e-5, other=0.01, network=1e-3, gradient=1e-2),
    "bfloat16": Tolerance(rounding=3e-2, other=0.1, network=0.05, gradient=0.1),
}
# Losses of 30 training steps in float32, as a part of the loss. The first one is a forward pass.
# After that, a difference grows with every step: Adam's first steps have the sign of the gradient,
# also where that is rounding noise.
FIRST_LOSS = 1e-4
LOSSES = 0.03


def problems(found: Any, expected: Any, dtype: str, chooses: bool) -> list[str]:
    """Returns a line for every array of two equal trees that differs by more than it may.

    Args:
      found: result of the accelerator.
      expected: result of the CPU.
      dtype: type of the computation, a key of :data:`TOLERANCES`.
      chooses: whether an operator makes choices.
    """
    tolerance = TOLERANCES[dtype]
    lines = []
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, right), left in zip(leaves, jax.tree.leaves(found), strict=True):
        share, worst = _difference(np.asarray(left), np.asarray(right), tolerance.rounding)
        if share > (tolerance.other if chooses else 0):
            name = jax.tree_util.keystr(path)
            lines.append(f"{name}: {share:.2%} of {right.shape} differ, by up to {worst:.2g}")
    return lines


def _difference(left, right, rounding):
    """Returns the share of numbers that differ by more, and the largest difference in the scale."""
    assert left.shape == right.shape
    if not jnp.issubdtype(right.dtype, jnp.floating):
        return np.mean(left != right), float(np.any(left != right))
    left, right = left.astype(np.float64), right.astype(np.float64)
    finite = np.isfinite(right)
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    scale = max(np.abs(right[finite]).max(initial=0), 1e-30)
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0, np.abs(left - right) / scale)
    error = np.where(np.isnan(error), np.inf, error)
    return np.mean(error > rounding), float(error.max())


def distance(found: Any, expected: Any) -> float:
    """Returns the norm of the difference of two trees as a part of the norm of the second one."""
    pairs = [
        (np.asarray(left, np.float64), np.asarray(right, np.float64))
        for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    ]
    difference = sum(np.sum((left - right) ** 2) for left, right in pairs)
    return float(np.sqrt(difference / sum(np.sum(right**2) for _, right in pairs)))
