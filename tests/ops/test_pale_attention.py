"""Pale attention against float64 loops over the tokens that the paper's figure marks."""

import functools
import importlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import sampled

from tokenvit_jax import ops
from tokenvit_jax.measure.macs import count_macs

# The package exports a function with the same name.
module = importlib.import_module("tokenvit_jax.ops.pale_attention")


def inputs(height=6, width=4, batch=2, heads=2, dim=4, dtype=np.float32):
    rng = np.random.default_rng(0)
    shape = (batch, height, width, heads, dim)
    return tuple(rng.normal(size=shape).astype(dtype) for _ in range(3))


def regions(mode, r, c, height, width, pale, second_half):
    """Returns a bool map (H, W) of the tokens that (r, c) attends to, for each of its pales."""
    rows, columns = np.mgrid[:height, :width]
    num_rows, num_columns = height // pale[0], width // pale[1]
    if mode == "vanilla":
        pales = {r % num_rows, c % num_columns}
        return [(rows % num_rows == i) | (columns % num_columns == i) for i in pales]
    if mode == "columns" or (mode == "parallel" and second_half):
        return [columns % num_columns == c % num_columns]
    if mode in ("rows", "parallel"):
        return [rows % num_rows == r % num_rows]
    return [columns // pale[1] == c // pale[1] if second_half else rows // pale[0] == r // pale[0]]


def naive(q, k, v, pale, mode, scale=None, mask=None):
    """Computes Eqs. 1 to 3, one token and head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    height, width, heads, dim = q.shape[1:]
    mask = np.ones((height, width), bool) if mask is None else mask
    scale = dim**-0.5 if scale is None else scale
    output = np.zeros_like(q)
    for b, r, c, n in np.ndindex(q.shape[:4]):
        if not mask[r, c]:
            continue
        means = []
        for region in regions(mode, r, c, height, width, pale, n >= heads // 2):
            logits = scale * k[b, region & mask, n] @ q[b, r, c, n]
            weights = np.exp(logits - logits.max())
            means.append(weights @ v[b, region & mask, n] / weights.sum())
        output[b, r, c, n] = np.mean(means, 0)
    return output


def padding(height, width, real_height, real_width):
    return (np.arange(height)[:, None] < real_height) & (np.arange(width) < real_width)


CASES = [
    ("parallel", (3, 2), None),
    ("parallel", (2, 4), 1.5),  # unequal numbers of row and column groups
    ("cross", (2, 2), None),
    ("rows", (1, 1), None),  # axial
    ("columns", (3, 2), None),
    ("vanilla", (3, 2), None),
    ("vanilla", (2, 1), 0.7),
]


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(("mode", "pale", "scale"), sampled(CASES, keep=(0, 1, 2, 5)))
def test_equals_the_loops(mode, pale, scale, one_by_one, monkeypatch):
    height, width = (6, 3) if pale == (2, 1) else (6, 4)
    arrays = inputs(height, width)
    # Some rows and stripes are only padding.
    mask = padding(height, width, 4, 3)
    monkeypatch.setattr(module, "MAX_LOGITS", 0 if one_by_one else np.inf)
    attend = functools.partial(ops.pale_attention.__wrapped__, pale=pale, mode=mode, scale=scale)
    plain, masked = jax.jit(lambda *x: (attend(*x), attend(*x, mask=mask)))(*arrays)
    np.testing.assert_allclose(plain, naive(*arrays, pale, mode, scale), atol=2e-6)
    np.testing.assert_allclose(masked, naive(*arrays, pale, mode, scale, mask), atol=2e-6)


@pytest.mark.parametrize("mode", ["parallel", "cross"])
def test_halves_together_as_on_accelerators(mode, monkeypatch):
    monkeypatch.setattr(module, "by_platform", lambda _, *args, default, **rest: default(*args))
    arrays, mask = inputs(6, 6, heads=4), padding(6, 6, 5, 4)
    attend = module.pale_attention.__wrapped__  # not compiled yet
    y = jax.jit(functools.partial(attend, pale=(2, 2), mode=mode, mask=mask))(*arrays)
    expected = naive(*arrays, (2, 2), mode, mask=mask)
    np.testing.assert_allclose(y, expected, atol=1e-6)


@pytest.mark.parametrize("mode", sampled(module.MODES, keep=(0, 4)))
def test_float64_gradient_by_finite_differences(mode, monkeypatch):
    monkeypatch.setattr(module, "MAX_LOGITS", 0)
    with jax.enable_x64(True):
        arrays = inputs(4, 2, batch=1, dim=3, dtype=np.float64)
        attend = jax.jit(
            functools.partial(
                ops.pale_attention.__wrapped__, pale=(2, 1), mode=mode, mask=padding(4, 2, 3, 2)
            )
        )
        assert attend(*arrays).dtype == jnp.float64
        jax.test_util.check_grads(attend, arrays, order=1, modes=["rev"], atol=1e-7, rtol=1e-7)
        for grad in jax.grad(lambda *x: jnp.sum(attend(*x) ** 2), argnums=(0, 1, 2))(*arrays):
            assert np.abs(grad).max() > 1e-3


@pytest.mark.parametrize("mode", ["parallel", "vanilla"])
def test_padding_does_not_matter_when_masked(mode):
    mask = padding(6, 4, 5, 3)
    arrays = inputs()
    other = [np.where(mask[:, :, None, None], x, 100 * x + 7) for x in arrays]
    attend = functools.partial(ops.pale_attention, pale=(3, 2), mode=mode)
    output = attend(*arrays, mask=mask)
    np.testing.assert_array_equal(output, attend(*other, mask=mask))
    np.testing.assert_array_equal(output[:, ~mask], 0)
    assert np.abs(attend(*arrays) - attend(*other))[:, mask].max() > 0.1


@pytest.mark.parametrize("mode", ["parallel", "vanilla"])
def test_follows_cyclic_shifts(mode):
    """Interlaced groups stay groups when the map is shifted; stripes do not."""
    arrays = inputs()
    shift = lambda x: jnp.roll(x, (1, 1), (1, 2))  # noqa: E731
    attend = functools.partial(ops.pale_attention, pale=(3, 2))
    shifted = attend(*map(shift, arrays), mode=mode)
    np.testing.assert_allclose(shifted, shift(attend(*arrays, mode=mode)), atol=1e-6)
    stripes = attend(*map(shift, arrays), mode="cross")
    assert np.abs(stripes - shift(attend(*arrays, mode="cross"))).max() > 0.1


@pytest.mark.parametrize("mode", module.MODES)
def test_one_group_is_dense_attention(mode):
    q, k, v = inputs()
    dense = ops.dot_product_attention(*(x.reshape(2, 24, 2, 4) for x in (q, k, v)))
    output = ops.pale_attention(q, k, v, pale=(6, 4), mode=mode)
    np.testing.assert_allclose(output, dense.reshape(q.shape), atol=1e-6)


@pytest.mark.parametrize("mode", ["parallel", "vanilla"])
def test_transforms(mode):
    arrays = inputs(batch=4)
    attend = functools.partial(ops.pale_attention, pale=(3, 2), mode=mode)
    expected = attend(*arrays)
    with jax.disable_jit():
        chex.assert_trees_all_close(attend(*arrays), expected, atol=1e-6)
    mapped = jax.vmap(attend)(*(x[:, None] for x in arrays))
    chex.assert_trees_all_close(mapped[:, 0], expected, atol=1e-6)
    devices = min(4, jax.device_count())
    sharded = [x.reshape(devices, -1, *x.shape[1:]) for x in arrays]
    parallel = jax.pmap(attend)(*sharded)
    chex.assert_trees_all_close(parallel.reshape(expected.shape), expected, atol=1e-6)


def test_bfloat16_normalises_in_float32():
    low = [jnp.asarray(x, jnp.bfloat16) for x in inputs()]
    output = ops.pale_attention(*low, pale=(3, 2))
    assert output.dtype == jnp.bfloat16
    expected = naive(*low, (3, 2), "parallel")
    np.testing.assert_allclose(output.astype(jnp.float32), expected, atol=0.03)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_batch_that_is_split_over_a_mesh_stays_split(one_by_one, monkeypatch):
    monkeypatch.setattr(module, "MAX_LOGITS", 0 if one_by_one else np.inf)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))
    arrays = [jax.device_put(x, split) for x in inputs(batch=4)]

    def loss(q, k, v):
        return sum(
            jnp.sum(ops.pale_attention.__wrapped__(q, k, v, pale=(3, 2), mode=mode) ** 2)
            for mode in ("parallel", "vanilla")
        )

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile().as_text()
    assert re.findall(r"(?:all-gather|all-to-all|collective-permute)\(.*", text) == []


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(
    ("mode", "per_channel"),  # sum over the groups of (number of tokens)^2
    [
        ("parallel", (2 * 12**2 + 2 * 12**2) / 2),
        ("cross", (2 * 12**2 + 2 * 12**2) / 2),
        ("rows", 2 * 12**2),
        ("columns", 2 * 12**2),
        ("vanilla", 2 * (3 * 4 + 2 * 6 - 3 * 2) ** 2),
    ],
)
def test_multiply_adds(mode, per_channel, one_by_one, monkeypatch):
    monkeypatch.setattr(module, "MAX_LOGITS", 0 if one_by_one else np.inf)
    attend = functools.partial(ops.pale_attention.__wrapped__, pale=(3, 2), mode=mode)
    assert count_macs(attend, *inputs()) == 2 * 2 * 8 * per_channel


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "star"}, "mode is 'star'; it must be one of parallel, rows, columns, cross"),
        ({"pale": (4, 2)}, r"pale is \(4, 2\); it must divide the height and width of q, 6 x 4"),
        ({"pale": (3, 0)}, r"pale is \(3, 0\); it must be two numbers of at least 1"),
        ({"pale": (2, 2), "mode": "vanilla"}, "into 3 row groups and 2 column groups; mode 'van"),
        ({"k": np.zeros((2, 6, 4, 2, 5))}, r"k has .*; expected the shape of q, \(2, 6, 4, 2"),
        ({"v": np.zeros((2, 6, 5, 2, 4))}, r"v has .*; expected the shape of q, \(2, 6, 4, 2"),
        ({"q": np.zeros((2, 6, 4, 8))}, r"q has shape \(2, 6, 4, 8\); expected \(batch, height"),
        (dict.fromkeys("qkv", np.zeros((2, 6, 4, 3, 4))), "q has 3 heads; mode 'parallel' needs"),
        ({"mask": np.ones((4, 6), bool)}, r"mask has shape \(4, 6\); expected \(6, 4\)"),
    ],
)
def test_bad_input_is_named(change, message):
    q, k, v = inputs()
    arguments = {"q": q, "k": k, "v": v, "pale": (3, 2)} | change
    with pytest.raises(ValueError, match=message):
        ops.pale_attention(**arguments)
