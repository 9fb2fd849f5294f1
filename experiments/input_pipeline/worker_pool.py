"""Compares the pool of worker processes with grain's process prefetch.

    python -m experiments.input_pipeline.worker_pool

Both make the same batches in two processes and take turns: one pool starts, makes a few batches
that are not timed and then the timed ones; then the other one. The result is the ratio of the
times of a turn: the median over the turns, and the lowest and highest, which show the noise.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
from absl import flags
from PIL import Image

from experiments import pages
from tokenvit_jax import cli
from tokenvit_jax.data import Record, Spec, builtin_info, open_split, train_batches
from tokenvit_jax.data.decoding import open_image
from tokenvit_jax.data.workers import Batches
from tokenvit_jax.measure.report import markdown_table
from tokenvit_jax.tasks import default_config
from tokenvit_jax.tasks.classification.examples import ClassificationExamples

FLAGS = flags.FlagValues()
flags.DEFINE_integer("batch_size", 512, "images of 224 x 224 pixels", flag_values=FLAGS)
flags.DEFINE_integer("turns", 3, "turns of either pool", flag_values=FLAGS)
flags.DEFINE_string("kill", None, "for this script itself: the pool to orphan", flag_values=FLAGS)

WORKERS = 2
SIDE = 224  # pixels
WARMUP = 4  # batches: as many as either pool makes ahead
TIMED = {"transport": 40, "digits": 16, "jpeg": 12}  # batches per turn
PAUSE = 10.0  # seconds after which an orphan counts as one


class JpegSource:
    """Records that share 32 JPEG files of 500 x 375 pixels.

    Args:
      quality: quality of the files, up to 95.
    """

    def __init__(self, quality: int = 90):
        rng = np.random.default_rng(0)
        self._files = [self._encode(rng, quality) for _ in range(32)]

    def __len__(self) -> int:
        return 50_000

    def name(self, index: int) -> str:
        """See :class:`tokenvit_jax.data.Source`."""
        return f"record {index}"

    def read(self, index: int) -> Record:
        """See :class:`tokenvit_jax.data.Source`."""
        image = open_image(self.content(index))
        return Record(id=index, image=image, label=index % 1000)

    def content(self, index: int) -> bytes:
        """Returns the file of a record."""
        return self._files[index % len(self._files)]

    def _encode(self, rng: np.random.Generator, quality: int) -> bytes:
        coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        pixels = np.asarray(image) + rng.normal(0, 8, (375, 500, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
        return buffer.getvalue()


class OneImage:
    """The same image for every record: making a batch costs next to nothing."""

    def __init__(self):
        self.specs = {"image": Spec((SIDE, SIDE, 3), np.uint8), "label": Spec((), np.int32)}
        self._image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)

    def __call__(self, record: Record, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """See :class:`tokenvit_jax.data.Examples`."""
        return {"image": self._image, "label": np.int32(record["label"])}

    def empty(self) -> dict[str, np.ndarray]:
        """See :class:`tokenvit_jax.data.Examples`."""
        return self(Record(label=0), None)


def make_batches(case: str, batch_size: int) -> Batches:
    """Returns the batches of a case, with the augmentation of DGT's recipe."""
    config = default_config("classification")
    config.update(image_size=SIDE, batch_size=batch_size)
    config.augment.update(crop_scale=(0.08, 1.0), flip=0.5, erasing=0.25)
    config.augment.randaugment.num_ops = 2
    source = JpegSource() if case == "jpeg" else open_split(config, "train")
    if case == "transport":
        examples = OneImage()
    else:
        examples = ClassificationExamples(config, builtin_info("digits"), train=True)
    return train_batches(source, examples, config)


def open_ours(batches: Batches, workers: int = WORKERS) -> Iterator:
    """Starts the pool of `tokenvit_jax.data.workers`."""
    return iter(Batches(batches._batches, batches._specs, workers))


def open_grain(batches: Batches, workers: int = WORKERS) -> Iterator:
    """Starts grain's process prefetch, which has all arrays in shared memory."""
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    ours = batches._batches  # of the one process
    return iter(ours._parent.batch(ours._size).to_iter_dataset(read).mp_prefetch(options))


POOLS = {"ours": open_ours, "grain": open_grain}


def time_batches(pool: str, batches: Batches, count: int) -> tuple[float, float]:
    """Returns the wall time and the CPU time of all processes per batch [s]."""
    with contextlib.closing(POOLS[pool](batches)) as iterator:
        for _ in range(WARMUP):
            next(iterator)
        start, cpu = time.perf_counter(), _cpu_seconds()
        for _ in range(count):
            next(iterator)["image"].max()  # reads every page, as the transfer to a device does
        return (time.perf_counter() - start) / count, (_cpu_seconds() - cpu) / count


