"""Float32 arithmetic in few instructions, for Pallas kernels that run on NVIDIA GPUs.

XLA compiles kernels without contraction: a product and a sum remain two instructions. Division and
exp2 treat subnormal numbers exactly, which takes eight and four instructions. Two numbers in
bfloat16 become float32 in five, and rounding one number to bfloat16 occupies a pipe that is a
quarter as fast. The functions here take one instruction each, and two for two numbers in bfloat16.
The larger of a number and NaN is NaN here, as in XLA; in Triton it is the number. Elsewhere, where
kernels are interpreted, the functions are the ordinary operations.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax._src.pallas.triton import lowering
from jax.core import ShapedArray
from jax.experimental.pallas import triton as plt
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.typing import ArrayLike, DTypeLike


def _instruction(
    name: str,
    ordinary: Callable,
    assembly: str,
    constraints: str,
    dtype: DTypeLike = jnp.float32,
    pack: int = 1,
) -> Callable[..., jax.Array]:
    """Returns an elementwise function of arrays that has its own instructions on a GPU.

    Args:
      name: what it does.
      ordinary: the function in ordinary operations.
      assembly: PTX for ``pack`` neighbouring entries of each array.
      constraints: registers of the results and arguments, as LLVM writes them.
      dtype: type of the result.
      pack: entries per run of the assembly; two of 16 bits share a register.
    """
    primitive = Primitive(f"{name}_instruction")
    primitive.def_impl(ordinary)
    primitive.def_abstract_eval(lambda x, *_: ShapedArray(x.shape, jnp.dtype(dtype)))
    mlir.register_lowering(primitive, mlir.lower_fun(ordinary, multiple_results=False))

    def assembled(*args):
        shape = jax.ShapeDtypeStruct(args[0].shape, dtype)
        return plt.elementwise_inline_asm(
            assembly, args=args, constraints=constraints, pack=pack, result_shape_dtypes=[shape]
        )[0]

    lowering.register_lowering(primitive)(lowering.lower_fun(assembled, multiple_results=False))
    return primitive.bind


_fma = _instruction("fma", lambda a, b, c: a * b + c, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f")
_exp2 = _instruction("exp2", jnp.exp2, "ex2.approx.ftz.f32 $0, $1;", "=f,f")
_maximum = _instruction("maximum", jnp.maximum, "max.NaN.f32 $0, $1, $2;", "=f,f,f")
_minimum = _instruction("minimum", jnp.minimum, "min.NaN.f32 $0, $1, $2;", "=f,f,f")
_reciprocal = _instruction("reciprocal", lambda x: 1 / x, "rcp.approx.ftz.f32 $0, $1;", "=f,f")
_widen = _instruction(
    "widen", lambda x: x.astype(jnp.float32),
    "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", pack=2,
)  # fmt: skip
_narrow = _instruction(
    "narrow", lambda x: x.astype(jnp.bfloat16),
    "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", jnp.bfloat16, pack=2,
)  # fmt: skip


def _in_float32(*args):
    return jnp.broadcast_arrays(*(jnp.asarray(x, jnp.float32) for x in args))


def fma(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> jax.Array:
    """Returns a b + c in float32, rounded once on a GPU; the arguments are broadcast."""
    return _fma(*_in_float32(a, b, c))


def exp2(x: ArrayLike) -> jax.Array:
    """Returns 2^x in float32, with a relative error of 2^-22; 0 below 2^-126."""
    return _exp2(*_in_float32(x))


def maximum(a: ArrayLike, b: ArrayLike) -> jax.Array:
    """Returns the larger of a and b in float32, and NaN if one of them is NaN."""
    return _maximum(*_in_float32(a, b))


def minimum(a: ArrayLike, b: ArrayLike) -> jax.Array:
    """Returns the smaller of a and b in float32, and NaN if one of them is NaN."""
    return _minimum(*_in_float32(a, b))


def reciprocal(x: ArrayLike) -> jax.Array:
    """Returns 1 / x in float32, with an error of one unit in the last place."""
    return _reciprocal(*_in_float32(x))


def negative(x: jax.Array) -> jax.Array:
    """Returns -x, at no cost on a GPU: Pallas writes 0 - x for it, which is a subtraction."""
    return -0.0 - x


def widen(x: jax.Array) -> jax.Array:
    """Returns an array of any type in float32."""
    return _widen(x) if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)


def narrow(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns an array of float32 in another type."""
    return _narrow(x) if dtype == jnp.bfloat16 else x.astype(dtype)
