import contextlib
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from batches import children, eval_dataset, train_dataset
from PIL import Image
from sampled import sampled

from tokenvit_jax.data import Spec, check_records, cores, train_batches, workers
from tokenvit_jax.data.decoding import LazyJpeg
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import create_task, default_config


class NumberedSource:
    """Records whose label and grey level are their index."""

    def __init__(self, size, corrupt=(), fatal=()):
        self.size = size
        self.corrupt = corrupt
        self.fatal = fatal

    def __len__(self):
        return self.size

    def name(self, index):
        return f"numbers, record {index}"

    def read(self, index):
        if index in self.fatal:
            os._exit(1)
        if index in self.corrupt:
            raise UserError(f"{self.name(index)}: unreadable")
        image = Image.new("RGB", (8, 8), (index, index, index))
        return {"id": index, "image": image, "label": index}


@pytest.fixture
def config():
    config = default_config("classification")
    config.image_size = 32
    config.batch_size = 8
    config.data.eval_batch_size = 8
    return config


def take(dataset, count):
    iterator = iter(dataset)
    return [next(iterator) for _ in range(count)]


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def labels_of(batches):
    return np.concatenate([batch["label"] for batch in batches])


def augmented(config):
    config.augment.rotation = 20.0
    config.augment.translation = 0.2
    config.augment.erasing = 0.5
    return config


def test_batches_have_the_promised_types(config):
    (batch,) = take(train_dataset(config), 1)
    assert {name: (values.shape, str(values.dtype)) for name, values in batch.items()} == {
        "image": ((8, 32, 32, 3), "uint8"),
        "label": ((8,), "int32"),
        "index": ((8,), "int32"),
        "skipped": ((8,), "int32"),
    }
    batch = next(iter(eval_dataset(config)))
    assert batch["image"].shape == (8, 32, 32, 3) and batch["mask"].dtype == np.float32
    assert batch["index"].dtype == np.int32


def test_every_epoch_has_every_record_once_in_another_order(config):
    source = NumberedSource(20)  # 5 batches are 2 epochs
    labels = labels_of(take(train_dataset(config, source), 5)).reshape(2, 20)
    assert sorted(labels[0]) == sorted(labels[1]) == list(range(20))
    assert np.any(labels[0] != labels[1]) and np.any(labels[0] != np.arange(20))
    again = labels_of(take(train_dataset(config, source), 5)).reshape(2, 20)
    np.testing.assert_array_equal(again, labels)
    config.seed = 1
    other = labels_of(take(train_dataset(config, source), 5)).reshape(2, 20)
    assert np.any(other[0] != labels[0]) and np.any(other[0] != labels[1])


def test_same_record_is_augmented_anew_each_time(config):
    source = NumberedSource(1)
    config.augment.erasing = 1.0
    (batch,) = take(train_dataset(config, source), 1)
    assert len({image.tobytes() for image in batch["image"]}) == 8


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_batches_of_one(config, process_count, repeats):
    augmented(config).data.repeats = repeats
    whole = take(train_dataset(config), 3)
    parts = [
        take(train_dataset(config, process_index=p, process_count=process_count), 3)
        for p in range(process_count)
    ]
    joined = [
        {name: np.concatenate([part[s][name] for part in parts]) for name in whole[s]}
        for s in range(3)
    ]
    assert_equal(joined, whole)


def test_repeats_are_interleaved_in_the_batch(config):
    source = NumberedSource(12)
    config.data.repeats = 2
    labels = labels_of(take(train_dataset(config, source), 6)).reshape(6, 8)  # 2 epochs, twice
    np.testing.assert_array_equal(labels[:, :4], labels[:, 4:])
    assert (labels[:, 0::2] != labels[:, 1::2]).all()  # what Mixup pairs
    np.testing.assert_array_equal(np.bincount(labels[:3].ravel()), np.full(12, 2))


def test_repeats_need_not_divide_the_batch(config):
    source = NumberedSource(12)
    config.data.repeats = 3
    labels = labels_of(take(train_dataset(config, source), 4)).reshape(4, 8)  # 1 epoch
    np.testing.assert_array_equal(labels[:, 3:], labels[:, [0, 1, 2, 0, 1]])
    np.testing.assert_array_equal(np.bincount(labels[:, :3].ravel()), np.full(12, 1))


def test_state_resumes_in_the_middle_of_an_epoch(config):
    iterator = iter(train_dataset(augmented(config)))
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    rest = [next(iterator) for _ in range(2)]
    resumed = iter(train_dataset(config))
    next(resumed)
    resumed.set_state(state)
    assert_equal([next(resumed) for _ in range(2)], rest)
    assert resumed.get_state() == iterator.get_state() == {"next_index": 5}


