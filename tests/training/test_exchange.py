"""Exchanges between devices against NumPy, on a mesh of 4 x 2 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tokenvit_jax.training import buckets, exchange
from tokenvit_jax.training.exchange import WHOLE

AXES = ("data", "fsdp")
DIMENSIONS = {"kernel": 1, "bias": WHOLE}
SPECS = {"kernel": P(None, "fsdp"), "bias": P()}


def on_mesh(function, in_specs, out_specs):
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(AxisType.Auto,) * 2)
    specs = {"in_specs": in_specs, "out_specs": out_specs}
    return jax.jit(jax.shard_map(function, mesh=mesh, check_vma=False, **specs))


@pytest.fixture
def gpus(monkeypatch):
    """Takes the form for GPUs, with buckets of a few values."""
    monkeypatch.setattr(exchange, "by_platform", lambda _, *args, default, **__: default(*args))
    for name, value in (("_SMALL", 5), ("_BYTES", 60), ("_OPERANDS", 4)):
        monkeypatch.setattr(buckets, name, value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["one by one", "buckets", "sharded"])
def test_reduce(form, dtype, request):
    if form == "buckets":
        request.getfixturevalue("gpus")
    rng = np.random.default_rng(0)
    # One gradient for each device; the second dimension is the first of the array.
    shapes = {"kernel": (8, 3, 4), "bias": (8, 5)}
    specs = dict(SPECS) if form == "sharded" else dict.fromkeys(SPECS, P())
    dimensions = dict(DIMENSIONS)
    for i in range(7):
        shapes |= {f"kernel{i}": (8, 3, 2 + i), f"scale{i}": (8,)}
        specs |= {f"kernel{i}": P(), f"scale{i}": P()}
        dimensions |= {f"kernel{i}": WHOLE, f"scale{i}": WHOLE}
    grads = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    layers = {name: len(shape) for name, shape in shapes.items()}

    def reduce(grads, loss):
        reduced = exchange.Exchange(AXES, dimensions if form == "sharded" else None, layers)
        grads = jax.tree.map(lambda x: x[0], grads)
        means = {"loss": loss.sum(), "var": jnp.stack([loss.sum(), 2 * loss.sum()])}
        return reduced.reduce(grads, means, jnp.ones(()), dtype)

    run = on_mesh(reduce, (P(AXES), P(AXES)), (specs, P(), P(), P()))
    found, norm, means, count = run(grads, np.arange(8.0, dtype=np.float32))
    tolerance = 1e-6 if dtype == "float32" else 3e-2
    for name, values in grads.items():
        assert found[name].dtype == jnp.float32
        mean = values.mean(0)
        np.testing.assert_allclose(found[name], mean, rtol=tolerance, atol=tolerance)
        if mean.size > 4:
            assert (np.abs(found[name] - mean).max() > 1e-4) == (dtype == "bfloat16")
    assert (float(means["loss"]), float(count)) == (3.5, 8)
    np.testing.assert_array_equal(means["var"], [3.5, 7])
    joined = np.concatenate([np.ravel(found[name]) for name in grads])
    np.testing.assert_allclose(norm, np.linalg.norm(joined), rtol=1e-5)


def test_buckets(gpus):
    """Large arrays from the last layer to the first, then small ones, vectors before matrices."""
    shapes = [(7, 2), (), (2, 2), (6,), (3, 4), (3,), (50,)]
    grads = [jnp.full(shape, i, jnp.float32) for i, shape in enumerate(shapes)]
    plan = buckets.plan(grads, [0, 9, 9, 1, 2, 0, 3], itemsize=4)
    assert plan == [[6], [4, 3], [0, 1, 5, 2]]
    assert buckets.plan(grads, [0, 9, 9, 1, 2, 0, 3], itemsize=1) == [[6, 4], [3, 0, 1, 5, 2]]
    bucket = [grads[i] for i in [6, 0, 1, 5, 2]]  # more than one kernel joins
    back = buckets.split(buckets.join(bucket), bucket)
    jax.tree.map(np.testing.assert_array_equal, back, bucket)


def test_gather():
    params = {"kernel": np.arange(12.0).reshape(3, 4), "bias": np.arange(5.0)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    gather = on_mesh(exchange.Exchange(AXES, DIMENSIONS).gather, (SPECS,), P())
    jax.tree.map(np.testing.assert_array_equal, gather(params), params)
    assert gather(params)["kernel"].dtype == jnp.bfloat16


def test_one_device_exchanges_nothing():
    alone, tree = exchange.Exchange(None), {"a": jnp.ones(3)}
    assert alone.gather(tree) is tree
    grads, norm, mean, total = alone.reduce(tree, 1.0, 2.0, "bfloat16")
    assert (grads, mean, total) == (tree, 1.0, 2.0)
    assert float(norm) == pytest.approx(3**0.5)
