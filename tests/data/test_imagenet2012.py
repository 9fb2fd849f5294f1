import copy
import gzip
import io
import logging
import resource
import shutil
import signal
import sys
import tarfile

import imagenet_archives
import numpy as np
import pytest
from batches import eval_dataset, train_dataset
from imagenet_archives import (
    BROKEN,
    CLASSES,
    IMAGES_PER_CLASS,
    LABELS,
    TRUNCATED,
    VALIDATION_LABELS,
    encode,
)
from make_task import open_dataset
from shipped_configs import load_config

from tokenvit_jax import cli, prepare
from tokenvit_jax.data.datasets import imagenet2012
from tokenvit_jax.errors import UserError


@pytest.fixture
def config(prepared):
    config = load_config("dgt_t")
    config.data.data_dir = str(prepared)
    config.data.workers = 0
    config.image_size = 32
    config.batch_size = 12
    config.data.eval_batch_size = 2
    return config


def records(prepared, split):
    """Returns {file name: (index, label, encoded image)}."""
    source = open_dataset("imagenet2012", split, str(prepared))
    raw = [source._records[i] for i in range(len(source))]
    return {r["file_name"].decode(): (i, r["label"], r["image"]) for i, r in enumerate(raw)}


def test_all_images_are_stored_as_they_are_with_their_labels(prepared):
    train = records(prepared, "train")
    assert len(train) == len(CLASSES) * IMAGES_PER_CLASS
    for wordnet_id, label in zip(CLASSES, LABELS, strict=True):
        for i in range(IMAGES_PER_CLASS):
            assert train[f"{wordnet_id}_{i}.JPEG"][1] == label
    assert train["n02105855_3.JPEG"][2] == encode(13)
    validation = records(prepared, "validation")
    for number, label in enumerate(VALIDATION_LABELS, 1):
        assert validation[f"ILSVRC2012_val_{number:08d}.JPEG"][1] == label


def test_training_reads_every_kind_of_file(config):
    config.data.on_corrupt = "skip"
    batch = next(iter(train_dataset(config)))
    assert batch["image"].shape == (12, 32, 32, 3)
    assert batch["skipped"].sum() == 1
    assert np.bincount(batch["label"])[list(LABELS)].sum() == 12


def test_truncated_image_names_split_index_and_file(config, prepared):
    index = records(prepared, "train")[TRUNCATED][0]
    with pytest.raises(UserError) as error:
        next(iter(train_dataset(config)))
    message = str(error.value)
    assert f"imagenet2012 split 'train', record {index} ({TRUNCATED}): cannot decode" in message
    assert "\n" not in message and message.endswith('data.on_corrupt="skip" passes over it')


def test_evaluation_masks_a_broken_image(config, prepared, caplog):
    index = records(prepared, "validation")[BROKEN][0]
    config.data.on_corrupt = "skip"
    with caplog.at_level(logging.WARNING):
        batches = list(eval_dataset(config))
    masks = np.concatenate([batch["mask"] for batch in batches])
    np.testing.assert_array_equal(masks, [i != index for i in range(3)] + [0])
    (message,) = caplog.messages
    assert f"skipped imagenet2012 split 'validation', record {index} ({BROKEN})" in message


def test_damaged_record_file_names_the_record(prepared, tmp_path):
    source_dir = prepared / "imagenet2012" / "5.1.0"
    target_dir = tmp_path / "imagenet2012" / "5.1.0"
    target_dir.mkdir(parents=True)
    for file in source_dir.iterdir():
        content = bytearray(file.read_bytes())
        if "train.array_record" in file.name:
            content[2000] ^= 255
        (target_dir / file.name).write_bytes(content)
    source = open_dataset("imagenet2012", "train", str(tmp_path))
    messages = []
    for index in range(len(source)):
        try:
            source.read(index)
        except UserError as error:
            assert f"imagenet2012 split 'train', record {index} (" in str(error)
            messages.append(str(error))
    assert any("hash mismatch" in message for message in messages)


