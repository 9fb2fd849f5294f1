"""Training batches of examples with two canvases: one per orientation of the images."""

import dataclasses
import pickle

import numpy as np
import pytest

from tokenvit_jax.data import train_batches
from tokenvit_jax.data.decoding import UndecodableError
from tokenvit_jax.data.record import Spec
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import default_config

SIDES = 120, 200  # 72,000 bytes: through shared memory
PORTRAIT = np.arange(23) % 3 == 0
BATCH_SIZE = 4


@dataclasses.dataclass
class Source:
    unreadable: tuple = ()

    def __len__(self):
        return len(PORTRAIT)

    def name(self, index):
        return f"record {index}"

    def portrait(self):
        return PORTRAIT

    def read(self, index):
        if index in self.unreadable:
            raise UndecodableError("damaged")
        return {"label": index}


class Examples:
    canvases = (SIDES, SIDES[::-1])
    specs = {"image": Spec((*SIDES, 3), np.uint8)}  # noqa: RUF012

    def __call__(self, record, rng):
        height, width = self.canvases[int(PORTRAIT[record["label"]])]
        return {"image": np.full((height, width, 3), record["label"], np.uint8)}

    def empty(self):
        return {"image": np.zeros((*SIDES, 3), np.uint8)}


def make_config(**entries):
    config = default_config("classification")
    config.batch_size, config.seed = BATCH_SIZE, 3
    config.update_from_flattened_dict(entries)
    return config


def first_batches(count, start=0, source=None, process=(0, 1), **entries):
    data = train_batches(
        source or Source(), Examples(), make_config(**entries),
        process_index=process[0], process_count=process[1],
    )  # fmt: skip
    iterator = iter(data)
    iterator.set_state({"next_index": start})
    found = [next(iterator) for _ in range(count)]
    iterator.close()
    data.close()
    return found


def test_a_batch_holds_images_of_one_orientation():
    portraits = []
    for batch in first_batches(21):
        canvas = SIDES[::-1] if PORTRAIT[batch["index"][0]] else SIDES
        assert batch["image"].shape == (BATCH_SIZE, *canvas, 3)
        assert len(set(PORTRAIT[batch["index"]])) == 1
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
        portraits.append(PORTRAIT[batch["index"][0]])
    # A pass has 2 batches of the 8 portraits and 4 of the 15 others, each time in another order.
    passes = np.reshape(portraits[:18], (3, 6))
    assert (passes.sum(1) == 2).all() and len({tuple(row) for row in passes}) > 1


def test_every_record_comes_once_before_any_comes_again():
    found = np.concatenate([batch["index"] for batch in first_batches(30)])
    for is_portrait in (True, False):
        group = np.flatnonzero(is_portrait == PORTRAIT)
        stream = found[PORTRAIT[found] == is_portrait]
        for start in range(0, len(stream) - len(group) + 1, len(group)):
            assert sorted(stream[start : start + len(group)]) == group.tolist()


@pytest.mark.parametrize(("workers", "repeats"), [(1, 1), (0, 2)])
def test_batches_depend_on_their_position_only(workers, repeats):
    entries = {"data.repeats": repeats}
    whole = first_batches(9, **entries)
    resumed = first_batches(4, start=5, **entries, **{"data.workers": workers})
    halves = [first_batches(4, start=5, process=(i, 2), **entries) for i in range(2)]
    for number, batch in enumerate(whole[5:]):
        for name, array in batch.items():
            np.testing.assert_array_equal(resumed[number][name], array)
            joined = np.concatenate([half[number][name] for half in halves])
            np.testing.assert_array_equal(joined, array)


def test_an_unreadable_image_is_replaced_by_one_of_its_orientation():
    unreadable = tuple(np.flatnonzero(PORTRAIT)[:2].tolist())
    entries = {"data.on_corrupt": "skip"}
    found = first_batches(12, source=Source(unreadable), **entries)
    assert sum(batch["skipped"].sum() for batch in found) > 0
    for batch in found:
        assert len(set(PORTRAIT[batch["index"]])) == 1 and not set(batch["index"]) & {*unreadable}


def test_a_dataset_must_know_the_orientation_of_its_images():
    class Plain(Source):
        portrait = property()  # as if there were none

    with pytest.raises(UserError, match=r"Plain has no portrait\(\); valid without it: a square"):
        train_batches(Plain(), Examples(), make_config())


def test_the_stream_can_be_sent_to_a_worker():
    data = train_batches(Source(), Examples(), make_config())
    copy = pickle.loads(pickle.dumps(data._batches))
    np.testing.assert_array_equal(copy[7]["index"], data._batches[7]["index"])
