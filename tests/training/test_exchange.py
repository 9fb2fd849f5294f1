"""Exchanges between devices against NumPy, on a mesh of 4 x 2 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tokenvit_jax.training.exchange import WHOLE, Exchange

AXES = ("data", "fsdp")
DIMENSIONS = {"kernel": 1, "bias": WHOLE}
SPECS = {"kernel": P(None, "fsdp"), "bias": P()}


def on_mesh(function, in_specs, out_specs):
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(AxisType.Auto,) * 2)
    specs = {"in_specs": in_specs, "out_specs": out_specs}
    return jax.jit(jax.shard_map(function, mesh=mesh, check_vma=False, **specs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharded", [True, False])
def test_reduce_and_norm(sharded, dtype):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (8, 3, 4), "bias": (8, 5)}  # one gradient for each device
    grads = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}

    def reduce(grads, loss):
        exchange = Exchange(AXES, DIMENSIONS if sharded else None)
        grads = jax.tree.map(lambda x: x[0], grads)
        grads, loss, count = exchange.reduce(grads, loss.sum(), jnp.ones(()), dtype)
        return grads, loss, count, exchange.norm(grads)

    out_specs = SPECS if sharded else {"kernel": P(), "bias": P()}
    run = on_mesh(reduce, (P(AXES), P(AXES)), (out_specs, P(), P(), P()))
    found, loss, count, norm = run(grads, np.arange(8.0, dtype=np.float32))
    tolerance = 1e-6 if dtype == "float32" else 3e-2
    for name, values in grads.items():
        assert found[name].dtype == jnp.float32
        mean = values.mean(0)
        np.testing.assert_allclose(found[name], mean, rtol=tolerance, atol=tolerance)
        assert (np.abs(found[name] - mean).max() > 1e-4) == (dtype == "bfloat16")
    assert (float(loss), float(count)) == (3.5, 8)
    joined = np.concatenate([np.ravel(found[name]) for name in grads])
    np.testing.assert_allclose(norm, np.linalg.norm(joined), rtol=1e-5)


def test_gather():
    params = {"kernel": np.arange(12.0).reshape(3, 4), "bias": np.arange(5.0)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    gather = on_mesh(Exchange(AXES, DIMENSIONS).gather, (SPECS,), P())
    jax.tree.map(np.testing.assert_array_equal, gather(params), params)
    assert gather(params)["kernel"].dtype == jnp.bfloat16


def test_one_device_exchanges_nothing():
    alone, tree = Exchange(None), {"a": jnp.ones(3)}
    assert alone.gather(tree) is tree
    assert alone.reduce(tree, 1.0, 2.0, "bfloat16") == (tree, 1.0, 2.0)
    assert float(alone.norm(tree)) == pytest.approx(3**0.5)
