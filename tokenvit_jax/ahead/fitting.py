"""Finds the largest batch that fits into the memory of a device, with few compilations.

The memory of a step grows almost linearly with the batch. So two compilations predict the largest
batch, and a third one confirms it; where the prediction is wrong, each further compilation narrows
the interval.
"""

from collections.abc import Callable

# Images per device. More serve nobody, and libtpu's compiler died of 5,666 (DeiT-S).
LARGEST = 2**12
# Part of the memory to leave free: measured memory was within 4 % of the compiled (one H200).
MARGIN = 0.04
CLOSE = 0.02  # part of the batch: the result is at most so much too small
# How many times as many images an estimate is for at most: with few images, constant temporaries
# such as copies of weights seem to be theirs.
_MOST_TIMES = 16


def estimated_fit(batch: int, memory: int, state: int, capacity: int, step: int = 1) -> int:
    """Estimates the largest batch that fits from one batch, up to :func:`largest_estimate`.

    Args:
      batch: images per device.
      memory: memory that they need [bytes].
      state: part of it that does not grow with the batch [bytes].
      capacity: memory of a device [bytes].
      step: the result is a multiple of it.
    """
    per_image = max(1.0, (memory - state) / batch)
    most = int(max(0, capacity - state) / per_image)
    return min(most // step * step, largest_estimate(batch, step))


def largest_estimate(batch: int, step: int = 1) -> int:
    """Returns the largest result of :func:`estimated_fit`; more images may fit then."""
    return max(batch, min(_MOST_TIMES * batch, LARGEST)) // step * step


def largest_fit(
    memory_of: Callable[[int], tuple[int, int]], capacity: int, first: int, step: int = 1
) -> int:
    """Returns the largest batch that fits, within 2 % and at most :data:`LARGEST`.

    0: the smallest one does not fit.

    Args:
      memory_of: images per device -> memory that does not grow with the batch, and all memory
        [bytes]; slow.
      capacity: memory of a device [bytes].
      first: first batch to try, which may be larger than :data:`LARGEST`.
      step: batches are multiples of it.
    """
    known: dict[int, int] = {}
    guess = max(step, first // step * step)
    while guess:
        state, memory = memory_of(guess)
        known |= {0: state, guess: memory}
        guess = _next_guess(known, capacity, step)
    return max(batch for batch, memory in known.items() if memory <= capacity or not batch)


def _next_guess(known: dict[int, int], capacity: int, step: int) -> int:
    """Returns the next batch to try, from the memory of others; 0: the search is over."""
    fitting = max(batch for batch, memory in known.items() if memory <= capacity or not batch)
    most = LARGEST // step * step
    if fitting >= most:
        return 0
    bound = min((batch for batch in known if batch > fitting), default=most + step)
    if bound in known:
        low, high = fitting, bound
    else:
        *_, low, high = sorted(known)
    slope = max(1.0, (known[high] - known[low]) / (high - low))
    predicted = int(low + max(0, capacity - known[low]) / slope) // step * step
    close = max(step, int(CLOSE * fitting))
    if bound - fitting <= close or (fitting and predicted < fitting + close):
        return 0
    return min(max(predicted, fitting + step), bound - step, most)
