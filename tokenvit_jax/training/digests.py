"""Digests of arrays and JSON objects: they tell whether what is read back is what was written.

Orbax 0.12 has no such check. Its storage, tensorstore's OCDBT, has CRC-32C sums of its index, not
of the data of the arrays. The format zarr 2 that orbax writes has no checksums and reads a missing
chunk as zeros; in zarr 3, orbax fixes the codecs, with a CRC-32C sum of the index of a chunk only.
A digest of the values, in contrast, covers the whole way: devices, memory, compression and files.

The digest of an array is made of integers alone, so that it is the same for every sharding, number
of devices and order of summation. The bits of the array are read as 32-bit words w_i (elements of
one or two bytes are a word each), and there are two sums modulo 2^32 of w_i m_i, where i is the
position in row-major order and m_i an odd pseudo-random number. A change of one word always
changes both sums, since an odd factor has an inverse; any other damage passes with a probability of
about 2^-64. It does not protect from intent: a checkpoint from a stranger needs a signature.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

DIGEST = "digest"  # entry of a JSON object that holds the digest of the others

# m_i = a(i mod _BLOCK) b(i div _BLOCK): numpy then needs only one table of multipliers.
_BLOCK = 1 << 16
_SALTS = ((0x3C6EF372, 0xDAA66D2B), (0x78DDE6E4, 0x1715609D))  # (a, b) for either sum


def describe(tree: Any) -> dict[str, str]:
    """Returns the names of the arrays of a tree with their types and shapes.

    Args:
      tree: tree of arrays, or of anything else with a type and a shape.

    Returns:
      Such as {"params/head/bias": "float32(10,)"}.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(x.dtype)}{x.shape}"
        for path, x in leaves
    }


def array_digests(tree: Any) -> dict[str, str]:
    """Returns a digest of every array of a tree, by name.

    Args:
      tree: tree of numpy arrays, or of jax arrays over the devices of all processes; then every
        process must call this.

    Returns:
      Such as {"params/head/bias": "61c88647b7e15163"}.
    """
    sums = [_start(leaf) for leaf in jax.tree.leaves(tree)]
    found = jax.device_get(sums)  # waits once for all
    return {
        name: "".join(f"{int(number):08x}" for number in pair)
        for name, pair in zip(describe(tree), found, strict=True)
    }


def json_digest(value: Any) -> str:
    """Returns a digest of a JSON object, which does not depend on the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON object with its own digest, for :func:`unsealed`."""
    return {**value, DIGEST: json_digest(value)}


def unsealed(value: Any) -> dict[str, Any]:
    """Returns a JSON object without its digest.

    Raises:
      ValueError: it is no JSON object, or its digest is another one.
    """
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    plain = dict(value)
    if plain.pop(DIGEST, None) != json_digest(plain):
        raise ValueError("its digest is another one than that of its contents")
    return plain


def _start(x: Any) -> Any:
    """Starts to compute the sums (2,) of an array, where the array lies."""
    if not isinstance(x, jax.Array):
        return _sums_of_numpy(x)
    if x.is_fully_replicated:
        copy = x.addressable_data(0)
        if next(iter(copy.devices())).platform == "cpu":  # no copy, and nothing to compile
            return _sums_of_numpy(np.asarray(copy))
        return jax.jit(_sums)(copy)
    return _sums_over(NamedSharding(x.sharding.mesh, P()))(x)


@functools.cache
def _sums_over(replicated: NamedSharding) -> Any:
    return jax.jit(_sums, out_shardings=replicated)


def _sums(x: jax.Array) -> jax.Array:
    """Returns the sums (2,) of an array; the compiler splits this like the array."""
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}")
    words = words.astype(jnp.uint32)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index += place * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    inner, outer = index % np.uint32(_BLOCK), index // np.uint32(_BLOCK)
    multipliers = (_odd(inner, a) * _odd(outer, b) for a, b in _SALTS)
    return jnp.stack([jnp.sum(words * m, dtype=jnp.uint32) for m in multipliers])


def _sums_of_numpy(x: Any) -> np.ndarray:
    """Returns the sums (2,) of an array, a block at a time."""
    x = np.ascontiguousarray(x).reshape(-1)
    words = x.view(f"<u{min(x.dtype.itemsize, 4)}")
    sums = np.zeros(2, np.uint32)
    for block, start in enumerate(range(0, words.size, _BLOCK)):
        part = words[start : start + _BLOCK].astype(np.uint32, copy=False)
        outer = [_odd(np.full(1, block, np.uint32), b)[0] for _, b in _SALTS]
        sums += (_table()[:, : part.size] @ part) * np.array(outer)
    return sums


@functools.cache
def _table() -> np.ndarray:
    inner = np.arange(_BLOCK, dtype=np.uint32)
    return np.stack([_odd(inner, a) for a, _ in _SALTS])


def _odd(index: Any, salt: int) -> Any:
    """Returns an odd pseudo-random number for every index, uint32; modulo 2^32 throughout."""
    x = (index + np.uint32(salt)) * np.uint32(0x9E3779B1)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x85EBCA77)
    return (x ^ (x >> np.uint32(13))) | np.uint32(1)