def test_missing_archives_are_named(tmp_path, archives):
    with pytest.raises(UserError) as error:
        imagenet2012.prepare(tmp_path, tmp_path / "out")
    for part in ("ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar", "image-net.org", tmp_path):
        assert str(part) in str(error.value)
    (tmp_path / "ILSVRC2012_img_train.tar").symlink_to(archives / "ILSVRC2012_img_train.tar")
    with pytest.raises(UserError, match=r"^ILSVRC2012_img_val.tar not found"):
        imagenet2012.prepare(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
def test_cut_archive_is_named_and_leaves_nothing_prepared(tmp_path, archives, name):
    for archive in archives.iterdir():
        content = archive.read_bytes()
        # Cuts the last image in its middle.
        last = content.rindex(b"\xff\xd8\xff")
        (tmp_path / archive.name).write_bytes(
            content[: last + 100] if archive.name == name else content
        )
    with pytest.raises(UserError, match=f"{name} is damaged or not downloaded completely"):
        imagenet2012.prepare(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="not found in"):
        open_dataset("imagenet2012", "train", str(tmp_path / "out"))


def test_foreign_archive_is_refused(tmp_path, archives):
    for name, other in (("train", "val"), ("val", "train")):
        (tmp_path / f"ILSVRC2012_img_{name}.tar").symlink_to(
            archives / f"ILSVRC2012_img_{other}.tar"
        )
    with pytest.raises(UserError, match=r"expected one archive per class, such as 'n01440764.tar'"):
        imagenet2012.prepare(tmp_path, tmp_path / "out")


def unpack(archives, folder):
    """Unpacks the archives into train/CLASS and val, beside hidden files."""
    with tarfile.open(archives / "ILSVRC2012_img_train.tar") as tar:
        for member in tar:
            with tarfile.open(fileobj=tar.extractfile(member)) as inner:
                inner.extractall(folder / "train" / member.name.removesuffix(".tar"), filter="data")
    with tarfile.open(archives / "ILSVRC2012_img_val.tar") as tar:
        tar.extractall(folder / "val", filter="data")
    for path in ("train/n02105855/._n02105855_0.JPEG", "val/.DS_Store", "val/._a.JPEG"):
        (folder / path).write_bytes(bytes(4))


def test_unpacked_folders_give_the_same(archives, prepared, tmp_path):
    unpack(archives, tmp_path)
    imagenet2012.prepare(tmp_path, tmp_path / "out")
    for split in ("train", "validation"):
        expected, found = (records(folder, split) for folder in (prepared, tmp_path / "out"))
        assert found == expected
    for number, label in enumerate(VALIDATION_LABELS, 1):  # a folder per class
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        folder = tmp_path / "val" / CLASSES[LABELS.index(label)]
        folder.mkdir(exist_ok=True)
        (tmp_path / "val" / name).rename(folder / name)
    imagenet2012.prepare(tmp_path, tmp_path / "again")
    assert records(tmp_path / "again", "validation") == expected
    (tmp_path / "train" / "cats").mkdir()
    with pytest.raises(UserError, match="train contains the folder 'cats'; expected one per class"):
        imagenet2012.prepare(tmp_path, tmp_path / "other")


def repack(archives, folder, change):
    """Writes the archives again; `change` maps the members of a class to others."""
    source, target = (f / "ILSVRC2012_img_train.tar" for f in (archives, folder))
    with tarfile.open(source) as tar, tarfile.open(target, "w") as outer:
        outer.addfile(directory("./"))
        for member in tar:
            with tarfile.open(fileobj=tar.extractfile(member)) as inner:
                files = [(file.name, inner.extractfile(file).read()) for file in inner]
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                inner.addfile(directory(member.name.removesuffix(".tar")))
                for name, content in change(files):
                    imagenet_archives.add(inner, name, content)
            imagenet_archives.add(outer, f"./{member.name}", buffer.getvalue())
    (folder / "ILSVRC2012_img_val.tar").symlink_to(archives / "ILSVRC2012_img_val.tar")


def directory(name):
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def test_archives_with_folders_and_hidden_files(archives, prepared, tmp_path):
    def change(files):
        others = [("class/._a", b"1"), ("class/readme.txt", b"in every class")]
        return [(f"class/{name}", content) for name, content in files] + others

    repack(archives, tmp_path, change)
    imagenet2012.prepare(tmp_path, tmp_path / "out")
    assert records(tmp_path / "out", "train") == records(prepared, "train")


def test_a_file_that_is_there_twice_is_named(archives, tmp_path):
    repack(archives, tmp_path, lambda files: [*files, files[0]])
    with pytest.raises(
        UserError, match=r"train.tar contains 'n01751748_0.JPEG' in n01751748.tar, .*twice"
    ):
        imagenet2012.prepare(tmp_path, tmp_path / "out")


def link(name, target="n01751748_1.JPEG", kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def write_validation(folder, archives, members):
    """Writes an archive of validation images beside the training images."""
    folder.mkdir()
    train = "ILSVRC2012_img_train.tar"
    (folder / train).symlink_to(archives / train)
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for member in members:
            if isinstance(member, str):
                imagenet_archives.add(tar, member, b"" if "empty" in member else encode(1))
            else:
                tar.addfile(member)


VAL = "ILSVRC2012_val_00000001.JPEG"


@pytest.mark.parametrize(
    "members",
    [
        [f"/etc/{VAL}"],
        [f"../../{VAL}"],
        ["__MACOSX/._a", ".DS_Store", "val/Thumbs.db", VAL.replace("JPEG", "jpg")],
    ],
)
def test_names_in_archives_are_no_paths(archives, tmp_path, members):
    write_validation(tmp_path / "downloads", archives, members)
    imagenet2012.prepare(tmp_path / "downloads", tmp_path)
    assert len(records(tmp_path, "validation")) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["downloads", "imagenet2012"]


@pytest.mark.parametrize(
    "members, message",
    [
        ([VAL, VAL], "val.tar contains 'ILSVRC2012_val_00000001.JPEG', which is there twice; down"),
        ([VAL, "readme.txt"], "contains 'readme.txt'; expected ILSVRC2012_val_00000001.JPEG to"),
        (["ILSVRC2012_val_00050001.JPEG"], "expected ILSVRC2012_val_00000001.JPEG to ILSVRC2012_v"),
        (["empty.JPEG"], "contains 'empty.JPEG', which is empty; download it again"),
        ([], "there is no image for the split 'validation' among the original files"),
        ([link(VAL)], "contains 'ILSVRC2012_val_00000001.JPEG', which is a link or a device"),
        ([VAL, link("b.JPEG", VAL, tarfile.LNKTYPE)], "contains 'b.JPEG', which is a link or"),
        ([link("a.JPEG", kind=tarfile.FIFOTYPE)], "contains 'a.JPEG', which is a link or a device"),
    ],
)
def test_members_that_are_no_images_are_named(archives, tmp_path, members, message):
    write_validation(tmp_path / "downloads", archives, members)
    with pytest.raises(UserError) as error:
        imagenet2012.prepare(tmp_path / "downloads", tmp_path)
    assert message in str(error.value)
    with pytest.raises(UserError, match="not found in"):  # nothing half prepared is left
        open_dataset("imagenet2012", "train", str(tmp_path))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda content, end: b"", "empty file"),
        (lambda content, end: b"words" * 300, "invalid header"),
        (lambda content, end: gzip.compress(content), "invalid header"),
        (lambda content, end: content[: end - 600], "unexpected end of data"),
        (lambda content, end: content[:end], "no end at byte"),  # between two images
        (lambda content, end: content[: end + 100], "no end at byte"),  # in a header
        (lambda content, end: content[:end] + b"x" * 9 + content[end + 9 :], "no end at byte"),
    ],
)
def test_damaged_archives_are_never_read_in_part(archives, tmp_path, change, reason):
    """For tarfile, a damaged header is the end of the archive."""
    write_validation(tmp_path / "downloads", archives, [VAL, VAL.replace("1.", "2.")])
    archive = tmp_path / "downloads" / "ILSVRC2012_img_val.tar"
    with tarfile.open(archive) as tar:
        end = tar.getmembers()[1].offset
    archive.write_bytes(change(archive.read_bytes(), end))
    with pytest.raises(UserError, match=f"val.tar is damaged or not downloaded .*{reason}"):
        imagenet2012.prepare(tmp_path / "downloads", tmp_path)


