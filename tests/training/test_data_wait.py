"""How long the devices wait for data."""

import threading
import time
import weakref

import pytest

from tokenvit_jax.training import batches
from tokenvit_jax.training.batches import DataWait, WaitWarning


class Results:
    """Stands for the results of a step that ends after some seconds, or fails."""

    def __init__(self, seconds, error=None):
        self.ends = time.monotonic() + seconds
        self.error = error

    def block_until_ready(self):
        time.sleep(max(0.0, self.ends - time.monotonic()))
        if self.error:
            raise self.error
        return self


def after(seconds):
    """Yields a batch after each of some delays."""
    for delay in seconds:
        time.sleep(delay)
        yield delay


@pytest.fixture
def wait():
    wait = DataWait()
    yield wait
    wait.close()


def test_a_batch_that_comes_while_a_step_is_computed_is_no_wait(wait):
    given = after([0.05])
    wait.started(Results(0.0))
    wait.started(Results(0.5))
    assert wait.next(given) == 0.05
    assert wait.seconds == 0


@pytest.mark.parametrize("error", [None, RuntimeError("the device is lost")])
def test_the_wait_begins_when_the_step_ends(wait, error):
    given = after([0.4, 0.2, 0.0])
    step = Results(0.1, error)
    wait.started(step)
    begin = time.monotonic()
    wait.next(given)
    # The step may end later than it should, and be noted later, on a machine that is busy.
    assert 0 < wait.seconds <= time.monotonic() - max(begin, step.ends)
    assert wait.seconds > 0.1
    # From now on the devices have nothing to compute.
    before, begin = wait.seconds, time.monotonic()
    wait.next(given)
    assert 0.2 <= wait.seconds - before <= time.monotonic() - begin


def test_no_step_was_started(wait):
    wait.next(after([0.01]))
    assert wait.seconds >= 0.01


def test_a_closed_wait_leaves_no_thread_and_no_results():
    before = set(threading.enumerate())
    wait, results = DataWait(), Results(0.2)
    (thread,) = set(threading.enumerate()) - before
    wait.started(results)
    deleted = weakref.ref(results)
    del results
    wait.close()
    assert not thread.is_alive()
    assert deleted() is None


def test_a_warning_says_what_to_change_and_comes_seldom(caplog):
    warning = WaitWarning(workers=2, cores=8)
    warning.add(4.9, 9.0)  # too short
    assert not caplog.messages
    warning.add(0.1, 1.0)
    expected = (
        "the devices wait for data 50 % of the time: raise config.data.workers from 2 to 8, or set "
        "it to 'auto'"
    )
    assert caplog.messages == [expected]
    for _ in range(59):
        warning.add(5.0, 10.0)
    assert caplog.messages == [expected]
    warning.add(5.0, 10.0)
    assert caplog.messages == [expected] * 2


@pytest.mark.parametrize(("workers", "cores"), [(1, 1), (8, 8), (9, 8)])
def test_a_warning_when_all_cores_make_batches(caplog, workers, cores):
    WaitWarning(workers, cores).add(2.0, 10.0)
    some = "1 workers on 1 core" if cores == 1 else f"{workers} workers on 8 cores"
    assert f"20 % of the time: {some} are not enough; use more cores, less" in caplog.text


def test_short_waits_are_no_warning(caplog):
    warning = WaitWarning(workers=0, cores=8)
    for _ in range(100):
        warning.add(batches.MAX_WAIT * 20 - 0.01, 20.0)
    assert not caplog.messages
