"""Compares the images per second and core of the input pipeline with timm's.

    python -m experiments.input_pipeline.images_per_second

Needs torch and timm (see the extra `parity`). Both pipelines make batches of the same JPEG files in
this process, which is pinned to one core, and take turns. The result is the ratio of the CPU time
of a turn: the median over the turns, and the lowest and highest, which show the noise. timm's
loader hands over uint8 here, as with its prefetcher, and erases on the device: it has less to do.
"""

import dataclasses
import io
import itertools
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import PIL
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from experiments import pages
from experiments.input_pipeline.worker_pool import SIDE, JpegSource
from tokenvit_jax import cli
from tokenvit_jax.data import (
    builtin_info,
    eval_batches,
    jpeg_regions,
    pixel_ops,
    train_batches,
)
from tokenvit_jax.measure import torch_peers
from tokenvit_jax.measure.report import markdown_table
from tokenvit_jax.tasks import default_config
from tokenvit_jax.tasks.classification.examples import ClassificationExamples

FLAGS = flags.FlagValues()
flags.DEFINE_integer("batch_size", 64, "images of 224 x 224 pixels", flag_values=FLAGS)
flags.DEFINE_integer("turns", 15, "turns of each pipeline", flag_values=FLAGS)

QUALITY = 93  # of the files: 85 kB each, as ImageNet's on average
CASES = {
    "DGT's recipe": "crop, flip, RandAugment, random erasing",
    "crop + flip": "random resized crop and flip",
    "evaluation": "shorter side 256, centre crop",
}


def make_config(case: str, batch_size: int) -> ConfigDict:
    """Returns the config of a case."""
    config = default_config("classification")
    config.update(image_size=SIDE, batch_size=batch_size)
    config.data.eval_batch_size = batch_size
    if case != "evaluation":
        config.augment.update(crop_scale=(0.08, 1.0), flip=0.5)
    if case == "DGT's recipe":
        config.augment.update(erasing=0.25)
        config.augment.randaugment.num_ops = 2
    return config


def open_ours(source: JpegSource, case: str, batch_size: int) -> Iterator:
    """Opens the pipeline of this package, without worker processes."""
    config = make_config(case, batch_size)
    train = case != "evaluation"
    info = dataclasses.replace(builtin_info("digits"), center_crop=True)
    examples = ClassificationExamples(config, info, train=train)
    batches = (train_batches if train else eval_batches)(source, examples, config)
    # One at a time: the iterators, also grain's, work ahead in threads.
    return map(batches._batches.__getitem__, itertools.count())


class PillowFiles:
    """The files of a source as timm's datasets read them."""

    def __init__(self, source: JpegSource, transform: Callable):
        self._source = source
        self._transform = transform

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image = Image.open(io.BytesIO(self._source.content(index))).convert("RGB")
        while True:
            try:
                return self._transform(image), index % 1000
            except ValueError:  # 1 in 700: timm posterizes to 0 bits, which Pillow 13 refuses
                continue


def open_timm(source: JpegSource, case: str, batch_size: int) -> Iterator:
    """Opens torch's loader with timm's transforms, without worker processes."""
    torch, _ = torch_peers.import_package("timm")
    torch.set_num_threads(1)
    from timm.data import create_transform
    from timm.data.loader import fast_collate

    transform = create_transform(
        (3, SIDE, SIDE),
        is_training=case != "evaluation",
        use_prefetcher=True,  # uint8; normalisation and erasing run on the device
        auto_augment="rand-m9-mstd0.5-inc1" if case == "DGT's recipe" else None,
        color_jitter=None,
        interpolation="bicubic",
        crop_pct=0.875,
    )
    loader = torch.utils.data.DataLoader(
        PillowFiles(source, transform), batch_size, shuffle=True, collate_fn=fast_collate
    )
    return iter(loader)


def measure(case: str, batch_size: int, turns: int) -> dict[str, np.ndarray]:
    """Returns the CPU seconds per image of every turn, by pipeline."""
    source = JpegSource(QUALITY)
    pipelines = {
        "ours": open_ours(source, case, batch_size),
        "timm": open_timm(source, case, batch_size),
    }
    seconds = {name: [] for name in pipelines}
    for turn in range(turns + 1):
        for name in sorted(pipelines, reverse=bool(turn % 2)):
            start = time.process_time()
            next(pipelines[name])
            seconds[name].append((time.process_time() - start) / batch_size)
    return {name: np.array(values[1:]) for name, values in seconds.items()}  # the first warms up


def write_page(found: dict[str, dict[str, np.ndarray]], batch_size: int) -> None:
    """Writes the page of this script: a row per case."""
    kilobytes = np.mean([len(JpegSource(QUALITY).content(index)) for index in range(32)]) / 1000
    modules = {"_jpeg_regions": jpeg_regions, "_pixel_ops": pixel_ops}
    extensions = [f"`{name}`" for name, module in modules.items() if module._extension]
    lines = pages.heading(
        "Images per second and core, against timm's loader",
        __file__,
        f"""CPU time of a batch of {batch_size} images in one process on one core, in turns;
        files of 500 x 375 pixels and {kilobytes:.0f} kB; Pillow {PIL.__version__}; extensions:
        {" and ".join(extensions) or "none"}. timm hands over uint8 and erases on the device; ours
        erases, too. Ratio of the images per second: median, lowest and highest of the turns.
        Other work ran on the machine: the ratios hold, the images per second do not.""",
    )
    rows = [
        [f"{case}: {CASES[case]}"]
        + [f"{1 / np.median(times[name]):.0f}" for name in ("ours", "timm")]
        + [_spread(times["timm"] / times["ours"])]
        for case, times in found.items()
    ]
    lines += ["", *markdown_table(["images", "ours", "timm", "ours / timm"], rows)]
    pages.write(__file__, lines)


def _spread(values: np.ndarray) -> str:
    return f"{np.median(values):.2f} ({values.min():.2f} to {values.max():.2f})"


def main(flag_values: flags.FlagValues) -> None:
    """Measures all cases and writes the page."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    size, turns = flag_values.batch_size, flag_values.turns
    found = {case: measure(case, size, turns) for case in CASES}
    write_page(found, size)


if __name__ == "__main__":
    cli.run(main, FLAGS)
