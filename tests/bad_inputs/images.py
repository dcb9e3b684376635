"""Images: what is written as c.png, the last of three; or the file's name if it is another one."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bad_inputs.cases import Case, Replaced, Works

SIZE = (40, 20)  # width and height


def pixels() -> Image.Image:
    rgb = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    rgb[:, :20], rgb[:, 20:] = (250, 10, 20), (10, 240, 30)
    return Image.fromarray(rgb)


def encoded(format: str, picture: Image.Image | None = None, **options: Any) -> bytes:
    stream = io.BytesIO()
    (picture or pixels()).save(stream, format, **options)
    return stream.getvalue()


def bomb(side: int = 30_000) -> bytes:
    """A black PNG of side x side pixels with 1 bit each: 110 kB that become 0.9 GB, and 2.7 GB in RGB."""
    packer, row = zlib.compressobj(1), bytes(1 + side // 8)
    data = b"".join([*(packer.compress(row * 1000) for _ in range(side // 1000)), packer.flush()])
    parts = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def file(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def link_outside(path: Path) -> None:
    (path.parent.parent / "elsewhere.png").write_bytes(encoded("PNG"))
    path.symlink_to("../elsewhere.png")


def undecodable_name(path: Path) -> str:
    Path(os.fsdecode(os.fsencode(path.parent) + b"/\xff.png")).write_bytes(encoded("PNG"))
    return "\udcff.png"


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


_LOUD = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 40, 3), dtype=np.uint8))
_DEEP = Image.fromarray(np.asarray(pixels().convert("L")).astype(np.uint16) * 257)
_GREY = np.asarray(pixels().convert("L"))
_UNIT = Image.fromarray(_GREY.astype(np.float32) / 255)
_BYTES_IN_32_BITS = Image.fromarray(_GREY.astype(np.int32))
_HEIGHTS = Image.fromarray(_GREY.astype(np.float32) * 10)
_PNG = encoded("PNG")
_START = _PNG.index(b"IDAT") + 4
_WRONG_BYTE = _PNG[:_START] + b"\xff" + _PNG[_START + 1 :]
IMAGES = [
    Case("no file", lambda path: None, Replaced("No such file or directory")),
    Case("0 bytes", file(b""), Replaced("cannot identify image file")),
    Case("a text file named .png", file(b"hello"), Replaced("cannot identify image file")),
    Case("a JPEG cut off", file(encoded("JPEG", _LOUD)[:-300]), Replaced("image file is truncated")),
    Case("a PNG cut off", file(encoded("PNG", _LOUD)[:1500]), Replaced("truncated")),
    Case("a PNG with a wrong byte", file(_WRONG_BYTE), Replaced("broken data stream")),
    Case(
        "30,000 x 30,000 pixels in 110 kB", file(bomb()), Replaced("could be decompression bomb DOS attack")
    ),
    Case(
        "a size other than the JSON says",
        file(encoded("PNG", _LOUD.crop((0, 0, 39, 20)))),
        Replaced("the file is 39 x 20, its record says 40 x 20"),
    ),
    Case("a folder named .png", lambda path: path.mkdir(), Replaced("Is a directory")),
    Case("a broken symbolic link", link("nowhere.png"), Replaced("No such file or directory")),
    Case("a symbolic link to itself", link("c.png"), Replaced("Too many levels of symbolic links")),
    Case("a name that UTF-8 cannot encode", lambda path: "\ud800.png", Replaced("surrogates not allowed")),
    Case(
        "a symbolic link out of the folder",
        link_outside,
        Works("followed: only the owner of the disk can create it"),
    ),
    Case(
        "a name with bytes that are not UTF-8",
        undecodable_name,
        Works("the JSON writes them as \\udc80 to \\udcff"),
    ),
    Case("a JPEG named .png", file(encoded("JPEG")), Works("read by its content")),
    Case("CMYK", file(encoded("JPEG", pixels().convert("CMYK"))), Works("becomes RGB")),
    Case("16 bits of grey", file(encoded("PNG", _DEEP)), Works("becomes 8 bits")),
    Case("a TIFF of grey floats, 0 to 1", file(encoded("TIFF", _UNIT)), Works("becomes 8 bits")),
    Case("a TIFF of grey bytes in 32 bits", file(encoded("TIFF", _BYTES_IN_32_BITS)), Works("read as bytes")),
    Case(
        "a TIFF of floats that are not grey levels",
        file(encoded("TIFF", _HEIGHTS)),
        Replaced("grey of 32-bit floats (mode F): ..., which is neither 0 to 1 nor 0 to 255: ..."),
    ),
    Case("a palette", file(encoded("PNG", pixels().quantize(4))), Works("becomes RGB")),
    Case("an alpha channel", file(encoded("PNG", pixels().convert("RGBA"))), Works("alpha is dropped")),
    Case(
        "an animation",
        file(encoded("GIF", save_all=True, append_images=[_LOUD])),
        Works("its first frame is used, and a warning says so"),
    ),
    Case(
        "EXIF rotation by a half turn",
        file(encoded("PNG", pixels().rotate(180), exif=_exif(3))),
        Works("applied"),
    ),
    Case(
        "EXIF rotation that does not fit",
        file(encoded("PNG", exif=_exif(6))),
        Works("ignored, because the JSON gives the stored size"),
    ),
]
