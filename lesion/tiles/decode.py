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
import os
import stat
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from lesion.run import files
from lesion.tiles import colour

VERSION = 1  # part of the cache key: raise it when a pixel of the result changes
FIELD_MM = 15.0
DARK = 20  # a border pixel's brightest channel is at most this (JPEG noise around 0)
TILE_BYTES = 64 << 20  # encoded; the largest of ISIC's own challenges have under 20 MB
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # no other decoder is opened for a tile
PIXELS = 50_000_000  # ISIC's largest have 24 million
LARGE, FEW = 4_000_000, 2  # pixels; the threads that decode what has more: one takes, and keeps, up to a gigabyte
SCANS = 100  # of a JPEG; a progressive one has ten, and every one takes the time of all pixels
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}
MIDDLE_MM = 4.5  # median lesion 3 to 4 mm
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # PIXELS is lower, and an error
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")  # of broken EXIF


@dataclass
class Tiles:
    """images_u8 [M,R,R,3] uint8 RGB, read-only (memory-mapped); rows, the M readable; unreadable, "name: reason"."""
    images_u8: np.ndarray
    rows: list[dict]
    unreadable: list[str]


def decode(data: bytes, square: bool = True) -> np.ndarray:
    """A tile's bytes as uint8 RGB [H,W,3], EXIF orientation applied, what is transparent on white; by default its
    central square.

    ValueError says why bytes are not a tile: no JPEG, PNG, WebP or BMP, truncated, 16 bits a channel, several frames,
    more than PIXELS.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10":
        raise ValueError("16 bits a channel, expected 8 bits a channel")  # Pillow would drop half of them in silence
    if data[:2] == b"\xff\xd8" and (scans := data.count(b"\xff\xda")) > SCANS:
        raise ValueError(f"{scans} scans: a JPEG has at most {SCANS}")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > PIXELS:
                raise ValueError(f"{picture.width}x{picture.height} pixels: a tile has at most {PIXELS:,}")
            if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
                raise ValueError(f"mode {picture.mode}, expected 8 bits a channel")
            if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":  # a phone's MPO: the first is the photo
                raise ValueError(f"{picture.n_frames} frames, expected one picture")
            turn = _orientation(picture)
            if picture.has_transparency_data:
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
            picture = picture.convert("RGB")
            image = np.asarray(picture.transpose(turn) if turn is not None else picture)
    except UnidentifiedImageError:
        raise ValueError("not a picture: JPEG, PNG, WebP and BMP are read") from None
    except Exception as error:  # what decoders raise on hostile bytes has no list: struct.error, IndexError ...
        raise ValueError(str(error) or type(error).__name__) from None
    return central_square(image) if square else image


def _orientation(picture: Image.Image) -> Image.Transpose | None:
    """The turn that EXIF asks for; None where it asks for none or cannot be read."""
    try:
        value = picture.getexif().get(0x0112)
        return TURNS.get(value[0] if isinstance(value, tuple) else value)
    except Exception:  # broken EXIF takes as many forms
        return None


def size_of(file: Path | io.BytesIO) -> tuple[int, int]:
    """(width, height) in a picture's header. ValueError for what `decode` would not open."""
    try:
        with Image.open(file, formats=FORMATS) as picture:
            return picture.size
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from None


def remark(data: bytes) -> str | None:
    """What makes the colours of a readable tile doubtful: four inks, or a colour profile that is not sRGB's. Neither is
    applied."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        profile = picture.info.get("icc_profile")
        if picture.mode == "CMYK":
            return "in four inks (CMYK): turned to RGB without a profile"
        if isinstance(profile, bytes) and profile and b"sRGB" not in profile and b"s\0R\0G\0B" not in profile:
            return "with a colour profile that is not sRGB: read as sRGB"
    return None


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


def read_tile(path: Path) -> bytes:
    """A tile's bytes; ValueError where they are more than TILE_BYTES, or no file's (reading a pipe would wait for ever)."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file: no tile")
    with open(path, "rb") as file:
        data = file.read(TILE_BYTES + 1)
    if len(data) > TILE_BYTES:
        raise ValueError(f"larger than {TILE_BYTES >> 20} MiB: no tile")
    return data


def recorded_norm(folder: Path) -> tuple[str, dict | None]:
    """(colour normalisation, its reference) recorded in `folder`/dataset.json; ("none", None) where there is no such
    file: synthetic tiles are drawn in the space of the set they were learnt from."""
    path = Path(folder) / "dataset.json"
    if not path.is_file():
        return "none", None
    record = files.read_json(path)
    reference = record.get("color_norm_reference")
    if reference is not None:
        colour.check_reference(reference, str(path))
    return colour.check(record.get("color_norm", "none")), reference


