"""The least time of a step, and the purposes of collectives."""

import pytest

from tokenvit_jax.ahead import costs
from tokenvit_jax.ahead.compiling import Compiled, Memory
from tokenvit_jax.ahead.hlo import Collective, Kernel, Message, Program
from tokenvit_jax.ahead.instructions import Launch
from tokenvit_jax.ahead.products import Work
from tokenvit_jax.ahead.ptx import Counts
from tokenvit_jax.ahead.targets import parse_target
from tokenvit_jax.measure import parts

BLOCK = "jit(step)/jvp(DGT)/DGT.pooled/DGT.run_blocks/stages_2_11/stages_2_11._residual"
BACK = BLOCK.replace("jvp(DGT)", "transpose(jvp(DGT))")
GROUPS = f"{BLOCK}/attention/attention._attend_in_groups/jit(tokenvit_jax.ops.group_attention)"


@pytest.mark.parametrize(
    ("kind", "origin", "purpose"),
    [
        ("all-reduce", f"{BLOCK}/ffn/norm1/reduce_sum", "BatchNorm, forward"),
        ("all-reduce", f"{BACK}/ffn/norm1/reduce_sum", "BatchNorm, backward"),
        ("all-reduce", f"{BACK}/ffn/norm11/reduce_sum", "gradients"),
        ("all-reduce", f"{BACK}/ffn/expand/dot_general", "gradients"),
        ("all-reduce", f"{GROUPS}/bngl,blnd->ngd/dot_general", "centroids"),
        ("all-reduce", f"{BLOCK}/x/while/cond/reduce_max", "predicates of loops and branches"),
        ("all-reduce", f"{BLOCK}/x/reduce_or", "predicates of loops and branches"),
        ("all-reduce", f"{BLOCK}/mlp/reduce_sum", "forward pass"),
        ("all-reduce", f"{BLOCK}/norm3/cond/branch_0_fun/reduce_sum", "forward pass"),
        ("all-reduce", f"{BLOCK}/x/while/body/reduce_sum", "forward pass"),
        ("all-reduce", "jit(step)/cond/branch_0_fun/reduce_sum", "loss and metrics"),
        ("all-reduce", "jit(step)/jvp()/reduce_sum", "loss and metrics"),
        ("all-gather", "jit(step)/shard_map/all_gather", "parameters (fsdp)"),
        ("reduce-scatter", "jit(step)/shard_map/reduce_scatter", "gradients"),
    ],
)  # fmt: skip
def test_purpose(kind, origin, purpose):
    norms = frozenset({"stages_2_11/ffn/norm1"})
    assert costs.purpose_of(kind, Message(4, origin), norms) == purpose


@pytest.mark.parametrize(
    ("inside", "path"),
    [
        ("attention/qkv/dot_general", "attention/qkv"),
        ("attention/attention._attend_in_groups/top_k", "attention"),
        ("attention/q.affine/norm/slice", "attention/q/norm"),  # a method that another layer calls
        ("attention/...c,cd->...d/dot_general", "attention"),
    ],
)
def test_path_of_the_layer(inside, path):
    assert parts.module_path(f"{BLOCK}/{inside}") == f"stages_2_11/{path}"


def make(target, kernels, collectives=()):
    """Returns a compiled step with a batch of 2 per device."""
    program = Program(kernels, list(collectives), 0)
    return Compiled(
        parse_target(target), "train", 2, Memory(), program, {}, frozenset(), (), 0.0, 0.0, 0.0
    )


