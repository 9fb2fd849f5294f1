"""Groups examples into batches."""

from collections.abc import Mapping

import grain
import numpy as np

Batch = dict[str, np.ndarray]


class ExampleBatches(grain.MapDataset):
    """Batches of a process, with equal numbers of examples.

    Unlike grain's, they can be written to memory that is there, each example as soon as it is made.
    A worker then holds one batch, not three (examples, their stack and the shared memory), and all
    examples use the same memory: fresh memory for each takes longer than copying it.

    Args:
      examples: dicts of arrays or numbers, in a batch equal in names, shapes and types.
      size: number of examples in a batch; those that do not fill a batch are left out.
      first: number of the first batch.
      step: distance to the next one, the number of processes.
    """

    def __init__(self, examples: grain.MapDataset, size: int, first: int = 0, step: int = 1):
        super().__init__(examples)
        self._size = size
        self._numbers = range(len(examples) // size)[first::step]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int | slice) -> Batch | grain.MapDataset:
        if isinstance(index, slice):
            return self.slice(index)
        return self.write(index, {})[0]

    def write(
        self, index: int, arrays: Mapping[str, np.ndarray]
    ) -> tuple[Batch, dict[str, tuple[int, ...]]]:
        """Makes a batch, a part of which is written to given arrays.

        Args:
          index: number of the batch.
          arrays: receive the arrays of the same names; contiguous, of the same types, and of as
            many elements, perhaps in another shape.

        Returns:
          The other arrays of the batch, and the shapes of those that were written.

        Raises:
          ValueError: names or shapes differ between examples, or an array has another size.
          TypeError: types differ.
        """
        start = self._numbers[index] * self._size
        for place in range(self._size):
            example = {k: np.asarray(v) for k, v in self._parent[start + place].items()}
            if not place:
                batch = self._begin(example, arrays)
            elif example.keys() != batch.keys():
                raise ValueError(f"a batch has examples with {[*batch]} and with {[*example]}")
            for name, value in example.items():
                to = batch[name][place, ...]
                if to.shape != value.shape:
                    raise ValueError(f"{name} {value.shape} in a batch with {to.shape}")
                np.copyto(to, value, casting="no")
        shapes = {name: batch[name].shape for name in arrays}
        return {name: batch[name] for name in batch if name not in arrays}, shapes

    def _begin(self, example: Batch, arrays: Mapping[str, np.ndarray]) -> Batch:
        """Returns arrays for a batch of such examples, the given ones in their shape."""
        batch = {}
        for name, value in example.items():
            shape = self._size, *value.shape
            new = name not in arrays
            batch[name] = np.empty(shape, value.dtype) if new else arrays[name].reshape(shape)
        return batch