def load_tiles(folder: Path, rows: list[dict], resolution: int, progress: Callable | None = None) -> Tiles:
    """The tiles of `rows` (some of `folder`'s manifest) at resolution^2, under the set's recorded colour normalisation.

    Cached in `folder`/.cache under the SHA-256 of what decides the pixels: file names and their bytes' SHA-256,
    resolution, colour normalisation, this module's VERSION; a cache whose own SHA-256, over pixels and the list of
    unreadable tiles, is not the recorded one is decoded again. One that cannot be written (read-only folder) is done
    without. `progress` wraps the iterator of tiles, as `cli.progress` does. ValueError if `rows` is empty or none is
    readable.
    """
    folder = Path(folder)
    if not rows:
        raise ValueError(f"{folder}: no tiles to load (no row matches)")
    norm = recorded_norm(folder)
    names = [row["file_name"] for row in rows]
    key = files.sha256_json([names, [_digest(folder / name) for name in names], resolution, norm, VERSION])[:16]
    cached, listing = folder / ".cache" / f"tiles-{key}.npy", folder / ".cache" / f"tiles-{key}.json"
    if (kept := _cached(cached, listing, (len(rows), resolution))) is not None:
        return _tiles(kept[0], rows, kept[1])
    images, problems = _decode_all(folder, names, resolution, norm, progress)
    if len(problems) == len(rows):
        raise ValueError(f"{folder}: none of the {len(rows)} tiles is readable ({names[0]}: {problems[0][1]})")
    try:
        for left in (folder / ".cache").glob(".tiles-*.tmp"):  # by a run that was killed while it wrote
            left.unlink(missing_ok=True)
        with files.atomic_path(cached) as temporary, open(temporary, "wb") as file:
            np.save(file, images)
        files.write_json(listing, {"sha256": _seal(cached, problems), "unreadable": problems})
    except OSError:
        return _tiles(images, rows, problems)
    return _tiles(np.load(cached, mmap_mode="r"), rows, problems)


def _cached(cached: Path, listing: Path, wanted: tuple[int, int]) -> tuple[np.ndarray, list] | None:
    """(images, unreadable) of a cache that is whole: its bytes and its list have the recorded SHA-256, and together they
    account for the (tiles, resolution) `wanted`."""
    try:
        record = files.read_json(listing)
        problems = record["unreadable"]
        if record["sha256"] != _seal(cached, problems):
            return None
        images = np.load(cached, mmap_mode="r")
        bad = [number for number, reason in problems]
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    count, side = wanted
    listed = all(type(number) is int and 0 <= number < count for number in bad) and len(set(bad)) == len(bad)
    shape = count - len(bad), side, side, 3
    whole = listed and (getattr(images, "shape", None), getattr(images, "dtype", None)) == (shape, np.uint8)
    return (images, problems) if whole else None


def _seal(cached: Path, problems: list) -> str:
    return files.sha256_json([files.sha256_file(cached), problems])


def _digest(path: Path) -> str | None:
    try:
        return files.sha256_file(path) if path.is_file() else None
    except OSError:
        return None


def _tiles(images: np.ndarray, rows: list[dict], problems: list) -> Tiles:
    bad = {number for number, _ in problems}
    return Tiles(images, [row for number, row in enumerate(rows) if number not in bad],
                 [f"{rows[number]['file_name']}: {reason}" for number, reason in problems])


def _decode_all(folder, names, resolution, norm, progress):
    """Readable tiles [M,R,R,3], and [row number, reason] of the others. Pillow releases the GIL: threads do; FEW of them
    for large pictures, so that memory does not grow with cores."""
    images, problems = np.empty((len(names), resolution, resolution, 3), np.uint8), []

    def one(number):
        try:
            data = read_tile(folder / names[number])
            made = few.submit(tile, data, resolution, *norm).result() if _is_large(data) else tile(data, resolution, *norm)
            images[number] = made
        except (OSError, ValueError) as error:
            return number, getattr(error, "strerror", None) or str(error)
        return number, None

    with ThreadPoolExecutor(FEW) as few, ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(one, range(len(names)))
        for number, reason in progress(done, total=len(names), desc="tiles", unit="tile") if progress else done:
            if reason:
                problems.append([number, reason])
    if problems:
        images = np.delete(images, [number for number, _ in problems], axis=0)
    return images, problems


def _is_large(data: bytes) -> bool:
    try:
        width, height = size_of(io.BytesIO(data))
    except ValueError:
        return False  # `decode` says why
    return width * height > LARGE
