"""Tiles from disk to memory: decode, fill black borders, normalise colour, resize; once, into a memory-mapped cache.

A tile shows 15 mm of skin with the lesion in the middle. Everything here keeps that scale and centre:
- black borders: where the camera's view ended the archive pads with black strips at one or two sides. Cropping them
  would move the lesion and change the millimetres per pixel, so the strips are filled by mirroring the skin beside
  them, from which the tile's middle 4.5 mm are kept out, lest the lesion appear twice;
- a tile that is not square (none in ISIC 2024) is cropped to its central square: padding would paint new borders;
- resizing is Pillow's bicubic, which widens its kernel when it shrinks (antialiased); Lanczos rings at hairs and pens.
Pillow does not forgive truncated files here: such a tile is named as unreadable. Proven by tests/tiles/test_decode.py.
"""
import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lesion.run import files
from lesion.tiles import colour

VERSION = 1  # part of the cache key: raise it when a pixel of the result changes
FIELD_MM = 15.0
DARK = 20  # a border pixel's brightest channel is at most this (JPEG noise around 0)
MIDDLE_MM = 4.5  # median lesion 3 to 4 mm


@dataclass
class Tiles:
    """images_u8 [M,R,R,3] uint8 RGB, read-only (memory-mapped); rows, the M readable; unreadable, "name: reason"."""
    images_u8: np.ndarray
    rows: list[dict]
    unreadable: list[str]


def decode(data: bytes, square: bool = True) -> np.ndarray:
    """A tile's bytes as uint8 RGB [H,W,3], EXIF orientation applied; by default its central square.

    ValueError says why bytes are not a tile: no picture, truncated, 16 bits a channel.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
                raise ValueError(f"mode {picture.mode}, expected 8 bits a channel")
            picture = ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not a picture that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(reason or type(error).__name__) from None
    image = np.asarray(picture)
    return central_square(image) if square else image


def central_square(image: np.ndarray) -> np.ndarray:
    """The central square of `image` [H,W,3]."""
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top:top + side, left:left + side]


def border_widths(image: np.ndarray) -> tuple[int, int, int, int]:
    """Widths in pixels (top, bottom, left, right) of the black strips along the sides of `image` [S,S,3] uint8.

    A row or column belongs to a strip while at least 95 % of it is near-black. A tile of which less than a quarter
    would remain has no strips: it is dark, not bordered.
    """
    dark = image.max(2) <= DARK
    if not (dark[0].any() or dark[-1].any()):
        return 0, 0, 0, 0
    top, bottom = _run(dark.mean(1) >= 0.95)
    inside = dark[top:dark.shape[0] - bottom]
    left, right = _run(inside.mean(0) >= 0.95) if len(inside) else (0, 0)
    remains = (1 - (top + bottom) / dark.shape[0]) * (1 - (left + right) / dark.shape[1])
    return (top, bottom, left, right) if remains >= 0.25 else (0, 0, 0, 0)


def _run(flags: np.ndarray) -> tuple[int, int]:
    """Lengths of the runs of True at both ends."""
    if flags.all():
        return len(flags), 0
    return int(np.argmin(flags)), int(np.argmin(flags[::-1]))


def fill_borders(image: np.ndarray) -> np.ndarray:
    """`image` [S,S,3] with its black strips replaced by the skin beside them, mirrored (wide strips: to and fro).

    The mirrored band reaches from the strip to the tile's middle MIDDLE_MM, and is at least a tenth of the side.
    """
    top, bottom, left, right = border_widths(image)
    if not (top or bottom or left or right):
        return image
    soft = 2  # the strip's edge is blurred by JPEG: take two more lines
    side = image.shape[0]
    top, bottom, left, right = (width + soft if width else 0 for width in (top, bottom, left, right))
    inside = image[top:side - bottom, left:side - right]
    inside = np.concatenate([_mirrored(inside, top, side), inside, _mirrored(inside[::-1], bottom, side)[::-1]])
    inside = inside.transpose(1, 0, 2)
    inside = np.concatenate([_mirrored(inside, left, side), inside, _mirrored(inside[::-1], right, side)[::-1]])
    return inside.transpose(1, 0, 2)


def _mirrored(inside: np.ndarray, width: int, side: int) -> np.ndarray:
    """`width` lines to set before `inside`, mirrored from its first lines."""
    reach = round((0.5 - MIDDLE_MM / 2 / FIELD_MM) * side) - width
    band = inside[:max(reach, side // 10, 2)]
    return np.pad(band, ((width, 0), (0, 0), (0, 0)), mode="symmetric")[:width]


def resize(image: np.ndarray, resolution: int) -> np.ndarray:
    """`image` [S,S,3] uint8 at [resolution, resolution, 3], antialiased bicubic."""
    if image.shape[0] == resolution:
        return np.ascontiguousarray(image)
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((resolution, resolution), Image.BICUBIC))


def tile(data: bytes, resolution: int, color_norm: str = "none", reference: dict | None = None) -> np.ndarray:
    """One tile's bytes as the network sees it, [resolution, resolution, 3] uint8. ValueError if unreadable."""
    return resize(colour.normalise(fill_borders(decode(data)), color_norm, reference), resolution)