def test_a_kernel_takes_the_longest_of_launch_bytes_and_products():
    launch = Kernel(10, "fusion", 8, (), "jit(step)/add", "a")
    moves = Kernel(1, "fusion", 3_000_000_000, (), f"{BLOCK}/ffn/norm1/add", "b")
    works = Kernel(2, "custom-call", 8, (Work(790e9, "bfloat16"),), f"{BLOCK}/ffn/dot_general", "c")
    compiled = make("h100", [launch, moves, works])
    rows = {row.name: row for row in costs.by_part(compiled)}
    assert [row.seconds for row in rows.values()] == pytest.approx([2e-3, 1e-3, 2.5e-5])
    assert list(rows) == ["feed-forward networks", "norms", parts.OTHER]
    assert rows["feed-forward networks"].operations == pytest.approx(2 * 790e9)
    all_rows = costs.total(rows.values())
    assert (all_rows.launches, all_rows.bytes) == (13, 3_000_000_000 + 96)
    found = costs.speed(compiled)
    floor = 3.025e-3
    assert found.bound == pytest.approx(2 / floor)
    assert (found.low, found.high) == pytest.approx((0.58 * 2 / floor, 0.67 * 2 / floor))
    assert costs.speed(make("a100", [moves])).low is None  # nothing was measured on one


def launch(blocks, threads, **pipes):
    return Launch(blocks, threads, Counts(pipes, {}, 0))


def test_instructions_bound_a_kernel():
    """An H100 has 132 multiprocessors; each starts 4 instructions of 32 threads in a cycle."""
    clock = parse_target("h100").device.facts["clock"].value
    kernel = Kernel(1, "custom-call", 8, (), "jit(step)/add", "a")

    def cycles(*launches, target="h100"):
        device = parse_target(target).device
        bounds = costs.bounds(kernel._replace(launches=launches), device)
        return bounds["instructions"] * device.facts["clock"].value

    assert cycles() == 0  # not known
    assert cycles(launch(132, 128, issue=1000)) == pytest.approx(1000)
    assert cycles(launch(1, 128, issue=1000)) == pytest.approx(1000)  # the others wait
    assert cycles(launch(133, 128, issue=1000)) == pytest.approx(2000)
    assert cycles(launch(132, 100, issue=1000)) == pytest.approx(1000)  # whole warps
    assert cycles(launch(132, 128, issue=1000, logic=600)) == pytest.approx(1200)
    assert cycles(launch(132, 128, issue=1000, special=100)) == pytest.approx(1000)
    assert cycles(launch(132, 128, issue=10), launch(132, 128, issue=5)) == pytest.approx(15)
    # Half as many float32 units; 108 multiprocessors.
    assert cycles(launch(108, 128, issue=10, float=10), target="a100") == pytest.approx(20)

    slow = kernel._replace(times=2, launches=(launch(132, 128, issue=1e6),))
    (row,) = costs.by_part(make("h100", [slow]))
    assert row.seconds == pytest.approx(2e6 / clock)
    assert (row.limit, row.limits) == ("instructions", {"instructions": row.seconds})


def test_what_bounds_a_part():
    moves = Kernel(1, "fusion", 3_000_000_000, (), "jit(step)/add", "a")
    starts = Kernel(8, "fusion", 8, (), "jit(step)/add", "b")
    (row,) = costs.by_part(make("h100", [starts, moves]))
    assert row.limits == pytest.approx({"bytes": 1e-3, "launch": 8 * 2.5e-6})
    assert row.limit == "bytes" and costs.total([row, row]).limits["bytes"] == pytest.approx(2e-3)


def test_collectives():
    messages = (Message(900_000_000, f"{BACK}/ffn/x"), Message(4, "jit(step)/jvp()/reduce_sum"))
    reduce, small = Collective(1, "all-reduce", messages), Collective(3, "all-reduce", messages[1:])
    compiled = make("h100x2", [], [reduce, small])
    rows = {row.name: row for row in costs.by_purpose(compiled)}
    assert rows["gradients"] == ("gradients", "all-reduce", 1, 900_000_000)
    assert rows["loss and metrics"] == ("loss and metrics", "all-reduce", 3, 16)
    seconds = costs.floor_seconds(compiled)[1]
    assert seconds == pytest.approx(2 * 900_000_004 / 2 / 450e9 + 3 * 10e-6)
    between_hosts = make("h100x16", [], [reduce])
    assert costs.floor_seconds(between_hosts)[1] > 9 * 2 * 900_000_004 * 15 / 16 / 450e9 * 0.99
