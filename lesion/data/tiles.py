"""Tiles from disk to memory: decode, square, fill black borders, normalise colour, resize; once, into a memory-mapped cache.

A tile shows 15 mm of skin with the lesion in the middle. Everything here keeps that scale and centre:
- black borders: where the camera's view ended the archive pads with black strips at one or two sides. Cropping them would
  move the lesion and change the millimetres per pixel, so the strips are filled by mirroring the skin beside them, from
  which the tile's middle 4.5 mm are kept out, lest the lesion appear twice;
- a tile that is not square (none in ISIC 2024) is cropped to its central square: padding would paint new borders;
- resizing is Pillow's bicubic, which widens its kernel when shrinking (antialiased); Lanczos rings at hairs and pen marks.
Pillow does not forgive truncated files here: such a tile is named as unreadable. Proven by tests/data/test_tiles.py.
"""
import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lesion import files
from lesion.data import colour

VERSION = 1  # part of the cache key: raise it when a pixel of the result changes
FIELD_MM = 15.0
DARK = 20  # a border pixel's brightest channel is at most this (JPEG noise around 0)
MIDDLE_MM = 4.5  # median lesion 3 to 4 mm


@dataclass
class Tiles:
    """images_u8 [M,R,R,3] uint8 RGB (read-only: memory-mapped); rows, the M readable rows; unreadable, "name: reason"."""
    images_u8: np.ndarray
    rows: list[dict]
    unreadable: list[str]


def decode(data: bytes) -> np.ndarray:
    """A tile's bytes as uint8 RGB [S,S,3]: EXIF orientation applied, central square. ValueError names what is wrong."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
                raise ValueError(f"mode {picture.mode}, expected 8 bits a channel")
            picture = ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not a picture that Pillow knows" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise ValueError(reason or type(error).__name__) from None
    image = np.asarray(picture)
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


def tile(data: bytes, resolution: int, color_norm: str = "none") -> np.ndarray:
    """One tile's bytes as the network sees it, [resolution, resolution, 3] uint8. ValueError if unreadable."""
    return resize(colour.normalise(fill_borders(decode(data)), color_norm), resolution)


def color_norm_of(folder: Path) -> str:
    """The colour normalisation recorded in `folder`/dataset.json; "none" where there is no such file (a synthetic set)."""
    path = Path(folder) / "dataset.json"
    return json.loads(path.read_text()).get("color_norm", "none") if path.is_file() else "none"


def load_tiles(folder: Path, rows: list[dict], resolution: int, progress: Callable | None = None) -> Tiles:
    """The tiles of `rows` (a subset of `folder`'s manifest) at resolution^2, under the set's recorded colour normalisation.

    Cached in `folder`/.cache under the SHA-256 of what decides the pixels: file names, sizes and times, resolution, colour
    normalisation, this module's VERSION. A cache that cannot be written (read-only folder) is done without. `progress`
    wraps the iterator of tiles (as `cli.progress` does; called with `total`). ValueError if rows is empty or none is readable.
    """
    folder = Path(folder)
    if not rows:
        raise ValueError(f"{folder}: no tiles to load (no row matches)")
    color_norm = color_norm_of(folder)
    stamps = [_stamp(folder / row["file_name"]) for row in rows]
    key = files.sha256_json([[row["file_name"] for row in rows], stamps, resolution, color_norm, VERSION])[:16]
    cached, listing = folder / ".cache" / f"tiles-{key}.npy", folder / ".cache" / f"tiles-{key}.json"
    if not (cached.is_file() and listing.is_file()):
        images, problems = _decode_all(folder, rows, resolution, color_norm, progress)
        if len(problems) == len(rows):
            raise ValueError(f"{folder}: none of the {len(rows)} tiles is readable (first: {_named(rows, problems)[0]})")
        try:
            _save(cached, images)
            files.write_json(listing, problems)
        except OSError:
            return Tiles(images, _readable(rows, problems), _named(rows, problems))
    problems = json.loads(listing.read_text())
    return Tiles(np.load(cached, mmap_mode="r"), _readable(rows, problems), _named(rows, problems))


def _stamp(path: Path) -> list[int]:
    try:
        status = os.stat(path)
    except OSError:
        return [-1, 0]
    return [status.st_size, status.st_mtime_ns]


def _decode_all(folder, rows, resolution, color_norm, progress):
    """Images of the readable rows [M,R,R,3], and {str(row number): reason} of the others. Pillow releases the GIL: threads do."""
    images, problems = np.empty((len(rows), resolution, resolution, 3), np.uint8), {}

    def one(number):
        try:
            images[number] = tile((folder / rows[number]["file_name"]).read_bytes(), resolution, color_norm)
        except (OSError, ValueError) as error:
            return number, getattr(error, "strerror", None) or str(error)
        return number, None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(one, range(len(rows)))
        for number, reason in progress(done, total=len(rows)) if progress else done:
            if reason:
                problems[str(number)] = reason
    if problems:
        images = images[[str(number) not in problems for number in range(len(rows))]]
    return images, problems


def _save(path: Path, images: np.ndarray) -> None:
    with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, images)


def _readable(rows, problems):
    return [row for number, row in enumerate(rows) if str(number) not in problems]


def _named(rows, problems):
    return [f"{rows[int(number)]['file_name']}: {reason}" for number, reason in problems.items()]