def _cpu_seconds() -> float:
    pids = [os.getpid(), *_children()]
    stats = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in pids]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def _children() -> list[int]:
    """Returns the ids of the workers that this process has started."""
    tasks = Path("/proc/self/task").glob("*/children")
    pids = [pid for task in tasks for pid in task.read_text().split()]
    # Python starts one more process for grain's shared memory.
    started = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in pids}
    return [pid for pid, command in started.items() if "resource_tracker" not in command]


def measure_ratios(case: str, batch_size: int, turns: int) -> np.ndarray:
    """Returns wall time and CPU time per batch of every turn, grain / ours, (turns, 2)."""
    batches = make_batches(case, batch_size)
    times = {pool: [] for pool in POOLS}
    for turn in range(turns):
        for pool in sorted(POOLS, reverse=bool(turn % 2)):
            times[pool].append(time_batches(pool, batches, TIMED[case]))
            print(case, pool, *times[pool][-1], flush=True)
    return np.array(times["grain"]) / np.array(times["ours"])


def are_equal(batches: Batches) -> bool:
    """Returns whether both pools give the same batches in the same order."""
    found = []
    for open_pool in POOLS.values():
        with contextlib.closing(open_pool(batches)) as iterator:
            found.append([copy_batch(next(iterator)) for _ in range(5)])
    return all((x[name] == y[name]).all() for x, y in zip(*found, strict=True) for name in x)


def copy_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a copy of a batch that does not need the pool's memory."""
    return {name: np.array(array) for name, array in batch.items()}


def state(pool: str, batches: Batches, workers: int) -> dict:
    """Returns the state of a pool's iterator after three batches."""
    with contextlib.closing(POOLS[pool](batches, workers)) as iterator:
        for _ in range(3):
            next(iterator)
        return iterator.get_state()


def count_orphans(pool: str) -> int:
    """Returns how many workers still run some seconds after their parent was killed."""
    command = [sys.executable, "-m", "experiments.input_pipeline.worker_pool", f"--kill={pool}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        workers = [Path(f"/proc/{pid}") for pid in process.stdout.readline().split()]
        process.wait()
    assert len(workers) == WORKERS
    time.sleep(PAUSE)
    orphans = [worker for worker in workers if worker.exists()]
    for orphan in orphans:
        os.kill(int(orphan.name), signal.SIGKILL)
    return len(orphans)


def kill_parent(pool: str) -> None:
    """Starts a pool, prints the ids of its workers and kills this process."""
    iterator = POOLS[pool](make_batches("transport", 64))
    for _ in range(3):
        next(iterator)
    print(*_children(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def write_page(
    ratios: dict[str, np.ndarray], equal: bool, independent: dict, orphans: dict
) -> None:
    """Writes the page of this script.

    Args:
      ratios: case -> wall time and CPU time of every turn, grain / ours, (turns, 2).
      equal: whether both pools give the same batches.
      independent: pool -> whether its state does not depend on the number of workers.
      orphans: pool -> workers that outlive a killed parent.
    """
    lines = pages.heading(
        "The pool of workers against grain's process prefetch",
        __file__,
        f"""Time per batch of 512 images of 224 x 224 pixels with {WORKERS} workers, grain 0.2.18
        divided by ours, in turns: above 1, grain is slower. Median, lowest and highest of the
        turns; other work ran on the machine. "jpeg": synthetic files of 500 x
        375 pixels, decoded and augmented by DGT's recipe. "digits": the embedded digits with the
        same augmentation. "transport": one image in all places of a batch, so that nearly all
        of the time is the way from the workers to the training process.""",
    )
    rows = [[case, *map(_spread, found.T)] for case, found in ratios.items()]
    lines += ["", *markdown_table(["batches", "time", "CPU time"], rows), ""]
    rows = [
        ["same batches in the same order", *[_yes_or_no(equal)] * 2],
        ["state independent of the number of workers", *map(_yes_or_no, independent.values())],
        [f"workers that outlive a killed parent (of {WORKERS})", *orphans.values()],
    ]
    lines += markdown_table(["", *independent], rows)
    pages.write(__file__, lines)


def _spread(values: np.ndarray) -> str:
    return f"{np.median(values):.2f} ({values.min():.2f} to {values.max():.2f})"


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def main(flag_values: flags.FlagValues) -> None:
    """Measures all cases and writes the page."""
    if flag_values.kill:
        kill_parent(flag_values.kill)
    small = make_batches("digits", 8)
    equal = are_equal(small)
    independent = {pool: state(pool, small, 1) == state(pool, small, 2) for pool in POOLS}
    orphans = {pool: count_orphans(pool) for pool in POOLS}
    size, turns = flag_values.batch_size, flag_values.turns
    ratios = {case: measure_ratios(case, size, turns) for case in TIMED}
    write_page(ratios, equal, independent, orphans)


if __name__ == "__main__":
    # Imported: the workers find the classes of a module, but not those of a program.
    from experiments.input_pipeline import worker_pool

    cli.run(worker_pool.main, worker_pool.FLAGS)
