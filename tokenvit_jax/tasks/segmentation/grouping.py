"""Groups the records of an evaluation by the size of their images, for models that see them whole.

Shapes of compiled programs are static, and padding would change what a whole image gives: pyramid
pooling and attention would see it. So a batch holds images of one size, and there is one program
for each size.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

Batch = dict[str, np.ndarray]


def group_by_size(batches: Iterable[Batch], images: Sequence[str]) -> Iterator[Batch]:
    """Yields batches of images of one size, without padding, each record of the others once.

    A batch is yielded as soon as there are enough images of a size. The last batch of a size is
    filled with copies of a record whose "mask" is 0.

    Args:
      batches: arrays with a leading axis B, the same B in all: for each name in ``images`` the
        image at the top left of a buffer (B, H, W, C) and "NAME_size" (B, 2), its height and width;
        "mask" (B,), 0 for records to leave out; and others.
      images: names of the images. Images whose first ones have equal sizes have equal sizes.
    """
    groups: dict[tuple[int, ...], list[Batch]] = {}
    size = 0
    for batch in batches:
        size = len(batch["mask"])
        for i in np.flatnonzero(batch["mask"]):
            record = {name: array[i] for name, array in batch.items()}
            for name in images:
                height, width = record[f"{name}_size"]
                record[name] = record[name][:height, :width].copy()  # lets go of the batch
            group = groups.setdefault(tuple(record[f"{images[0]}_size"].tolist()), [])
            group.append(record)
            if len(group) == size:
                yield _stacked(group)
                group.clear()
    for group in filter(None, groups.values()):
        filling = {**group[0], "mask": np.zeros_like(group[0]["mask"])}
        yield _stacked(group + [filling] * (size - len(group)))


def _stacked(records: Sequence[Batch]) -> Batch:
    return {name: np.stack([record[name] for record in records]) for name in records[0]}
