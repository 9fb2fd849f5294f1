"""Writes grey PNG files of any depth, also such as hold less than they claim."""

import struct
import zlib


def png(width: int, height: int, depth: int = 8, pixels: bytes = b"") -> bytes:
    """Returns the contents of a grey PNG.

    Args:
      width: width that the file claims [pixels].
      height: height that the file claims [pixels].
      depth: bits per pixel.
      pixels: rows of packed pixels, each after a zero.
    """
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)
