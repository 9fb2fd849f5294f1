"""Assignment of targets to queries at the least total cost."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from tokenvit_jax import ops
from tokenvit_jax.kernels import cudnn
from tokenvit_jax.kernels.assignment import assign_of_images
from tokenvit_jax.kernels.platforms import default_forms, noted_misfits
from tokenvit_jax.ops import assignment

assign = jax.jit(ops.assign_targets)


def draw_costs(kind, *shape, seed=0):
    """Returns costs (B, Q, M) float32."""
    draw = np.random.default_rng(seed)
    costs = draw.uniform(-3, 5, shape)
    if kind == "alike":  # every target likes the same queries
        costs = 0.05 * costs + draw.uniform(size=(shape[0], shape[1], 1)) * 4
    elif kind == "ties":
        costs = draw.integers(0, 3, shape)
    return costs.astype(np.float32)


def total(costs, queries):
    """Returns the sum (float64) of the costs (Q, M) of pairs; -1: no query."""
    targets = np.flatnonzero(queries >= 0)
    return np.float64(costs)[queries[targets], targets].sum()


def least_total(costs):
    """Tries all assignments of targets to queries, for costs (Q, M)."""
    queries, targets = costs.shape
    choices = itertools.permutations(range(queries), targets)
    return min(total(costs, np.array(choice, int)) for choice in choices)


def check_pairs(queries, valid):
    """Checks that exactly the valid targets have queries, all different."""
    np.testing.assert_array_equal(queries >= 0, valid)
    found = queries[valid]
    assert len(set(found.tolist())) == len(found)


@pytest.mark.parametrize("kind", ["uniform", "alike", "ties"])
def test_is_the_least_of_all(kind):
    costs = draw_costs(kind, 6, 6, 4)
    valid = np.random.default_rng(1).random((6, 4)) < 0.7
    valid[0], valid[1] = True, False
    for cost, used, queries in zip(costs, valid, np.asarray(assign(costs, valid)), strict=True):
        check_pairs(queries, used)
        assert total(cost, queries) == pytest.approx(least_total(cost[:, used]), abs=1e-5)


@pytest.mark.parametrize("shape", [(200, 100), (100, 100), (7, 1)])
@pytest.mark.parametrize("kind", ["uniform", "alike"])
def test_equals_scipy(shape, kind):
    costs = draw_costs(kind, 3, *shape)
    valid = np.ones((3, shape[1]), bool)
    for cost, queries in zip(costs, np.asarray(assign(costs, valid)), strict=True):
        rows, columns = linear_sum_assignment(cost)
        expected = np.empty(shape[1], int)
        expected[columns] = rows
        np.testing.assert_array_equal(queries, expected)


def test_ties_cost_the_least():
    costs = draw_costs("ties", 2, 60, 40)
    for cost, queries in zip(costs, np.asarray(assign(costs, np.ones((2, 40), bool))), strict=True):
        check_pairs(queries, np.ones(40, bool))
        assert total(cost, queries) == cost[linear_sum_assignment(cost)].sum()
    equal = np.asarray(assign(np.zeros((1, 9, 9), np.float32), np.ones((1, 9), bool)))
    assert sorted(equal[0]) == list(range(9))


def test_padding_changes_nothing():
    """Neither the places of padding nor what it costs matter."""
    costs, valid = draw_costs("alike", 1, 30, 20), np.arange(20)[None] % 3 == 1
    expected = np.asarray(assign(costs[..., valid[0]], np.ones((1, valid.sum()), bool)))
    for padding in (0.0, -1e5, np.nan, np.inf):
        found = np.asarray(assign(np.where(valid[:, None], costs, padding), valid))
        check_pairs(found[0], valid[0])
        np.testing.assert_array_equal(found[0, valid[0]], expected[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -3e38])
def test_unknown_costs(value):
    """Ends, and avoids pairs whose costs are unknown or too large."""
    costs, valid = draw_costs("uniform", 4, 20, 12), np.ones((4, 12), bool)
    costs[0] = value
    costs[1, 3:5] = value  # queries
    costs[2, :, 7] = value  # a target
    costs[3, :, ::2] = np.where(np.arange(20)[:, None] == 4, 0.0, value)  # 4 fits six of them
    found = np.asarray(assign(costs, valid))
    for queries, used in zip(found, valid, strict=True):
        check_pairs(queries, used)
    assert not set(found[1].tolist()) & {3, 4}
    known = np.delete(costs[2], 7, 1)
    least = known[linear_sum_assignment(known)].sum()
    assert total(known, np.delete(found[2], 7)) == pytest.approx(least, abs=1e-5)
    assert (found[3, ::2] == 4).sum() == 1


def test_no_target():
    found = assign(draw_costs("uniform", 2, 5, 3), np.zeros((2, 3), bool))
    np.testing.assert_array_equal(found, np.full((2, 3), -1))


def test_turns_are_those_of_valid_targets(monkeypatch):
    """The loop over targets ends at their number, whatever the padding costs."""
    turns = []
    whole = assignment._shortest_paths

    def counting(costs, state, target):
        jax.debug.callback(lambda target: turns.append(int(target)), target)
        return whole(costs, state, target)

    monkeypatch.setattr(assignment, "_shortest_paths", counting)
    valid = np.arange(50) % 10 == 3
    costs = np.where(valid, draw_costs("uniform", 1, 60, 50), 0)
    jax.block_until_ready(jax.jit(lambda *args: ops.assign_targets(*args))(costs, valid[None]))
    jax.effects_barrier()
    assert turns == np.flatnonzero(valid).tolist()


def test_forms_and_transformations_agree():
    costs = draw_costs("alike", 8, 24, 15)
    valid = np.arange(15) < np.arange(8)[:, None] * 2
    expected = np.asarray(assign(costs, valid))
    with default_forms():
        np.testing.assert_array_equal(
            jax.jit(lambda *xs: ops.assign_targets(*xs))(costs, valid), expected
        )
    grouped = [x.reshape(2, 4, *x.shape[1:]) for x in (costs, valid)]
    for transform in (jax.vmap, jax.pmap):
        found = transform(ops.assign_targets)(*grouped)
        np.testing.assert_array_equal(np.reshape(found, expected.shape), expected)
    np.testing.assert_array_equal(ops.assign_targets(costs, valid), expected)


@pytest.mark.parametrize("kind", ["uniform", "alike", "ties"])
@pytest.mark.parametrize("shape", [(4, 40, 23), (3, 16, 16), (2, 3, 1)])
def test_the_kernel_equals_the_default(kind, shape):
    costs = draw_costs(kind, *shape).swapaxes(1, 2)
    costs[0, 0] = assignment.UNKNOWN
    valid = np.random.default_rng(1).random((shape[0], shape[2])) < 0.8
    valid[0], valid[-1] = True, False
    found = assign_of_images(costs, valid, interpret=True)
    np.testing.assert_array_equal(found, jax.jit(jax.vmap(assignment._assign))(costs, valid))


def test_the_kernel_ends_with_nan_among_the_costs():
    costs = draw_costs("alike", 1, 6, 4).swapaxes(1, 2)
    costs[0, 1:3] = np.nan
    found = np.asarray(assign_of_images(costs, np.ones((1, 4), bool), interpret=True))
    assert ((found >= -1) & (found < 6)).all()


def test_gpus_have_a_kernel_up_to_512_queries():
    def launches(queries):
        shapes = [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((2, queries, 3), (2, 3))]
        assigned = jax.jit(lambda costs, valid: ops.assign_targets(costs, valid > 0))
        with cudnn.assumed():
            lowered = assigned.trace(*shapes).lower(lowering_platforms=("cuda",))
        return "assign_targets" in lowered.as_text()

    assert launches(512)
    with noted_misfits() as misfits:
        assert not launches(513)
    assert [misfit.reason for misfit in misfits] == ["513 queries; at most 512"]


@pytest.mark.parametrize("batch", [8, 6])
def test_batch_over_devices(batch):
    """Devices share the images of a mesh without messages, where they share them evenly."""
    costs, valid = draw_costs("alike", batch, 9, 5), np.arange(batch)[:, None] % 6 > np.arange(5)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("batch" if batch % 4 == 0 else None)
    shared = jax.device_put((costs, valid), jax.sharding.NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda *args: ops.assign_targets(*args)).lower(*shared).compile()
    np.testing.assert_array_equal(compiled(*shared), assign(costs, valid))
    text = compiled.as_text()
    assert not any(name in text for name in ("all-reduce", "all-gather", "collective-permute"))


def test_has_no_gradient():
    def loss(costs):
        queries = ops.assign_targets(costs, jnp.ones((1, 3), bool))
        return jnp.take_along_axis(costs, queries[:, None], 1).sum()

    costs = draw_costs("uniform", 1, 5, 3)
    gradient = jax.jit(jax.grad(loss))(costs)
    rows = np.asarray(ops.assign_targets(costs, np.ones((1, 3), bool)))[0]
    expected = np.zeros((5, 3))
    expected[rows, range(3)] = 1
    np.testing.assert_array_equal(gradient[0], expected)


def test_more_targets_than_queries():
    with pytest.raises(ValueError, match=r"costs has 4 places for targets .* only 3 queries"):
        ops.assign_targets(np.zeros((1, 3, 4), np.float32), np.ones((1, 4), bool))
