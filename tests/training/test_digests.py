import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tokenvit_jax.training import digests
from tokenvit_jax.training.digests import array_digests, describe, sealed, unsealed

TYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool", "int64", "float64"]


def array_of(dtype, shape=(6, 8, 4)):
    values = np.random.default_rng(0).integers(0, 2**8, (*shape, 8), dtype=np.uint8)
    if dtype == "bool":
        return values[..., 0] > 100
    return values.view(np.dtype(getattr(ml_dtypes, dtype, dtype)))[..., 0]


def digest(x):
    return array_digests({"x": x})["x"]


def naive_digest(x):
    """The two sums of the module's docstring, word by word, with Python's integers."""
    size = min(x.dtype.itemsize, 4)
    content = x.tobytes()
    words = [int.from_bytes(content[i : i + size], "little") for i in range(0, len(content), size)]

    def odd(index, salt):
        x = (index + salt) * 0x9E3779B1 % 2**32
        x = (x ^ (x >> 15)) * 0x85EBCA77 % 2**32
        return (x ^ (x >> 13)) | 1

    sums = [
        sum(word * odd(i % 2**16, a) * odd(i // 2**16, b) for i, word in enumerate(words))
        for a, b in digests._SALTS
    ]
    return "".join(f"{number % 2**32:08x}" for number in sums)


@pytest.mark.parametrize("dtype", TYPES)
def test_digest_equals_the_sums_of_the_docstring(dtype):
    x = array_of(dtype)
    assert digest(x) == naive_digest(x)


def test_digest_goes_on_after_a_block():
    x = np.arange(2**16 + 5, dtype=np.uint32)
    assert digest(x) == naive_digest(x)
    assert digest(x[:0]) == digest(np.float32([])) == "0" * 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
@pytest.mark.parametrize("spec", [P(), P("x"), P(None, "y"), P("x", "y"), P(("x", "y"))])
def test_digest_does_not_depend_on_the_sharding(dtype, spec):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    x = array_of(dtype, (8, 4))
    on_devices = jax.device_put(x, NamedSharding(mesh, spec))
    assert digest(on_devices) == digest(x)


@pytest.mark.parametrize("shape", [(), (5,), (2**16 + 3,)])
def test_sums_on_devices_equal_those_of_numpy(shape):
    x = jnp.full(shape, -1.5)
    np.testing.assert_array_equal(jax.jit(digests._sums)(x), digests._sums_of_numpy(x))


def test_every_flipped_bit_changes_both_sums():
    x = array_of("float32", (6,)).copy()
    before = digest(x)
    for byte in range(x.nbytes):
        for bit in range(8):
            x.view(np.uint8)[byte] ^= 1 << bit
            now = digest(x)
            assert now[:8] != before[:8]
            assert now[8:] != before[8:]
            x.view(np.uint8)[byte] ^= 1 << bit


def test_order_counts():
    x = np.arange(1, 25, dtype=np.float32)
    found = {digest(np.roll(x, shift)) for shift in range(24)}
    assert len(found) == 24
    assert digest(x[::-1]) == digest(x[::-1].copy())  # values, not memory


def test_names_types_and_shapes():
    tree = {"a": (np.zeros((2, 3), ml_dtypes.bfloat16), jnp.int32(1)), "b": {}}
    assert describe(tree) == {"a/0": "bfloat16(2, 3)", "a/1": "int32()"}


def test_sealed_objects_are_opened_and_damaged_ones_refused():
    value = {"step": 3, "loss": 0.1, "names": ["a"]}
    assert unsealed(sealed(value)) == value
    for damaged in ({**sealed(value), "step": 2}, value, {**sealed(value), "more": 1}, [], None):
        with pytest.raises(ValueError, match=r"digest|no JSON object"):
            unsealed(damaged)
