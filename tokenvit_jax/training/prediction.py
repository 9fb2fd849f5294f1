"""Predicts image files with a run: pictures of each, and one table of all results."""

import contextlib
import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from tokenvit_jax.errors import UserError
from tokenvit_jax.models.backbone import backbone_of
from tokenvit_jax.pictures import attention as attention_pictures
from tokenvit_jax.training.run import Run

_NUM_REPORTED = 3  # unreadable files that the error names


class Table:
    """A file with a row per image, written row by row.

    The suffix of the path decides the format. ".json": a list of objects, complete after
    :meth:`close`. ".csv": nested entries become columns with dots in their names, such as
    "probabilities.cat", as in `pandas.json_normalize`. The file is made for the first row.

    Raises:
      UserError: the suffix is another one, or the path is a folder.
    """

    def __init__(self, path: Path):
        if path.suffix not in (".json", ".csv") or path.is_dir():
            raise UserError(f"--results={path} is not valid; valid: a file NAME.json or NAME.csv")
        self.path, self._file, self._writer = path, None, None

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes the next row; all rows have the same entries."""
        first = self._file is None
        if first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", newline="", encoding="utf-8", errors="surrogateescape")
        if self.path.suffix == ".json":
            self._file.write(("[\n" if first else ",\n") + json.dumps(row, ensure_ascii=False))
        else:
            flat = flatten(row)
            if first:
                self._writer = csv.DictWriter(self._file, list(flat))
                self._writer.writeheader()
            self._writer.writerow(flat)
        self._file.flush()

    def close(self) -> None:
        """Completes the file."""
        if self._file is None:
            return
        if self.path.suffix == ".json":
            self._file.write("\n]\n")
        self._file.close()


def flatten(row: Mapping[str, Any] | list[Any], prefix: str = "") -> dict[str, Any]:
    """Returns a row without nesting; names and positions in lists are joined by dots."""
    items = row.items() if isinstance(row, Mapping) else enumerate(row)
    flat = {}
    for key, value in items:
        nested = isinstance(value, Mapping | list)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def predict_files(
    run: Run, files: Sequence[Path], out: Path, table: Table, *, attention: bool = False
) -> Iterator[str]:
    """Predicts files one after another, and yields a line about each.

    Memory does not grow with the number of files. Files that cannot be read are passed over and
    reported at the end.

    Args:
      run: the trained model.
      files: image files.
      out: folder that receives the pictures; made for the first one.
      table: receives a row per image, and is closed at the end.
      attention: whether to draw the attention of the model, too.

    Raises:
      UserError: at the end, if a file could not be read; or the model has no attention to draw.
    """
    unread = []
    with contextlib.closing(table):
        for file, name in zip(files, picture_names(files), strict=True):
            try:
                image = run.read(file)
            except UserError as error:
                unread.append(str(error))
                continue
            prediction = run.predictor(image)
            drawn = prediction.draw(file.name)
            if attention:
                drawn |= _draw_attention(run, image, file.name)
            paths = _save(drawn, out, name)
            pictures = {k: os.path.relpath(path, table.path.parent) for k, path in paths.items()}
            table.add({"image": str(file), **prediction.row, "pictures": pictures})
            saved = "".join(f" {path}" for path in paths.values())
            yield f"{file}: {prediction.text}" + (f" ->{saved}" if saved else "")
    if unread:
        raise UserError(_describe_unread(unread, len(files)))


def _describe_unread(unread: Sequence[str], num_files: int) -> str:
    if num_files == 1:
        return f"--images: {unread[0]}"
    more = len(unread) - _NUM_REPORTED
    named = "; ".join(unread[:_NUM_REPORTED]) + (f"; and {more} more" if more > 0 else "")
    return f"--images: {len(unread)} of {num_files} cannot be read: {named}"


def _draw_attention(run: Run, image: Image.Image, caption: str) -> dict[str, Figure]:
    """Returns the pictures of the attention in the view that the model sees of an image."""
    backbone = backbone_of(run.model)
    try:
        found = run.attention(image)
        blocks = [block[0] for block in found] if isinstance(found, list) else list(found[0])
        blocks = [np.asarray(block) for block in blocks]
        # Dense tasks and the mean of the patches do not read the class token.
        by_class_token = backbone is run.model and backbone.settings.pool == "token"
        view = run.task.view(image)
        return attention_pictures.draw(view, blocks, backbone.settings, by_class_token, caption)
    except UserError as error:
        raise UserError(f"--attention: {error}") from error


def picture_names(files: Sequence[Path]) -> list[str]:
    """Returns a name for each file's pictures, different even where case does not count.

    The name is the file's own without suffix; files of the same name get their place in the list.
    """
    stems = [file.stem for file in files]
    counts = Counter(map(str.casefold, stems))
    taken = {stem for stem, count in counts.items() if count == 1}
    names = []
    for place, stem in enumerate(stems, start=1):
        name = stem
        if counts[stem.casefold()] > 1:
            while (name := f"{stem}_{place}").casefold() in taken:
                place += len(files)
            taken.add(name.casefold())
        names.append(name)
    return names


def _save(drawn: Mapping[str, Figure | Image.Image], out: Path, name: str) -> dict[str, Path]:
    """Writes the pictures of an image into a folder, and returns their paths."""
    paths = {kind: out / f"{name}_{kind}.png" for kind in drawn}
    for kind, picture in drawn.items():
        out.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, Figure):
            picture.savefig(paths[kind], dpi=150)
        else:
            picture.save(paths[kind])
    return paths