def test_workers_change_neither_batches_nor_state(config):
    config.image_size = 64  # 96 KiB per batch: through shared memory
    expected = take(train_dataset(augmented(config)), 7)
    config.data.workers = 2
    before = children(os.getpid())
    dataset = train_dataset(config)
    iterator = iter(dataset)
    assert_equal([next(iterator) for _ in range(4)], expected[:4])
    workers = children(os.getpid()) - before
    state = iterator.get_state()
    iterator.set_state({"next_index": 1})
    assert_equal([next(iterator)], expected[1:2])
    iterator.close()
    # The next iterator has the same workers, and none of the batches that they have made.
    with contextlib.closing(dataset), contextlib.closing(iter(dataset)) as iterator:
        assert_equal([next(iterator) for _ in range(2)], expected[:2])
        assert children(os.getpid()) - before == workers
    assert not children(os.getpid()) & workers

    config.data.workers = 0  # continues with another number of workers
    resumed = iter(train_dataset(config))
    resumed.set_state(state)
    assert_equal([next(resumed) for _ in range(3)], expected[4:])


@pytest.mark.parametrize(
    "process_count, workers, size, devices",
    sampled(
        [(1, 0, 8, 1), (2, 0, 8, 8), (1, 1, 8, 1), (1, 0, 1, 8), (2, 0, 7, 4), (1, 0, 7, 3)],
        keep=(0, 1, 3, 4, 5),
    ),
)
def test_evaluation_counts_every_record_once(config, process_count, workers, size, devices):
    """With the size of a batch rounded up to a multiple of the devices."""
    source = NumberedSource(21)
    config.data.workers, config.data.eval_batch_size = workers, size
    passes = [
        list(
            eval_dataset(
                config, source, devices=devices, process_index=p, process_count=process_count
            )
        )
        for p in range(process_count)
    ]
    whole = sum(len(batches[0]["mask"]) for batches in passes)
    assert size <= whole < size + devices and whole % devices == 0
    assert [len(batches) for batches in passes] == [-(-21 // whole)] * process_count
    batches = [batch for one in passes for batch in one]
    masks = np.concatenate([batch["mask"] for batch in batches])
    assert masks.sum() == 21
    assert sorted(labels_of(batches)[masks == 1]) == list(range(21))
    indices = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(indices, np.where(masks == 1, labels_of(batches), -1))
    images = np.concatenate([batch["image"] for batch in batches])
    np.testing.assert_array_equal(images[masks == 1][:, 0, 0, 0], labels_of(batches)[masks == 1])


@pytest.mark.parametrize(
    "corrupt, on_corrupt, message",
    [
        ((), "raise", None),
        ((3,), "raise", None),  # found when it is read
        ((0,), "raise", "faults, record 0: unreadable"),
        ((7,), "raise", "faults, record 7: unreadable"),
        (range(7), "skip", None),
        (range(8), "skip", "none of the 8 records can be read, from faults, record 0 on"),
    ],
)
def test_faults_of_a_split_that_show_early(config, corrupt, on_corrupt, message):
    config.data.on_corrupt = on_corrupt
    source, examples = NumberedSource(8, corrupt), create_task(config).examples(train=False)
    source.name = "faults, record {}".format  # a warning is logged once per record
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_records(source, examples, config)


def test_an_empty_split_is_an_error(config):
    with pytest.raises(UserError, match=r"config\.dataset='digits': a split holds no records"):
        check_records(NumberedSource(0), create_task(config).examples(train=False), config)


def test_digits_are_evaluated_whole(config):
    whole = take(eval_dataset(config), 1)
    config.data.eval_crop = 1.0
    assert_equal(whole, take(eval_dataset(config), 1))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_corrupt_record_is_an_error(config, workers):
    source = NumberedSource(8, corrupt=(3,))
    config.data.workers = workers
    message = 'numbers, record 3: unreadable; data.on_corrupt="skip" passes over it'
    for make in (train_dataset, eval_dataset):
        with pytest.raises(UserError) as error:
            next(iter(make(config, source)))
        assert str(error.value) == message


def test_skipped_record_is_replaced_counted_and_logged_once(config, caplog):
    source = NumberedSource(16, corrupt=(3, 4, 15))
    config.data.on_corrupt = "skip"
    with caplog.at_level(logging.WARNING):
        batches = take(train_dataset(config, source), 4)  # 2 epochs
    labels = labels_of(batches).reshape(2, 16)
    np.testing.assert_array_equal(labels_of(batches), [i for b in batches for i in b["index"]])
    # 3 and 4 are replaced by 5, 15 by the first one.
    for epoch in labels:
        assert sorted(epoch) == sorted([0, 0, 1, 2, 5, 5, 5, *range(6, 15)])
    skipped = np.concatenate([batch["skipped"] for batch in batches])
    assert sorted(skipped[skipped > 0]) == [
        1,
        1,
        1,
        1,
        2,
        2,
    ]  # per epoch: 4 and 15 pass 1, 3 passes 2
    for record in (3, 4, 15):
        line = f"skipped numbers, record {record}: unreadable"
        assert [message for message in caplog.messages if message == line] == [line]


class DamagedInside(NumberedSource):
    """Record 3 is a JPEG that can be opened, but not decoded."""

    def read(self, index):
        record = super().read(index)
        if index == 3:
            record["image"] = LazyJpeg(b"\xff\xd8 no image \xff\xd9", (8, 8))
        return record


def test_damage_that_shows_when_the_pixels_are_needed_is_passed_over(config):
    with pytest.raises(UserError, match=r"^numbers, record 3: cannot decode 14 bytes.*on_corrupt="):
        take(train_dataset(config, DamagedInside(8)), 1)
    config.data.on_corrupt = "skip"
    (batch,) = take(train_dataset(config, DamagedInside(8)), 1)
    assert sorted(batch["label"]) == [0, 1, 2, 4, 4, 5, 6, 7] and batch["skipped"].sum() == 1
    (batch,) = eval_dataset(config, DamagedInside(8))
    np.testing.assert_array_equal(batch["skipped"], np.arange(8) == 3)


def test_skipped_record_does_not_count_in_evaluation(config):
    source = NumberedSource(8, corrupt=(3,))
    config.data.on_corrupt = "skip"
    (batch,) = eval_dataset(config, source)
    np.testing.assert_array_equal(batch["mask"], np.arange(8) != 3)
    np.testing.assert_array_equal(batch["skipped"], np.arange(8) == 3)
    np.testing.assert_array_equal(batch["index"], np.arange(8))


class ManyArrays:
    """Arrays of several types: five go through shared memory, two through the pipe."""

    specs: ClassVar = {
        "bytes": Spec((201, 101), np.uint8),
        "depth": Spec((65, 67), np.float32),
        "segments": Spec((128, 128), np.int16),
        "mask": Spec((300, 300), np.bool_),
        "exact": Spec((33, 64), np.float64),
        "small": Spec((3,), np.float64),
        "number": Spec((), np.int32),
    }

    def __call__(self, record, rng):
        number = rng.integers(100)
        return {
            name: np.full(spec.shape, (record["id"] + number) % 256).astype(spec.dtype)
            for name, spec in self.specs.items()
        }


class WrongType(ManyArrays):
    specs: ClassVar = ManyArrays.specs | {"depth": Spec((65, 67), np.float64)}

    def __call__(self, record, rng):
        return super().__call__(record, rng) | {"depth": np.zeros((65, 67), np.float32)}


@pytest.mark.slow
def test_arrays_of_all_types_come_back_from_workers(config):
    config.batch_size = 4
    source = NumberedSource(9)
    expected = take(train_batches(source, ManyArrays(), config), 7)
    config.data.workers = 2
    iterator = iter(train_batches(source, ManyArrays(), config))
    batches = [next(iterator) for _ in range(7)]  # every slot of the shared memory is used again
    assert_equal(batches, expected)
    for name, spec in ManyArrays.specs.items():
        assert batches[0][name].shape == (4, *spec.shape)
        assert batches[0][name].dtype == spec.dtype
    iterator.close()


@pytest.mark.slow
def test_array_of_another_type_than_its_spec_is_an_error(config):
    config.data.workers = 1
    with pytest.raises(TypeError, match=r"float32.*float64") as error:
        next(iter(train_batches(NumberedSource(9), WrongType(), config)))
    assert "in write" in str(error.value.__cause__)  # the traceback of the worker


class InProgram(ManyArrays):
    """Belongs to no module that a worker could import."""


def test_a_class_that_workers_cannot_import_is_named(config, monkeypatch):
    config.data.workers = 1
    monkeypatch.setattr(InProgram, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "InProgram", InProgram, raising=False)
    with pytest.raises(UserError, match=r"AttributeError: .*InProgram.*must be in a module, not"):
        next(iter(train_batches(NumberedSource(9), InProgram(), config)))


def test_nothing_readable_is_an_error(config):
    source = NumberedSource(4, corrupt=range(4))
    config.data.on_corrupt = "skip"
    with pytest.raises(UserError, match="none of the 4 records can be read"):
        next(iter(train_dataset(config, source)))


def test_death_of_a_worker_is_an_error(config):
    source = NumberedSource(8, fatal=(3,))
    config.data.workers = 1
    with pytest.raises(UserError, match="a worker process of the data pipeline died"):
        next(iter(train_dataset(config, source)))


def test_a_worker_that_dies_at_its_start_is_an_error(config, monkeypatch):
    """Before it has taken its first message, and without waiting for it forever."""
    config.data.workers = 2
    started = []

    class Dead(subprocess.Popen):
        def __init__(self, command, **options):
            super().__init__([sys.executable, "-S", "-c", "raise SystemExit(3)"], **options)
            self.wait()
            started.append(self)

    monkeypatch.setattr(workers.subprocess, "Popen", Dead)
    with contextlib.closing(train_dataset(config)) as dataset:
        dataset.start()
        assert len(started) == 2
        with pytest.raises(UserError, match=r"died \(status 3\): its error is above"):
            next(iter(dataset))
        assert len(started) == 2


def test_workers_follow_the_cores(config, monkeypatch):
    config.data.workers = "auto"
    monkeypatch.setattr(cores, "_QUOTA_FILE", Path("none"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5}, raising=False)
    source = NumberedSource(100)
    assert train_dataset(config, source).workers == 3
    assert train_dataset(config, source, cores=12).workers == 12
    assert eval_dataset(config, source, cores=20).workers == 13  # batches
    config.data.workers = 2
    assert train_dataset(config, source, cores=12).workers == 2


@pytest.mark.parametrize(
    "key, value, valid",
    [
        ("image_size", 31, "whole numbers from 32 to 32768; one number, or (height, width)"),
        ("batch_size", 9, "positive multiples of the number of processes, 2"),
        ("data.eval_batch_size", 9, "positive multiples of the number of processes, 2"),
        ("data.on_corrupt", "ignore", "raise, skip"),
        ("data.normalization", "half", "imagenet, inception, clip"),
        ("seed", -1, "whole numbers from 0 to 4294967295"),
        ("data.workers", -1, "auto; or whole numbers from 0 to 1000"),
        ("data.workers", "many", "auto; or whole numbers from 0 to 1000"),
        ("data.repeats", 0, "whole numbers from 1 to 1048576"),
        ("data.repeats", 8, "1, or more below config.batch_size=8"),
    ],
)
def test_wrong_value_is_named(config, key, value, valid):
    config.update_from_flattened_dict({key: value})
    make = eval_dataset if "eval" in key else train_dataset
    with pytest.raises(UserError) as error:
        make(config, process_count=2)
    assert str(error.value) == f"config.{key}={value!r} is not valid; valid: {valid}"


def test_unknown_dataset_is_named(config):
    config.dataset = "digit"
    with pytest.raises(UserError, match=r"no dataset 'digit' \(did you mean 'digits'\?\); valid: "):
        train_dataset(config)


# Without a guard, and read from standard input: the workers do not run it again. They use the same
# package as this program, wherever its path leads now.
SCRIPT = """
import os, signal, sys, threading
from batches import children, train_dataset
from tokenvit_jax.tasks import default_config

config = default_config("classification")
config.image_size, config.data.workers = 32, 1
iterator = iter(train_dataset(config))
sys.path.insert(0, sys.argv[2])

def signal_worker():  # as a cluster does to all processes of a job, from their first moment
    while not (workers := children(os.getpid())):
        pass
    print(*workers, flush=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(*workers, number)

thread = threading.Thread(target=signal_worker)
thread.start()
next(iterator)
thread.join()
for number in (signal.SIGTERM, signal.SIGINT):
    os.kill(*children(os.getpid()), number)
for _ in range(3):
    next(iterator)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["exit", pytest.param("kill", marks=pytest.mark.slow)])
def test_workers_end_with_their_parent(tmp_path, how):
    (tmp_path / "tokenvit_jax").mkdir()
    (tmp_path / "tokenvit_jax" / "__init__.py").touch()
    result = subprocess.run(
        [sys.executable, "-", how, tmp_path],
        input=SCRIPT,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if how == "exit":
        assert (result.returncode, result.stderr) == (0, "")
    worker = int(result.stdout)
    deadline = time.monotonic() + 10
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(worker)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
