"""Float32 arithmetic in single instructions, for Pallas kernels that run on NVIDIA GPUs.

XLA compiles kernels without contraction: a product and a sum remain two instructions. Division and
exp2 treat subnormal numbers exactly, which takes eight and four instructions. The functions here
take one each. Elsewhere, where kernels are interpreted, they are the ordinary operations.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax._src.pallas.triton import lowering
from jax.core import ShapedArray
from jax.experimental.pallas import triton as plt
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.typing import ArrayLike


def _instruction(name: str, ordinary: Callable, assembly: str) -> Callable[..., jax.Array]:
    """Returns an elementwise function of float32 arrays that is one instruction on a GPU."""
    primitive = Primitive(f"{name}_instruction")
    primitive.def_impl(ordinary)
    primitive.def_abstract_eval(lambda x, *_: ShapedArray(x.shape, x.dtype))
    mlir.register_lowering(primitive, mlir.lower_fun(ordinary, multiple_results=False))

    def assembled(*args):
        constraints = ",".join(["=f"] + ["f"] * len(args))
        shape = jax.ShapeDtypeStruct(args[0].shape, jnp.float32)
        return plt.elementwise_inline_asm(
            assembly, args=args, constraints=constraints, pack=1, result_shape_dtypes=[shape]
        )[0]

    lowering.register_lowering(primitive)(lowering.lower_fun(assembled, multiple_results=False))

    def function(*args: ArrayLike) -> jax.Array:
        return primitive.bind(*jnp.broadcast_arrays(*(jnp.asarray(x, jnp.float32) for x in args)))

    return function


_fma = _instruction("fma", lambda a, b, c: a * b + c, "fma.rn.f32 $0, $1, $2, $3;")
_exp2 = _instruction("exp2", jnp.exp2, "ex2.approx.ftz.f32 $0, $1;")
_reciprocal = _instruction("reciprocal", lambda x: 1 / x, "rcp.approx.ftz.f32 $0, $1;")


def fma(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> jax.Array:
    """Returns a b + c in float32, rounded once on a GPU; the arguments are broadcast."""
    return _fma(a, b, c)


def exp2(x: ArrayLike) -> jax.Array:
    """Returns 2^x in float32, with a relative error of 2^-22; 0 below 2^-126."""
    return _exp2(x)


def reciprocal(x: ArrayLike) -> jax.Array:
    """Returns 1 / x in float32, with an error of one unit in the last place."""
    return _reciprocal(x)