def test_damaged_archive_of_a_class_is_named(archives, tmp_path):
    folder = tmp_path / "downloads"
    folder.mkdir()
    (folder / "ILSVRC2012_img_val.tar").symlink_to(archives / "ILSVRC2012_img_val.tar")
    for content, reason in ((b"words" * 300, "invalid header in"), (b"", "")):
        with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as tar:
            imagenet_archives.add(tar, "n01751748.tar", content)
        with pytest.raises(UserError, match=rf"img_train.tar .*{reason}.*n01751748.tar"):
            imagenet2012.prepare(folder, tmp_path)


def test_compressed_archives_are_found(archives, tmp_path):
    for suffix in ("tar.gz", "zip"):
        archive = tmp_path / f"ILSVRC2012_img_train.{suffix}"
        archive.write_bytes(b"")
        with pytest.raises(UserError, match=rf"val.tar not found in .*, only {archive.name}; reg"):
            imagenet2012.prepare(tmp_path, tmp_path)
        archive.unlink()


def test_damaged_data_are_not_called_prepared(prepared, monkeypatch, capsys, tmp_path):
    shutil.copytree(prepared / "imagenet2012", tmp_path / "imagenet2012")
    next(tmp_path.rglob("*validation.array_record*")).unlink()
    assert run_command(monkeypatch, "imagenet2012", f"--data_dir={tmp_path}") == 1
    assert "-00000-of-00001 is missing; delete" in capsys.readouterr().err