def recorded_norm(folder: Path) -> tuple[str, dict | None]:
    """(colour normalisation, its reference) recorded in `folder`/dataset.json; ("none", None) where there is no such
    file: synthetic tiles are drawn in the space of the set they were learnt from."""
    path = Path(folder) / "dataset.json"
    if not path.is_file():
        return "none", None
    record = json.loads(path.read_text(encoding="utf-8"))
    return colour.check(record.get("color_norm", "none")), record.get("color_norm_reference")


def load_tiles(folder: Path, rows: list[dict], resolution: int, progress: Callable | None = None) -> Tiles:
    """The tiles of `rows` (some of `folder`'s manifest) at resolution^2, under the set's recorded colour normalisation.

    Cached in `folder`/.cache under the SHA-256 of what decides the pixels: file names, sizes and times, resolution,
    colour normalisation, this module's VERSION. A cache that cannot be written (read-only folder) is done without.
    `progress` wraps the iterator of tiles, as `cli.progress` does. ValueError if `rows` is empty or none is readable.
    """
    folder = Path(folder)
    if not rows:
        raise ValueError(f"{folder}: no tiles to load (no row matches)")
    norm = recorded_norm(folder)
    names = [row["file_name"] for row in rows]
    key = files.sha256_json([names, [_stamp(folder / name) for name in names], resolution, norm, VERSION])[:16]
    cached, listing = folder / ".cache" / f"tiles-{key}.npy", folder / ".cache" / f"tiles-{key}.json"
    if not (cached.is_file() and listing.is_file()):
        images, problems = _decode_all(folder, names, resolution, norm, progress)
        if len(problems) == len(rows):
            raise ValueError(f"{folder}: none of the {len(rows)} tiles is readable ({names[0]}: {problems[0][1]})")
        try:
            with files.atomic_path(cached) as temporary, open(temporary, "wb") as file:
                np.save(file, images)
            files.write_json(listing, problems)
        except OSError:
            return _tiles(images, rows, problems)
    return _tiles(np.load(cached, mmap_mode="r"), rows, json.loads(listing.read_text(encoding="utf-8")))


def _stamp(path: Path) -> list[int]:
    try:
        status = os.stat(path)
    except OSError:
        return [-1, 0]
    return [status.st_size, status.st_mtime_ns]


def _tiles(images: np.ndarray, rows: list[dict], problems: list) -> Tiles:
    bad = {number for number, _ in problems}
    return Tiles(images, [row for number, row in enumerate(rows) if number not in bad],
                 [f"{rows[number]['file_name']}: {reason}" for number, reason in problems])


def _decode_all(folder, names, resolution, norm, progress):
    """Readable tiles [M,R,R,3], and [row number, reason] of the others. Pillow releases the GIL: threads do."""
    images, problems = np.empty((len(names), resolution, resolution, 3), np.uint8), []

    def one(number):
        try:
            images[number] = tile((folder / names[number]).read_bytes(), resolution, *norm)
        except (OSError, ValueError) as error:
            return number, getattr(error, "strerror", None) or str(error)
        return number, None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(one, range(len(names)))
        for number, reason in progress(done, total=len(names), desc="tiles", unit="tile") if progress else done:
            if reason:
                problems.append([number, reason])
    if problems:
        images = np.delete(images, [number for number, _ in problems], axis=0)
    return images, problems
