"""The pictures of a reader study: nothing about a file may tell its class but what it shows.

Why they are encoded as they are stands in lesion.web.study_folder. Proven by tests/web/test_study_folder.py.
"""
import io
from pathlib import Path

import numpy as np
from PIL import Image

from lesion.tiles.decode import load_tiles

JPEG = {"quality": 75, "subsampling": 2}  # ISIC 2024's own tables


def common_size(source: Path, rows: list[dict]) -> int:
    """The one square side, in pixels, that all pictures of `rows` have; ValueError where they differ."""
    sizes = set()
    for row in rows:
        try:
            with Image.open(source / row["file_name"]) as picture:
                sizes.add(picture.size)
        except OSError:
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
            with Image.open(source / row["file_name"]) as picture:
                chosen.append((row, min(picture.size), encode(image)))
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
        with Image.open(io.BytesIO(data)) as picture:
            if picture.size != (side, side):
                return f"is {picture.size[0]}x{picture.size[1]} pixels, the other tiles {side}x{side}"
    except OSError:
        return "is not a picture any more"
    return "is not the tile the study was made with (its hash differs)"