def test_folders_that_cannot_be_written(archives, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = f"--manual_dir={archives}", f"--data_dir={tmp_path / 'file'}"
    assert run_command(monkeypatch, "imagenet2012", *arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: --data_dir={tmp_path}/file is a file; valid: a folder"


def test_a_full_disk_leaves_nothing(archives, tmp_path):
    """A limit for files stands for the disk: the writer in C++ sees the same kind of error."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"be written: Failed to finalize .*File too larg"):
            imagenet2012.prepare(archives, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list((tmp_path / "imagenet2012").iterdir())
    (tmp_path / "imagenet2012" / "incomplete.ABCDEF_5.1.0").mkdir()
    imagenet2012.prepare(archives, tmp_path)
    assert len(records(tmp_path, "train")) == len(CLASSES) * IMAGES_PER_CLASS


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        cli.run(prepare.main, copy.deepcopy(prepare.FLAGS), positional=("DATASET",))
    return exit_info.value.code


def test_command_prepares_once(monkeypatch, capsys, tmp_path):
    imagenet_archives.write_archives(tmp_path / "downloads" / "manual")
    assert run_command(monkeypatch, "imagenet2012", f"--data_dir={tmp_path}") == 0
    folder = tmp_path / "imagenet2012" / "5.1.0"
    out = capsys.readouterr().out
    assert f"imagenet2012 is prepared in {folder}" in out
    assert "validation: 3 records, not 50,000" in out
    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert run_command(monkeypatch, "imagenet2012", f"--data_dir={tmp_path}") == 0
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == written


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        ([], 2, "argument DATASET is missing"),
        (["digits", "more"], 2, "unexpected argument 'more'"),
        (["imagenet2012", "--manual=x"], 2, "Unknown command line flag 'manual'"),
        (["imagenet"], 1, "no dataset 'imagenet' (did you mean 'imagenet2012'?)"),
        (["imagenet2012", "--manual_dir=/nowhere"], 1, "not found in --manual_dir=/nowhere"),
    ],
)
def test_wrong_command_gives_one_line(monkeypatch, capsys, tmp_path, arguments, status, message):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_command(monkeypatch, *arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("name", ["digits", "scenes"])
def test_embedded_dataset_needs_no_preparation(monkeypatch, capsys, name):
    assert run_command(monkeypatch, name) == 0
    assert "nothing to prepare" in capsys.readouterr().out
