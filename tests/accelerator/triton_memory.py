"""Arrays of a kernel's launch, which notice what a GPU would leave to chance.

A GPU neither reports a read outside of an array nor one of memory that nobody has written, and
threads and programs run in any order.
"""

import numpy as np

_SHIFT = 40  # array i begins at address (i + 1) << _SHIFT
_NOBODY, _SEVERAL = -1, -2
_UNDEFINED = 0xFF  # bytes of NaN, or of -1


class DeviceArray:
    """An array in the memory of the simulated GPU.

    Attributes:
      values: its values; results of the launch after it.
      base: address of the first value.
    """

    def __init__(self, values: np.ndarray, number: int, defined: bool, follow: bool) -> None:
        """Places an array.

        Args:
          values: the array, contiguous.
          number: position among the arguments of the kernel.
          defined: whether it is an input; else nothing may be read before it is written.
          follow: whether to follow who reads and writes each value, which takes memory and time.
        """
        self.values, self.base, self.follow = values, (number + 1) << _SHIFT, follow
        self.flat = values.reshape(-1)
        size = self.flat.size if follow else 0
        self.defined = np.full(size, defined)
        self.writer, self.reader = (np.full(size, _NOBODY, np.int32) for _ in range(2))
        # When a value was last written and read, counted in barriers, and by which thread.
        self.written, self.read = (np.full((2, size), _NOBODY) for _ in range(2))


class Memory:
    """The arrays of a launch, as the program that runs at the moment sees them.

    Threads are not simulated. Two accesses are taken as one thread's if they have the same position
    in tensors of equal shapes; else a barrier must lie between them. Triton gives a tensor with
    fewer values than threads to several threads: all of them read it, one writes it.

    Attributes:
      faults: what was wrong and at which operation, once each.
    """

    def __init__(self, arrays: list[DeviceArray], num_threads: int) -> None:
        self.faults: list[str] = []
        self._arrays, self._num_threads = arrays, num_threads
        self._program, self._barriers = 0, 0

    def start(self, program: int) -> None:
        """Begins a program of the grid."""
        self._program = program
        self.barrier()

    def barrier(self) -> None:
        """Makes the threads of the program wait for each other."""
        self._barriers += 1

    def load(
        self,
        addresses: np.ndarray,
        dtype: np.dtype,
        mask: np.ndarray | None,
        other: np.ndarray | None,
        where: str,
    ) -> np.ndarray:
        """Returns the values at addresses; where the mask is false, ``other`` or anything."""
        if other is None:
            result = np.empty(addresses.shape, dtype)
            result.reshape(-1).view(np.uint8)[:] = _UNDEFINED
        else:
            result = np.broadcast_to(other, addresses.shape).copy()
        chosen = np.ones(addresses.shape, bool) if mask is None else _spread(mask, addresses)
        array, places = self._find(addresses[chosen], dtype, where)
        if array is None:
            return result
        result[chosen] = array.flat[places].view(dtype)
        if array.follow:
            thread = _threads(chosen)
            if not array.defined[places].all():
                self._note("reads what nobody has written", where)
            writer = array.writer[places]
            if np.any((writer != _NOBODY) & (writer != self._program)):
                self._note("reads what another program writes", where)
            replicated = chosen.size < self._num_threads
            if self._unordered(writer, array.written[:, places], thread, replicated):
                self._note("reads what another thread wrote, without a barrier", where)
            reader = array.reader[places]
            alone = (reader == _NOBODY) | (reader == self._program)
            array.reader[places] = np.where(alone, self._program, _SEVERAL)
            self._note_readers(array, places, thread, replicated)
        return result

    def store(
        self, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray | None, where: str
    ) -> None:
        """Writes values to addresses where the mask is true."""
        chosen = np.ones(addresses.shape, bool) if mask is None else _spread(mask, addresses)
        values = _spread(values, addresses)[chosen]
        array, places = self._find(addresses[chosen], values.dtype, where)
        if array is None:
            return
        values = values.view(array.flat.dtype)
        writer = array.writer[places] if array.follow else np.empty(0, np.int32)
        other = (writer != _NOBODY) & (writer != self._program)
        before = array.flat[places]
        array.flat[places] = values
        if not array.follow:
            return
        thread = _threads(chosen)
        # Two programs may write equal values, and read them: their order makes no difference.
        if array.flat[places].tobytes() != values.tobytes():
            self._note("writes several values to one place", where)
        equal = before.view(f"u{before.itemsize}") == values.view(f"u{values.itemsize}")
        if np.any(other & ~equal):
            self._note("writes what another program writes", where)
        reader = array.reader[places]
        foreign = (reader != _NOBODY) & (reader != self._program)
        if np.any(foreign & ~(other & equal)):
            self._note("writes what another program reads", where)
        if self._unordered(writer, array.written[:, places], thread):
            self._note("writes what another thread wrote, without a barrier", where)
        if self._unordered(reader, array.read[:, places], thread):
            self._note("writes what another thread reads, without a barrier", where)
        array.defined[places], array.writer[places] = True, self._program
        array.written[0, places], array.written[1, places] = self._barriers, thread

    def _note(self, fault, where):
        line = f"{fault}: {where}"
        if line not in self.faults:
            self.faults.append(line)

    def _note_readers(self, array, places, thread, replicated):
        """Notes which thread reads each place, or that several do since the last barrier."""
        barriers, before = array.read[:, places]
        several = replicated | ((barriers == self._barriers) & (before != thread))
        array.read[0, places], array.read[1, places] = self._barriers, thread
        several |= array.read[1, places] != thread  # one place in two positions of the tensor
        array.read[1, places[several]] = _SEVERAL

    def _unordered(self, program, access, thread, replicated=False):
        barriers, other = access
        same = (program == self._program) & (barriers == self._barriers)
        return np.any(same & (replicated | (other != thread)))

    def _find(self, addresses, dtype, where):
        """Returns the array that holds addresses, and the places there; None if there is none."""
        if not addresses.size:
            return None, addresses
        number = int(addresses.flat[0] >> _SHIFT) - 1
        if not 0 <= number < len(self._arrays):
            self._note("is outside of all arrays", where)
            return None, addresses
        array = self._arrays[number]
        assert dtype.itemsize == array.flat.itemsize, where
        places = (addresses - array.base) // dtype.itemsize
        inside = (places >= 0) & (places < array.flat.size)
        if not inside.all():
            shape, first, last = array.values.shape, places.min(), places.max()
            self._note(f"is outside of {shape}, at {first} to {last}", where)
        return array, np.where(inside, places, 0)


def _spread(x, addresses):
    return np.broadcast_to(x, addresses.shape)


def _threads(chosen):
    """Returns a number for each chosen position and shape of the tensor."""
    shape = sum(size.bit_length() << 5 * axis for axis, size in enumerate(chosen.shape))
    return (np.flatnonzero(chosen) << 24) + shape
