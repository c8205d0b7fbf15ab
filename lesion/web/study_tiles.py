"""The pictures of a reader study: nothing about a file may tell its class but what it shows.

Why they are encoded as they are stands in lesion.web.study_folder. Proven by tests/web/test_study_folder.py.
"""
import io
from pathlib import Path

import numpy as np
from PIL import Image

from lesion.tiles.decode import load_tiles, size_of

JPEG = {"quality": 75, "subsampling": 2}  # ISIC 2024's own tables


def common_size(source: Path, rows: list[dict]) -> int:
    """The one square side, in pixels, that all pictures of `rows` have; ValueError where they differ."""
    sizes = set()
    for row in rows:
        try:
            sizes.add(size_of(source / row["file_name"]))
        except ValueError:
            continue  # encode_rows names it
    if len(sizes) != 1 or len(set(next(iter(sizes)))) != 1:
        listed = ", ".join(f"{width}x{height}" for width, height in sorted(sizes)) or "unreadable"
        raise ValueError(f"{source}: the synthetic tiles are {listed} pixels, not all of one square size: "
                         "give --resolution, or a folder drawn at one size")
    return next(iter(sizes))[0]


def encode_rows(source: Path, rows: list[dict], count: int, resolution: int):
    """(row, native side, PNG bytes) of the first `count` readable rows, and "name: reason" of those passed over."""
    chosen, unreadable, start = [], [], 0
    while len(chosen) < count and start < len(rows):
        batch = rows[start:start + count - len(chosen)]
        start += len(batch)
        try:
            tiles = load_tiles(source, batch, resolution)
        except ValueError as error:  # none of the batch can be read
            unreadable.append(str(error))
            continue
        unreadable += tiles.unreadable
        for row, image in zip(tiles.rows, tiles.images_u8, strict=True):
            chosen.append((row, min(size_of(source / row["file_name"])), encode(image)))
    return chosen, unreadable


def encode(image: np.ndarray) -> bytes:
    """`image` [R,R,3] uint8 once through JPEG, then as PNG of a length that depends on R alone."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "JPEG", **JPEG)
    with Image.open(buffer) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def what_changed(data: bytes, side: int) -> str:
    """In words, how a served tile differs from the one the study was made with; the whole tile is `side` pixels wide."""
    try:
        width, height = size_of(io.BytesIO(data))
    except ValueError:
        return "is not a picture any more"
    if (width, height) != (side, side):
        return f"is {width}x{height} pixels, the other tiles {side}x{side}"
    return "is not the tile the study was made with (its hash differs)"
