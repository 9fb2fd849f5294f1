"""Predicts image files with a run: pictures of each, and one table of all results."""

import contextlib
import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tokenvit_jax.data.person_boxes import read_boxes
from tokenvit_jax.errors import UserError
from tokenvit_jax.models.backbone import backbone_of
from tokenvit_jax.output import (
    Log,
    check_file,
    figure_bytes,
    identities,
    is_one_of,
    shown,
    write_file,
)
from tokenvit_jax.pictures import attention as attention_pictures
from tokenvit_jax.pictures.draw import as_rgb
from tokenvit_jax.training.run import Run
from tokenvit_jax.training.workdir import read_file

_NUM_REPORTED = 3  # unreadable files that the error names
_MARK = "tokenvit_jax predict"  # in every picture, which a later call may then replace
_MAX_BYTES = 200  # of the name of an image in the names of its pictures; file systems allow 255


class Table:
    """A file with a row per image, which is complete after every row.

    The suffix of the path decides the format. ".json": a list of objects. ".csv": nested entries
    become columns with dots in their names, such as "probabilities.cat", as in
    `pandas.json_normalize`; lists of objects are texts in JSON. The file is made for the first
    row, and replaces an earlier table.
    """

    def __init__(
        self, path: Path, inputs: Iterable[Path] = (), *, flag: str = "--results",
        first: str = "image",
    ):  # fmt: skip
        """Checks the path.

        Args:
          path: the file.
          inputs: files that it must not replace.
          flag: the flag that names the file, for messages.
          first: name of the first entry of every row.

        Raises:
          UserError: the suffix is another one, the path cannot be written, or it holds a file that
            is no table of this class.
        """
        if path.suffix not in (".json", ".csv") or os.path.isdir(path):
            raise UserError(f"{flag}={path} is not valid; valid: a file NAME.json or NAME.csv")
        check_file(path, flag, inputs)
        self.path, self._log = path, None
        self._columns: list[str] = []  # of the .csv file
        self._is_json = path.suffix == ".json"
        begin = f'[\n{{"{first}":'.encode() if self._is_json else f"{first},".encode()
        if os.path.exists(path) and read_file(path)[: len(begin)] not in (b"", begin):
            raise UserError(f"{flag}={path} is a file, but no table of results; valid: a new one")

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes the next row; all rows have the same entries.

        Raises:
          UserError: the row cannot be written; the file is as before.
        """
        first = self._log is None
        content = self._json(row, first) if self._is_json else self._csv(flatten(row), first)
        if first:
            end = b"\n]\n" if self._is_json else b""
            write_file(self.path, content + end)
            self._log = Log(self.path, end)
        else:
            self._log.append(content)

    def close(self) -> None:
        """Closes the file."""
        if self._log is not None:
            self._log.close()

    def _json(self, row: Mapping[str, Any], first: bool) -> bytes:
        try:
            content = json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # the name of a file is no text; as escapes it can be read again
            content = json.dumps(row).encode()
        return (b"[\n" if first else b",\n") + content

    def _csv(self, row: Mapping[str, Any], first: bool) -> bytes:
        lines = io.StringIO()
        if first:
            self._columns = list(row)
        writer = csv.DictWriter(lines, self._columns)
        if first:
            writer.writeheader()
        writer.writerow(row)
        return lines.getvalue().encode(errors="backslashreplace")


def flatten(row: Mapping[str, Any] | list[Any], prefix: str = "") -> dict[str, Any]:
    """Returns a row without nesting; names and positions in lists are joined by dots.

    A list of objects, of which every image has another number, becomes its JSON text.
    """
    items = row.items() if isinstance(row, Mapping) else enumerate(row)
    flat = {}
    for key, value in items:
        name = f"{prefix}{key}"
        if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
            flat[name] = json.dumps(value, ensure_ascii=False)
        else:
            nested = isinstance(value, Mapping | list)
            flat |= flatten(value, f"{name}.") if nested else {name: value}
    return flat


def predict_files(
    run: Run, files: Sequence[Path], out: Path, table: Table, *, attention: bool = False,
    boxes: Sequence[np.ndarray] | None = None, persons: Table | None = None,
) -> Iterator[str]:  # fmt: skip
    """Predicts files one after another, and yields a line about each.

    Memory does not grow with the number of files. Files that cannot be read are passed over and
    reported at the end. A picture replaces nothing but a picture of an earlier call.

    Args:
      run: the trained model.
      files: image files.
      out: folder that receives the pictures; made for the first one.
      table: receives a row per image, and is closed at the end.
      attention: whether to draw the attention of the model, too.
      boxes: for every file the boxes (n, 5) that the predictor of such a task takes: x1 y1 x2 y2
        [pixels] and score; None: there are none.
      persons: receives a row in COCO's format for every person, and is closed at the end; None:
        there is no such table.

    Raises:
      UserError: at the end, if a file could not be read; or the model has no attention to draw, or
        a result cannot be written.
    """
    predictor = run.predictor  # first: what is wrong with it is wrong with no file
    unread, names = [], picture_names(files)
    folder = _PictureFolder(out, files, names)
    with contextlib.ExitStack() as stack:
        for output in (table, persons):
            if output is not None:
                stack.enter_context(contextlib.closing(output))
        for place, (file, name) in enumerate(zip(files, names, strict=True)):
            try:
                image = run.read(file)
                prediction = predictor(image, *(() if boxes is None else (boxes[place],)))
            except UserError as error:
                named = str(error) if str(file) in str(error) else f"{file}: {error}"
                unread.append(named if len(unread) < _NUM_REPORTED else "")
                continue
            drawn = prediction.draw(shown(file.name))
            if attention:
                drawn |= _draw_attention(run, image, shown(file.name))
            paths = folder.save(drawn, name)
            pictures = {k: os.path.relpath(path, table.path.parent) for k, path in paths.items()}
            table.add({"image": str(file), **prediction.row, "pictures": pictures})
            for person in prediction.row["persons"] if persons else ():
                persons.add({"image_id": image_id(file), **person})
            saved = "".join(f" {shown(path)}" for path in paths.values())
            yield f"{shown(file)}: {prediction.text}" + (f" ->{saved}" if saved else "")
    if unread:
        raise UserError(_describe_unread(unread, len(files)))


def image_id(file: Path) -> int | str:
    """Returns the identifier of an image file in COCO's format: its name without the suffix.

    A name of digits is a number: 139 for 000000000139.jpg.
    """
    return _identifier(file.stem)


def _identifier(name: int | str) -> int | str:
    return int(name) if isinstance(name, str) and name.isdecimal() else name


def boxes_of_files(boxes: str | Path, files: Sequence[Path]) -> list[np.ndarray]:
    """Returns the boxes of persons in every image file, (n, 5): x1 y1 x2 y2 [pixels] and score.

    Args:
      boxes: file of boxes, see :func:`tokenvit_jax.data.person_boxes.read_boxes`; its identifiers
        of images are results of :func:`image_id`, or such names.
      files: image files.

    Raises:
      UserError: the file is not valid, or has no box for any of the images.
    """
    by_image: dict[int | str, list[np.ndarray]] = {}
    for found in read_boxes(boxes):
        row = np.append(found.box, np.float32(found.score))
        by_image.setdefault(_identifier(found.image), []).append(row)
    rows = [np.reshape(by_image.get(image_id(file), []), (-1, 5)) for file in files]
    if not any(map(len, rows)):
        raise UserError(
            f"--boxes={boxes} has no box for any of the images; valid: image_id is the name of a "
            f"file without its suffix, such as {image_id(files[0])!r}"
        )
    return rows


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
        view = as_rgb(run.task.view(image))
        return attention_pictures.draw(view, blocks, backbone.settings, by_class_token, caption)
    except UserError as error:
        raise UserError(f"--attention: {error}") from error


def picture_names(files: Sequence[Path]) -> list[str]:
    """Returns a name for each file's pictures, different even where case does not count.

    The name is the file's own without suffix; files of the same name get their place in the list,
    and long names are cut.
    """
    stems = [_shortened(file.stem) for file in files]
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


def _shortened(stem: str) -> str:
    """Returns a name, cut to the bytes that leave space for the kind of a picture and a number."""
    while len(os.fsencode(stem)) > _MAX_BYTES:
        stem = stem[:-1]
    return stem


class _PictureFolder:
    """Writes the pictures of images into a folder; replaces only pictures that it has written."""

    def __init__(self, out: Path, files: Sequence[Path], names: Sequence[str]):
        self._out, self._inputs = out, identities(files)
        self._names = set(map(str.casefold, names))

    def save(self, drawn: Mapping[str, Figure | Image.Image], name: str) -> dict[str, Path]:
        """Writes the pictures of an image, and returns their paths.

        Args:
          drawn: pictures by kind.
          name: name of the image, a result of :func:`picture_names`.
        """
        paths, number = self._paths(drawn, name), 1
        while any(map(self._is_taken, paths.values())):
            number += 1
            if f"{name}_{number}".casefold() not in self._names:
                paths = self._paths(drawn, f"{name}_{number}")
        for kind, picture in drawn.items():
            write_file(paths[kind], _as_png(picture))
        return paths

    def _paths(self, kinds: Iterable[str], name: str) -> dict[str, Path]:
        return {kind: self._out / f"{name}_{kind}.png" for kind in kinds}

    def _is_taken(self, path: Path) -> bool:
        """Returns whether a path leads to an image that is read, or to a file of the user."""
        if not os.path.lexists(path):
            return False
        if is_one_of(path, self._inputs) or not path.is_file():
            return True
        with path.open("rb") as file:
            return _MARK.encode() not in file.read(2048)  # the mark precedes the pixels


def _as_png(picture: Figure | Image.Image) -> bytes:
    """Returns a PNG file with a mark."""
    if isinstance(picture, Figure):
        return figure_bytes(picture, "png", {"Software": _MARK})
    content, info = io.BytesIO(), PngInfo()
    info.add_text("Software", _MARK)
    picture.save(content, "PNG", pnginfo=info)
    return content.getvalue()
