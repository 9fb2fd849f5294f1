"""Writes small archives in ImageNet's layout, with real JPEG, PNG and CMYK files."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

# The classes of the first three validation images, in the order of the labels.
CLASSES = ("n01751748", "n02105855", "n09193705")
LABELS = (65, 230, 970)
IMAGES_PER_CLASS = 4
VALIDATION_LABELS = (65, 970, 230)  # of ILSVRC2012_val_00000001.JPEG and its successors

# Files that tests replace with unreadable ones.
TRUNCATED = "n02105855_1.JPEG"
BROKEN = "ILSVRC2012_val_00000002.JPEG"


def encode(seed: int, *, mode: str = "RGB", file_format: str = "JPEG") -> bytes:
    """Returns the contents of an image file: smooth noise, 60 x 48 pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((60, 48), Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def write_archives(folder: Path, corrupt: dict[str, bytes] | None = None) -> None:
    """Writes both archives; `corrupt` maps names of files to other contents."""
    corrupt = corrupt or {}
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for c, wordnet_id in enumerate(CLASSES):
            names = [f"{wordnet_id}_{i}.JPEG" for i in range(IMAGES_PER_CLASS)]
            files = {name: encode(10 * c + i) for i, name in enumerate(names)}
            if c == 0:
                files[names[0]] = encode(0, mode="CMYK")
                files[names[1]] = encode(1, file_format="PNG")
                files[names[2]] = encode(2, mode="L")
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for name, content in files.items():
                    add(inner, name, corrupt.get(name, content))
            add(outer, f"{wordnet_id}.tar", buffer.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        # Not in the order of the numbers, as in the real archive.
        for number in (2, 1, 3):
            name = f"ILSVRC2012_val_{number:08d}.JPEG"
            add(tar, name, corrupt.get(name, encode(100 + number)))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file to an archive."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
