"""The search for the largest batch that fits."""

import pytest

from tokenvit_jax.ahead.fitting import LARGEST, estimated_fit, largest_estimate, largest_fit

GIB = 2**30


def search(memory, capacity, first, step=1, state=GIB):
    """Returns the result and the batches that were tried."""
    tried = []

    def memory_of(batch):
        tried.append(batch)
        return state, int(memory(batch))

    return largest_fit(memory_of, capacity, first, step), tried


@pytest.mark.parametrize("first", [8, 128, 400])
@pytest.mark.parametrize("fixed", [0.0, 0.5])  # GiB that neither the state nor the batch explain
def test_memory_that_grows_linearly_takes_three_compilations(first, fixed):
    found, tried = search(lambda b: (1 + fixed + b / 16) * GIB, 20 * GIB, first, step=8)
    exact = int(16 * (19 - fixed)) // 8 * 8
    assert exact - 8 <= found <= exact
    assert len(tried) <= 3 and found in tried


@pytest.mark.parametrize("bend", [-0.4, 0.6])
def test_memory_that_bends_near_the_limit(bend):
    def memory(batch):
        linear = (1 + batch / 16) * GIB
        return linear + bend * max(0, linear - 15 * GIB)

    found, tried = search(memory, 20 * GIB, 64, step=2)
    exact = max(batch for batch in range(0, 1000, 2) if memory(batch) <= 20 * GIB)
    assert 0.97 * exact <= found <= exact
    assert len(tried) <= 6


def test_nothing_fits():
    assert search(lambda b: (30 + b) * GIB, 20 * GIB, 64, state=30 * GIB)[0] == 0
    found, tried = search(lambda b: (1 + 25 * b) * GIB, 20 * GIB, 64, step=2)
    assert (found, tried[-1]) == (0, 2)


def test_everything_fits():
    assert search(lambda b: GIB + b, 20 * GIB, 8)[0] == LARGEST


def test_estimate_from_one_batch():
    assert estimated_fit(100, 11 * GIB, GIB, 21 * GIB) == 200
    assert estimated_fit(100, 11 * GIB, GIB, 21 * GIB, step=16) == 192
    assert estimated_fit(100, 40 * GIB, 30 * GIB, 21 * GIB) == 0


def test_few_images_tell_little_about_many():
    assert estimated_fit(1, 2 * GIB, GIB, 101 * GIB) == 16
    assert estimated_fit(2000, 2 * GIB, GIB, 11 * GIB, step=3) == LARGEST // 3 * 3
    assert estimated_fit(9000, 2 * GIB, GIB, 11 * GIB) == largest_estimate(9000) == 9000


def test_only_the_first_batch_may_be_larger_than_the_search():
    assert search(lambda b: (1 + b / 400) * GIB, 20 * GIB, 2 * LARGEST)[1] == [2 * LARGEST, LARGEST]
    found, tried = search(lambda b: GIB + b, 20 * GIB, 2 * LARGEST)
    assert (found, tried) == (2 * LARGEST, [2 * LARGEST])
