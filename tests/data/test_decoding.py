"""Files that Pillow opens, refuses, or should not be asked to open."""

import io
import os
import pickle
import struct
import warnings

import damaged_images
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin
from png_file import png

from tokenvit_jax.data import decoding, images
from tokenvit_jax.data.decoding import decode_image, read_image, to_rgb
from tokenvit_jax.errors import UserError


@pytest.fixture(scope="module")
def photo():
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC)


def encode(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------
# Modes
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, file_format",
    [
        ("RGB", "PNG"),
        ("RGB", "JPEG"),
        ("CMYK", "JPEG"),
        ("L", "JPEG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
    ],
)
def test_decode_gives_rgb_and_keeps_alpha(photo, mode, file_format):
    image = decode_image(encode(photo.convert(mode), file_format))
    assert (image.mode, image.size) == ("RGBA" if mode == "RGBA" else "RGB", photo.size)
    image = images.with_channels(image, 3)
    reference = photo.convert("L").convert("RGB") if mode == "L" else photo
    error = np.abs(np.asarray(image, int) - np.asarray(reference, int)).mean()
    assert error < (25 if mode in ("P", "CMYK") else 5)  # a palette has 256 colours; ink is not RGB


@pytest.mark.parametrize("orientation", range(9))
def test_a_rotation_noted_in_exif_is_applied_where_asked(photo, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    encoded = encode(photo, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    np.testing.assert_array_equal(decode_image(encoded, upright=True), expected)
    np.testing.assert_array_equal(decode_image(encoded), photo)


def test_malformed_exif_costs_no_image(photo):
    encoded = encode(photo, "JPEG", exif=b"Exif\0\0no directory")
    assert decode_image(encoded, upright=True).size == photo.size


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_grey_levels_of_16_bits_become_8_bits(file_format):
    ramp = np.tile(np.arange(256, dtype=np.uint16) * 257, (3, 1))
    image = decode_image(encode(Image.fromarray(ramp), file_format))
    np.testing.assert_array_equal(np.asarray(image)[..., 1], ramp // 257)


def test_size_is_no_reason_to_refuse_an_image(photo, monkeypatch):
    """Pillow warns above its limit of pixels and raises above twice the limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80 * 60 // 2 - 1)
    assert decode_image(encode(photo, "PNG")).size == photo.size
    with pytest.raises(UserError):
        decode_image(b"no image")
    assert Image.MAX_IMAGE_PIXELS == 80 * 60 // 2 - 1


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpeg_is_never_half_an_image(photo, progressive):
    encoded = encode(photo, "JPEG", quality=90, progressive=progressive)
    whole = np.asarray(decode_image(encoded))
    errors = 0
    for length in range(0, len(encoded), 37):
        try:
            image = np.asarray(decode_image(encoded[:length]))
        except UserError as error:
            assert f"cannot decode {length} bytes" in str(error)
            errors += 1
        else:  # only bytes after the last pixel were cut off
            np.testing.assert_array_equal(image, whole)
    assert errors >= len(range(0, len(encoded), 37)) - 1


@pytest.mark.parametrize("encoded", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_bytes_that_are_not_an_image_are_refused(encoded):
    with pytest.raises(UserError, match="cannot decode"):
        decode_image(encoded)


MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I;16 I;16L I;16B I"


@pytest.mark.parametrize("mode", MODES.split())
def test_images_of_every_mode_become_rgb(photo, mode):
    if mode in ("La", "I;16L", "I;16B", "I"):
        image = Image.new(mode, photo.size, 40_000 if mode == "I" else None)
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    else:
        image = photo.convert(mode)
    rgb = to_rgb(image)
    assert rgb.mode == ("RGBA" if "a" in mode.lower() and mode != "LAB" else "RGB")
    for file_format in ("PNG", "TIFF", "GIF", "WEBP", "JPEG2000"):
        try:
            encoded = encode(image, file_format)
        except (OSError, ValueError):  # the format has no such mode
            continue
        if (mode, file_format) == ("I", "TIFF"):  # 32 bits
            continue
        found = decode_image(encoded)
        assert found.size == photo.size and found.mode in ("RGB", "RGBA")
        if file_format in ("PNG", "TIFF"):
            error = np.subtract(
                images.with_channels(found, 3), images.with_channels(rgb, 3), dtype=int
            )
            assert np.abs(error).max() <= 2


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "ICO"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_images_can_be_used_after_their_file_is_closed(photo, file_format, mode, tmp_path):
    if (mode, file_format) == ("RGBA", "JPEG"):
        return
    image = photo.resize((64, 64)).convert(mode)
    image.save(tmp_path / "a", file_format)
    found = read_image(tmp_path / "a")
    (tmp_path / "a").unlink()
    pixels = np.asarray(found)
    assert np.asarray(found.resize((5, 4))).shape == (4, 5, len(found.mode))
    np.testing.assert_array_equal(found.copy(), pixels)
    np.testing.assert_array_equal(found.crop((1, 2, 9, 9)), pixels[2:9, 1:9])
    mirrored = found.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    np.testing.assert_array_equal(mirrored, pixels[:, ::-1])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)), pixels)


def test_transparent_colours_of_every_kind(photo):
    grey = np.full((4, 5), 500, np.uint16)
    grey[0] = 60_000
    palette = photo.convert("P")
    for encoded in (
        encode(Image.fromarray(grey), "PNG", transparency=500),
        encode(Image.fromarray((grey // 257).astype(np.uint8)), "PNG", transparency=1),
        encode(photo, "PNG", transparency=photo.getpixel((0, 0))),
        encode(photo.convert("1"), "PNG", transparency=0),
        encode(palette, "PNG", transparency=bytes(range(0, 256, 17)) * 15),
        encode(palette, "GIF", transparency=palette.getpixel((0, 0))),
    ):
        image = decode_image(encoded)
        assert image.mode == "RGBA" and image.getextrema()[3][0] == 0
        # What a model without alpha sees is white there, whatever colour is hidden.
        alpha, rgb = np.asarray(image)[..., 3], np.asarray(images.with_channels(image, 3))
        assert (rgb[alpha == 0] == 255).all()
        assert images.with_channels(image, 1).mode == "L"


def test_half_transparent_pixels_are_blended_and_opaque_ones_kept(photo):
    image = photo.convert("RGBA")
    np.testing.assert_array_equal(images.with_channels(image, 3), photo)
    image.putalpha(51)
    expected = 255 * 0.8 + 0.2 * np.asarray(photo)
    np.testing.assert_allclose(images.with_channels(image, 3), expected, atol=1)


def tiff(levels, **tags):
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        directory[ExifTags.Base[name]] = value
    return encode(Image.fromarray(levels), "TIFF", tiffinfo=directory)


def test_grey_tiffs_that_count_from_white():
    levels = np.array([[0, 65535, 257]], np.uint16)
    found = np.asarray(decode_image(tiff(levels, PhotometricInterpretation=0)))
    assert found[0, :, 0].tolist() == [255, 0, 254]


def test_grey_levels_of_12_bits():
    # Two levels in three bytes: 0xFFF and 0x800.
    entries = [(256, 4, 2), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1)]
    entries += [(273, 4, 122), (277, 3, 1), (278, 4, 1), (279, 4, 3)]
    directory = struct.pack("<H", len(entries))
    for tag, kind, value in entries:
        directory += struct.pack("<HHII", tag, kind, 1, value)
    encoded = b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + b"\xff\xf8\x00"
    assert np.asarray(decode_image(encoded))[0, :, 0].tolist() == [255, 128]


@pytest.mark.parametrize(
    "levels, kind",
    [
        (np.linspace(0, 1, 12, dtype=np.float32), "floats from 0.0 to 1.0"),
        (np.array([np.nan, np.inf] * 6, np.float32), "floats from nan to nan"),
        (np.arange(12, dtype=np.int32), "integers of 32 bits from 0 to 11"),
        (np.arange(12, dtype=np.int32) * 1000, "integers of 32 bits from 0 to 11000"),
        (np.arange(-1, 11, dtype=np.int32), "integers of 32 bits from -1 to 10"),
    ],
)
def test_grey_levels_without_a_known_white_are_refused(levels, kind):
    image = Image.fromarray(levels.reshape(3, 4))
    with pytest.raises(UserError, match=f"^grey levels are {kind}; valid: integers of 8 or 16"):
        decode_image(encode(image, "TIFF"))
    if kind != "integers of 32 bits from 0 to 11000":  # in memory, this can only be 16 bits
        with pytest.raises(UserError, match=kind):
            to_rgb(image)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames_is_read(photo, file_format):
    options = {"lossless": True} if file_format == "WEBP" else {}
    frames = [photo.convert("P"), Image.new("P", photo.size), Image.new("P", photo.size, 9)]
    encoded = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    found = images.with_channels(decode_image(encoded), 3)
    np.testing.assert_array_equal(found, frames[0].convert("RGB"))


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def special(tmp_path):
    """Paths that are no images: name -> what `read_image` says."""
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    for name, content in {
        "empty.jpg": b"",
        "text.jpg": b"no image",
        "vector.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "page.pdf": b"%PDF-1.7\n",
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "empty.avif": b"\0\0\0\x1cftypavif\0\0\0\0mif1avifmiaf",
        "bomb.png": png(60_000, 60_000),
        "nothing.png": png(0, 5),
        "cut.png": png(500, 500),
    }.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    "name, message",
    [
        ("folder.jpg", "is a folder; valid: a file"),
        ("pipe.jpg", "is a pipe or a device; valid: a file"),
        ("zero.jpg", "is a pipe or a device; valid: a file"),
        ("dangling.jpg", "No such file or directory"),
        ("circle.jpg", "Too many levels of symbolic links"),
        ("missing.jpg", "No such file or directory"),
        ("empty.jpg", "cannot decode 0 bytes as an image: no known format"),
        ("text.jpg", "cannot decode 8 bytes as an image: no known format"),
        ("vector.svg", "no known format"),
        ("page.pdf", "no known format"),
        ("script.eps", "no known format"),
        ("phone.heic", "cannot decode 24 bytes as an image"),
        ("empty.avif", "cannot decode 28 bytes as an image"),
        ("bomb.png", "image has 60000 x 60000 pixels; valid: 1 to 500,000,000 pixels"),
        ("nothing.png", "no known format"),
        ("cut.png", "image file is truncated"),
    ],
)
def test_files_that_are_no_images(special, name, message):
    with pytest.raises(UserError) as error:
        read_image(special / name)
    assert str(error.value).startswith(f"{special / name}: ") and message in str(error.value)


def test_decoders_may_raise_anything(photo, monkeypatch, tmp_path):
    photo.save(tmp_path / "a.png")
    errors = MemoryError(), struct.error("bad"), KeyError(5), OverflowError("x"), SyntaxError()
    for error in errors:
        monkeypatch.setattr(Image.Image, "load", lambda self, error=error: raise_(error))
        with pytest.raises(UserError, match=r"a.png: cannot decode \d+ bytes as an image: \w+"):
            read_image(tmp_path / "a.png")


def raise_(error):
    raise error


def test_pillow_is_left_as_it_was(photo):
    """Its limit and the filters of warnings are those of the whole process."""
    before = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    with decoding.unlimited, decoding.unlimited:
        assert Image.MAX_IMAGE_PIXELS is None
        decode_image(encode(photo, "PNG"))
        assert Image.MAX_IMAGE_PIXELS is None
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


def test_boxes_of_any_size_are_cut(monkeypatch, photo):
    """Pillow applies its limit to crops of decoded images, too."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decoding.crop_box(photo, (0, 0, 80, 50)).size == (80, 50)


# ------------------------------------------------------------------------------------------------
# Damages
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", damaged_images.KINDS)
def test_a_damaged_file_gives_an_image_or_one_line(kind, capfd):
    assert damaged_images.run_damages(kind, seed=0, trials=40) == []
    # libtiff, which reads compressed files only, has a message of its own that Pillow cannot stop.
    assert kind == "compressed TIFF" or capfd.readouterr().err == ""
