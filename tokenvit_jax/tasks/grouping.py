"""Groups the records of an evaluation by the size of their images.

Shapes of compiled programs are static. Where padding would change what a whole image gives, or cost
much, a batch holds images of one size, and there is one program for each size.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

Batch = dict[str, np.ndarray]


Size = tuple[int, int]


def group_by_size(
    batches: Iterable[Batch],
    images: Sequence[str],
    cut: Callable[[str, Batch], Size] = lambda name, record: tuple(record[f"{name}_size"].tolist()),
) -> Iterator[Batch]:
    """Yields batches of images of one size, each record of the others once.

    A batch is yielded as soon as there are enough images of a size. The last batch of a size is
    filled with copies of a record whose "mask" is 0.

    Args:
      batches: arrays with a leading axis B, the same B in all: for each name in ``images`` the
        image at the top left of a buffer (B, H, W, C) and "NAME_size" (B, 2), its height and width;
        "mask" (B,), 0 for records to leave out; and others.
      images: names of the images. Images whose first ones have equal sizes have equal sizes.
      cut: maps the name of an image and its record to height and width of the part of the buffer
        that is kept; by default, without padding.
    """
    groups: dict[tuple[int, ...], list[Batch]] = {}
    size = 0
    for batch in batches:
        size = len(batch["mask"])
        for i in np.flatnonzero(batch["mask"]):
            record = {name: array[i] for name, array in batch.items()}
            for name in images:
                height, width = cut(name, record)
                record[name] = record[name][:height, :width].copy()  # lets go of the batch
            group = groups.setdefault(record[images[0]].shape, [])
            group.append(record)
            if len(group) == size:
                yield _stacked(group)
                group.clear()
    for group in filter(None, groups.values()):
        filling = {**group[0], "mask": np.zeros_like(group[0]["mask"])}
        yield _stacked(group + [filling] * (size - len(group)))


def _stacked(records: Sequence[Batch]) -> Batch:
    return {name: np.stack([record[name] for record in records]) for name in records[0]}
