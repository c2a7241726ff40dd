"""Pictures that several test files draw, write and damage."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

UNIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and FIFOs")


def save_image(path: Path, image: Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def quarters() -> Image.Image:
    """2 x 2 blocks of 8 pixels: red, green / blue, white."""
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    return Image.fromarray(colours.repeat(8, 0).repeat(8, 1))


def grey_images(folder: Path, count: int, start: int = 0) -> list[Path]:
    """Images whose grey level is their number."""
    return [
        save_image(folder / f"{i}.png", Image.new("RGB", (8, 8), (i, i, i)))
        for i in range(start, start + count)
    ]


def png_bomb(side: int) -> bytes:
    """A PNG header that promises side x side pixels and holds none."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def unreadable_files(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    whole = io.BytesIO()
    quarters().resize((300, 300)).save(whole, "JPEG")
    contents = {
        "text.jpg": b"not an image",
        "empty.jpg": b"",
        "truncated.jpg": whole.getvalue()[: len(whole.getvalue()) // 2],
        "bomb.png": png_bomb(30_000),
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nquit\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.jpg").mkdir()
    save_image(folder / "float.tif", Image.new("F", (4, 4)))
    return {path.name: path for path in folder.iterdir()} | {"missing.jpg": folder / "missing.jpg"}
