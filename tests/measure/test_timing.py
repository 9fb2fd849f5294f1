"""Programs that take turns."""

import functools
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.kernels import forms, platforms
from tokenvit_jax.measure import timing, torch_peers


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


def test_calls_of_an_accelerator_follow_one_another(monkeypatch):
    order = []
    monkeypatch.setattr(timing.jax, "default_backend", lambda: "gpu")
    running = torch_peers.Running(lambda: order.append("wait"))
    times = timing.time_in_turns({"a": lambda: order.append("call") or running}, seconds=0)
    assert len(times["a"]) == timing.MIN_CALLS
    in_a_row = ["call"] * timing.CALLS_IN_A_ROW + ["wait"]
    assert order == ["call", "wait"] + in_a_row * timing.MIN_CALLS  # one to warm up


@pytest.mark.parametrize(("duration", "in_a_row", "calls"), [(0.01, 10, 4), (0.2, 1, 3)])
def test_an_accelerator_is_timed_as_long_as_it_should(monkeypatch, duration, in_a_row, calls):
    """Rows of calls divide the time; a slow call has no row."""
    clock = [0.0]

    def call():
        clock[0] += duration
        return ()

    monkeypatch.setattr(timing.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    times = timing.time_in_turns({"a": call}, seconds=0.4)["a"]
    assert times == pytest.approx([duration] * calls)
    assert clock[0] == pytest.approx((2 + in_a_row * calls) * duration)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_what_cannot_be_built_is_named(monkeypatch, backend):
    monkeypatch.setattr(timing.jax, "default_backend", lambda: backend)

    def fail():
        raise ValueError("no such layer")

    builders, beside = {"a": fail, "b": lambda: 2}, {"c": fail, "d": lambda: 4}
    failed = {}
    assert timing.build_all(builders, beside, failed) == {"b": 2, "d": 4}
    assert {name: str(error) for name, error in failed.items()} == {
        "a": "no such layer", "c": "no such layer",
    }  # fmt: skip
    with pytest.raises(ValueError, match="no such layer"):
        timing.build_all(builders, beside)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_programs_are_built_beside_others(monkeypatch, backend):
    monkeypatch.setattr(timing.jax, "default_backend", lambda: backend)
    main, threads = threading.get_ident(), {}

    def build(name):
        threads[name] = threading.get_ident()
        return name.upper()

    names = {name: functools.partial(build, name) for name in "abc"}
    built = timing.build_all({"a": names["a"], "b": names["b"]}, beside={"c": names["c"]})
    assert [*built.items()] == [("a", "A"), ("b", "B"), ("c", "C")]
    assert threads["c"] == main
    assert (threads["a"] == main) == (backend == "cpu")


def test_only_forms_for_the_device_are_traced(monkeypatch):
    monkeypatch.setitem(forms.FORMS, "double", {"default": "adds", "cuda": "a kernel"})

    def kernel(x):
        raise AssertionError("there is no GPU")

    def step(x):
        return platforms.by_platform("double", x, default=lambda x: x + x, cuda=kernel)

    assert timing.compile_program(step, jnp.ones(2)).call(jnp.ones(2)).tolist() == [2, 2]


def test_what_exceeds_all_memory_is_refused():
    with pytest.raises(
        MemoryError, match=r"1048576 x 1048576 numbers, with its copy, needs 8192 of"
    ):
        timing.normal(0, (2**20, 2**20))
