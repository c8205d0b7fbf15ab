"""Pictures as files: contact sheets, PNG with text chunks, denoising GIF; the palette of every chart.

Proven by tests/run/test_sheets.py.
"""
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from lesion.run.files import atomic_path

GAP, LINE = 6, 15
LARGEST = 2 ** 28  # pixels of the frames that are kept: 6 of 8 tiles side by side, of 2,048 px each, fit
PAPER, INK = (255, 255, 255), (60, 60, 60)
BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE, BLACK = (  # Okabe & Ito: told apart by the colour-blind too
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000")
GREY = "#666666"


def contact_sheet(images_u8: np.ndarray, columns: int = 8, titles: list[str] | None = None) -> Image.Image:
    """uint8 [N,R,R,3] as a sheet with white gaps, row by row; `titles`, one a row of the sheet, stand above it."""
    count, side = len(images_u8), images_u8.shape[1]
    columns = min(columns, count)
    rows = -(-count // columns)
    line = LINE if titles else 0
    sheet = Image.new("RGB", (columns * (side + GAP) + GAP, rows * (side + GAP + line) + GAP), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, image in enumerate(images_u8):
        row, column = divmod(number, columns)
        top = GAP + row * (side + GAP + line)
        if titles and column == 0:
            pen.text((GAP, top - 2), titles[row], fill=INK, font=font)
        sheet.paste(Image.fromarray(image), (GAP + column * (side + GAP), top + line))
    return sheet


def as_array(image: Image.Image) -> np.ndarray:
    """A picture as uint8 [H,W,3]."""
    return np.asarray(image.convert("RGB"))


def open_images(paths: list[Path]) -> np.ndarray:
    """Pictures of one size as uint8 [N,H,W,3]."""
    return np.stack([as_array(Image.open(path)) for path in paths])


def open_frames(path: Path, most: int = 6) -> np.ndarray:
    """At most `most` frames of a GIF, evenly spread, the first and the last among them, in order, as uint8 [N,H,W,3].
    ValueError if it is no readable GIF, or these have more than LARGEST pixels."""
    try:
        with Image.open(path, formats=("GIF",)) as picture:
            chosen = np.unique(np.linspace(0, picture.n_frames - 1, most).round().astype(int))
            shape = (len(chosen), picture.height, picture.width, 3)
            if fits := math.prod(shape[:3]) <= LARGEST:
                frames = np.empty(shape, np.uint8)
                for place, number in enumerate(chosen):
                    picture.seek(number)
                    frames[place] = as_array(picture)
    except Exception:  # what Pillow raises on damaged bytes has no list
        raise ValueError(f"{path} is damaged: no readable picture; delete it, and draw it again") from None
    if not fits:
        raise ValueError(f"{path}: {len(chosen)} frames of {shape[2]}x{shape[1]} pixels are more than are read; draw it again, smaller")
    return frames


def stack(sheets: list[Image.Image], titles: list[str]) -> Image.Image:
    """Sheets one above the other, each under its title."""
    picture = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height + LINE for sheet in sheets)), PAPER)
    pen, font, top = ImageDraw.Draw(picture), ImageFont.load_default(12), 0
    for sheet, title in zip(sheets, titles):
        pen.text((GAP, top), title, fill=INK, font=font)
        picture.paste(sheet, (0, top + LINE))
        top += sheet.height + LINE
    return picture


def save_png(path: Path, image: Image.Image | np.ndarray, text: dict[str, str] | None = None) -> None:
    """Write a PNG atomically, with `text` in its text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def save_gif(path: Path, frames_u8: list[np.ndarray], frame_ms: int = 80, hold_ms: int = 1500) -> None:
    """Write uint8 [H,W,3] frames as a looping GIF that rests on the last; one palette, taken from the last frame and the first."""
    pictures = [Image.fromarray(frame) for frame in frames_u8]
    both = Image.new("RGB", (pictures[0].width * 2, pictures[0].height))
    both.paste(pictures[0], (0, 0))
    both.paste(pictures[-1], (pictures[0].width, 0))
    palette = both.quantize(256, method=Image.Quantize.MEDIANCUT)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for picture in pictures]
    with atomic_path(path) as temporary:
        pictures[0].save(temporary, format="GIF", save_all=True, append_images=pictures[1:], loop=0, optimize=False,
                         duration=[frame_ms] * (len(pictures) - 1) + [hold_ms])
