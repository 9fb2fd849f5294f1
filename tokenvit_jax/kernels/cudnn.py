"""Softmax attention by cuDNN, on NVIDIA GPUs.

jax reaches cuDNN through ``jax.nn.dot_product_attention(implementation="cudnn")``, which asks for
the GPU and its cuDNN while a function is traced, and raises without them even where the program is
then compiled for another platform. So :func:`misfit` says first whether it can be traced, and
:func:`assumed` lets programs be compiled for a GPU that is not there.
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tokenvit_jax.kernels.gpus import (
    HOPPER,
    LIBRARY,
    MIN_CAPABILITY,
    Gpu,
    assumed_gpu,
    capability_of,
    traced_gpu,
)

MIN_VERSION = 90000
IMPLEMENTATION = "cudnn"  # tests on a CPU take "xla"

# With fewer queries, XLA's form was measured as fast (docs/benchmarks/gpu_forms.md, 49 tokens).
MIN_QUERIES, MIN_KEYS = 64, 16

# A bias of keys rides on the product: BIAS_UNIT is appended to every query, and the bias divided by
# BIAS_UNIT to its key. NEVER excludes a key: float16 can state it in this way, and it lies far
# below all logits. It is also small enough for exp(logit - largest) to stay finite, although the
# kernel scales and rounds both logits first: a tile of excluded keys gives no NaN.
BIAS_UNIT = 64.0
BIAS_COLUMNS = 3
NEVER = -(2.0**20)


@contextlib.contextmanager
def assumed(gpu: Gpu = HOPPER) -> Iterator[None]:
    """Makes tracing and lowering behave as on a GPU.

    Args:
      gpu: the GPU; it need not exist.

    Raises:
      RuntimeError: the jax that is installed asks for its GPU in another way than the known ones.
    """
    answers = {
        "check_cudnn_version": lambda: gpu.cudnn,
        "check_compute_capability": lambda text: gpu.capability >= capability_of(text),
        "is_cuda_compute_capability_equal": lambda text: gpu.capability == capability_of(text),
    }
    try:
        library = importlib.import_module(LIBRARY)
        saved = {name: getattr(library, name) for name in answers}
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"jax {jax.__version__} asks for cuDNN in an unknown way ({error}); compile on a "
            "machine with an NVIDIA GPU, or with TOKENVIT_JAX_KERNELS=off"
        ) from error
    try:
        for name, answer in answers.items():
            setattr(library, name, answer)
        with assumed_gpu(gpu), jax.sharding.use_abstract_mesh(_mesh_on(gpu)):
            yield
    finally:
        for name, function in saved.items():
            setattr(library, name, function)


def _mesh_on(gpu):
    """Returns the context's mesh on a GPU: Pallas lowers for it, from jax 0.12 on."""
    mesh = jax.sharding.get_abstract_mesh()
    device = jax.sharding.AbstractDevice(gpu.kind, num_cores=None, platform="gpu")
    return jax.sharding.AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, mesh.axis_types, abstract_device=device
    )


def available() -> bool:
    """Returns whether attention by cuDNN can be traced.

    The default backend must be an NVIDIA GPU of compute capability 8.0 or more with cuDNN 9, or
    :func:`assumed` be active with one.
    """
    return _gpu() is not None


def _gpu():
    """Returns the GPU that a program is traced for, or None if cuDNN cannot attend on it."""
    gpu = traced_gpu()
    known = gpu is not None and gpu.cudnn is not None
    if known and gpu.capability >= MIN_CAPABILITY and gpu.cudnn >= MIN_VERSION:
        return gpu
    return None


def misfit(
    q: Array, k: Array, v: Array, *, extra: int = 0, min_queries: int = MIN_QUERIES
) -> str | None:
    """Returns why :func:`attend` cannot take the arguments, or None.

    Args:
      q: queries (B, T, N, D).
      k: keys (B, S, N, D).
      v: values (B, S, N, D).
      extra: number of columns that are appended to queries and keys.
      min_queries: smallest number of queries for which cuDNN is the faster form.
    """
    gpu = _gpu()
    if gpu is None:
        return "no NVIDIA GPU of compute capability 8.0 with cuDNN 9"
    dtypes = {x.dtype for x in (q, k, v)}
    if dtypes != {q.dtype} or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attends in bfloat16 and float16, not in {', '.join(map(str, dtypes))}"
    dim, largest = q.shape[-1], 256 if gpu.capability >= HOPPER.capability else 128
    if dim + extra > largest:
        return f"head dim {dim + extra} is above {largest}"
    if q.shape[1] < min_queries or k.shape[1] < MIN_KEYS:
        return f"fewer than {min_queries} queries or {MIN_KEYS} keys: XLA's form is as fast"
    return None


