"""Programs that take turns."""

import time

import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.measure import timing


def test_contenders_take_turns():
    order = []

    def call(name, seconds):
        time.sleep(seconds)
        order.append(name)
        return jnp.zeros(())

    calls = {"slow": lambda: call("slow", 0.05), "fast": lambda: call("fast", 0.0)}
    times = timing.time_in_turns(calls, seconds=0.2)
    assert len(times["fast"]) == timing.MAX_CALLS
    assert timing.MIN_CALLS <= len(times["slow"]) <= 4
    assert min(times["slow"]) >= 0.05
    del order[:4]  # two calls each to warm up
    assert len(order) == len(times["slow"]) + len(times["fast"])
    turns = np.flatnonzero(np.array(order) == "slow")
    assert np.diff(turns).min() > 8


def test_what_exceeds_all_memory_is_refused():
    with pytest.raises(
        MemoryError, match=r"1048576 x 1048576 numbers, with its copy, needs 8192 of"
    ):
        timing.normal(0, (2**20, 2**20))