def attend(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    *,
    scale: float,
    key_bias: Float[Array, "B S"] | None = None,
) -> Float[Array, "B T N D"]:
    """Computes softmax(scale q k^T + key_bias) v, for arguments without :func:`misfit`.

    Args:
      q: queries (B, T, N, D) in bfloat16 or float16.
      k: keys (B, S, N, D).
      v: values (B, S, N, D).
      scale: factor of the products.
      key_bias: added to the logits of each key (B, S), float32, at least :data:`NEVER`, which
        excludes a key; it takes :data:`BIAS_COLUMNS` of the head dim. None: 0.

    Returns:
      (B, T, N, D) in the type of ``v``; it can be differentiated.
    """
    if key_bias is None:
        return attend_augmented(q, k, v, scale=scale)
    columns = split_in_three(key_bias / BIAS_UNIT, k.dtype)[:, :, None]  # (B, S, 1, 3)
    columns = jnp.broadcast_to(columns, (*k.shape[:3], BIAS_COLUMNS))
    units = jnp.full((*q.shape[:3], BIAS_COLUMNS), BIAS_UNIT, q.dtype)
    q = jnp.concatenate([(q * scale).astype(q.dtype), units], -1)
    return attend_augmented(q, jnp.concatenate([k, columns], -1), v, scale=1.0)


def attend_augmented(
    q: Float[Array, "B T N E"],
    k: Float[Array, "B S N E"],
    v: Float[Array, "B S N D"],
    *,
    scale: float = 1.0,
) -> Float[Array, "B T N D"]:
    """Computes softmax(scale q k^T) v for queries and keys with more columns than the values.

    Masks and biases ride on the product in the columns that queries and keys have more. cuDNN wants
    equal head dims, multiples of 8: zeros are appended, to the values too, and cut off.

    Args:
      q: queries (B, T, N, E) with E >= D, in bfloat16 or float16.
      k: keys (B, S, N, E).
      v: values (B, S, N, D).
      scale: factor of the products.

    Returns:
      (B, T, N, D) in the type of ``v``; it can be differentiated.
    """
    dim = v.shape[-1]
    width = -(-q.shape[-1] // 8) * 8
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1]))) for x in (q, k, v))
    return _attend(q, k, v, scale)[..., :dim]


def split_in_three(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "... 3"]:
    """Returns three numbers of a short type (..., 3) that sum up to a float32 number (...).

    Args:
      x: float32 (...).
      dtype: bfloat16 or float16.
    """
    info = jnp.finfo(dtype)
    parts = []
    for _ in range(BIAS_COLUMNS):
        # Unlike a pair of conversions, the compiler may not leave this rounding out.
        parts.append(lax.reduce_precision(x, info.nexp, info.nmant))
        x = x - parts[-1]
    return jnp.stack(parts, -1).astype(dtype)


def _attend(q, k, v, scale):
    if q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0:
        return _library(q, k, v, scale)
    return _attend_odd(q, k, v, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend_odd(q, k, v, scale):
    """Attends with odd lengths, which cuDNN does not take where it keeps statistics."""
    return _library(q, k, v, scale)


def _forward_odd(q, k, v, scale):
    return jax.vjp(functools.partial(_attend_even, scale=scale), q, k, v)


def _backward_odd(scale, vjp, d_output):
    return vjp(d_output)


_attend_odd.defvjp(_forward_odd, _backward_odd)


def _attend_even(q, k, v, scale):
    """Pads odd lengths by one token, which no query attends to."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    # The added query attends like the others, and its gradient is zero: nothing is undefined.
    lengths = (q.shape[1], num_keys) if num_keys % 2 else (None, None)
    return _library(q, k, v, scale, *lengths)[:, :num_queries]


def _library(q, k, v, scale, num_queries=None, num_keys=None):
    # Under vmap, jax wants all arguments to be mapped, and the gradient of the output. What is
    # chosen by a number of each argument is; the compiler finds that no unsigned number is
    # negative, and leaves the choice out.
    bits = jnp.dtype(f"uint{8 * q.dtype.itemsize}")
    first = [lax.bitcast_convert_type(x[:, :1, :1, :1], bits) for x in (q, k, v)]
    always = functools.reduce(jnp.logical_and, [x >= 0 for x in first])  # (B, 1, 1, 1)

    def mapped(x):
        return jnp.where(always, x, lax.stop_gradient(x))

    def lengths(n):
        return None if n is None else jnp.where(always, n, n)[:, 0, 0, 0].astype(jnp.int32)

    output = jax.nn.dot_product_attention(
        mapped(q), mapped(k), mapped(v), scale=scale, query_seq_lengths=lengths(num_queries),
        key_value_seq_lengths=lengths(num_keys), implementation=IMPLEMENTATION,
    )  # fmt: skip
    return mapped(output)
