"""The tile loader: borders, squares, orientation, what is unreadable, and a cache that never serves stale pixels."""
import io
import json
import os
import stat
import struct
import threading
import time
import zipfile
import zlib

import layouts
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from lesion.run import files
from lesion.tiles import decode


def encoded(image, kind="PNG", **settings):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **settings)
    return stream.getvalue()


def noise(side=60, seed=0):
    return np.random.default_rng(seed).integers(60, 250, (side, side, 3)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A data set of five tiles."""
    (tmp_path / "images").mkdir()
    rows = [{"file_name": f"images/{k}.jpg", "label": "benign"} for k in range(5)]
    for k, row in enumerate(rows):
        (tmp_path / row["file_name"]).write_bytes(layouts.jpeg(k))
    files.write_manifest(tmp_path, rows)
    return tmp_path, rows


# --- decoding --------------------------------------------------------------------------------------------------------

def test_decode_gives_rgb_upright_and_square():
    """EXIF orientation is applied; grey, palette and RGBA become RGB; an oblong picture gives its centre."""
    image = noise()
    assert (decode.decode(encoded(image)) == image).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to show upright
    turned = decode.decode(encoded(image, exif=exif))
    assert (turned == np.rot90(image, -1)).all()
    for mode in ("L", "P", "RGBA", "1"):
        assert decode.decode(encoded(Image.fromarray(image).convert(mode))).shape == (60, 60, 3)
    oblong = np.concatenate([image, image], axis=1)
    assert (decode.decode(encoded(oblong)) == oblong[:, 30:90]).all()
    assert decode.decode(encoded(oblong), square=False).shape == (60, 120, 3)


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "not a picture"), (b"GIF? no", "not a picture"), (layouts.jpeg(1)[:500], "Truncated"),
    (layouts.jpeg(1)[:900], "truncated"),
    (encoded(Image.fromarray(np.zeros((9, 9), np.uint16))), "expected 8 bits a channel")])
def test_what_is_no_tile_says_why(data, reason):
    """Empty, garbage, truncated, 16-bit: a ValueError with the reason, never a half-grey picture."""
    with pytest.raises(ValueError, match=reason):
        decode.decode(data)


# --- odd pictures: decoded right, or named ---

def ifd(*entries):
    """EXIF bytes of little-endian entries (tag, type, count, value bytes)."""
    offset, extra = 8 + 2 + 12 * len(entries) + 4, b""
    data = struct.pack("<H", len(entries))
    for tag, kind, count, raw in entries:
        if len(raw) > 4:
            data += struct.pack("<HHII", tag, kind, count, offset + len(extra))
            extra += raw
        else:
            data += struct.pack("<HHI", tag, kind, count) + raw.ljust(4, b"\0")
    return b"Exif\0\0II" + struct.pack("<HI", 42, 8) + data + b"\0\0\0\0" + extra


TURN = 0x112, 3, 1, struct.pack("<H", 6)  # a quarter turn clockwise shows it upright


@pytest.mark.parametrize(("exif", "turned"), [
    (ifd(TURN), True), (ifd(TURN, (0x11A, 5, 1, struct.pack("<II", 72, 0))), True),
    (ifd(TURN, (0x9204, 10, 1, struct.pack("<ii", -1, 0))), True), (ifd(TURN, (0x501B, 5, 1, struct.pack("<II", 1, 2))), True),
    (ifd(TURN, (0x8825, 4, 1, struct.pack("<I", 4000))), True), (ifd(TURN, (0x8769, 5, 1, struct.pack("<II", 9, 9))), True),
    (ifd((0x112, 3, 2, struct.pack("<HH", 6, 6))), True), (ifd(TURN, (0x10E, 2, 6, b"\xff\xfe\x80a\0\0")), True),
    (ifd((0x112, 3, 1, struct.pack("<H", 99))), False), (ifd((0x112, 2, 2, b"6\0")), False), (b"Exif\0\0", False),
    (ifd(TURN, (0x10F, 2, 500, struct.pack("<I", 9999)))[:30], True), (b"Exif\0\0" + b"\xff" * 40, False)])
def test_broken_exif_loses_no_tile(exif, turned):
    """Whatever else in EXIF is broken, the picture is read, upright where its orientation can be read."""
    image = np.asarray(Image.open(io.BytesIO(encoded(noise(), "JPEG", quality=95))))
    found = decode.decode(encoded(noise(), "JPEG", quality=95, exif=exif))
    assert (found == (np.rot90(image, -1) if turned else image)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_eight_orientations_are_pillows(orientation):
    """Each EXIF orientation gives what ImageOps.exif_transpose gives."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(), exif=exif)
    assert (decode.decode(data) == np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))).all()


def test_what_is_transparent_is_white():
    """RGBA, grey with alpha, a palette with alpha and a transparent colour are composed on white: no hidden black or
    noise."""
    image = noise()
    alpha = np.full((60, 60), 255, np.uint8)
    alpha[:20] = 0
    clear = Image.fromarray(np.dstack([np.where(alpha[..., None] > 0, image, 0), alpha]))
    found = decode.decode(encoded(clear))
    assert (found[:20] == 255).all()
    assert (found[20:] == image[20:]).all()
    assert (decode.decode(encoded(clear.convert("LA")))[:20] == 255).all()
    palette = Image.fromarray(image).quantize(4)
    index = np.asarray(palette)
    found = decode.decode(encoded(palette, transparency=bytes([0, 255, 255, 255])))
    assert (found[index == 0] == 255).all()
    assert (found[index != 0] == np.asarray(palette.convert("RGB"))[index != 0]).all()
    key = Image.new("RGB", (20, 20), (1, 2, 3))
    assert (decode.decode(encoded(key, transparency=(1, 2, 3))) == 255).all()
    half = Image.new("RGBA", (20, 20), (0, 0, 0, 128))
    assert abs(int(decode.decode(encoded(half))[0, 0, 0]) - 127) <= 1


def png16(image):
    """RGB PNG of 16 bits a channel, whose low bytes Pillow would drop."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    high, wide, _ = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image.astype(">u2"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", wide, high, 16, 2, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_kinds_of_pictures_that_are_read_and_that_are_named():
    """Progressive, CMYK, YCbCr, MPO and a wrong ending are read right; 16 bits and several frames are refused by
    name."""
    image = np.asarray(Image.fromarray(noise(8)).resize((64, 64), Image.BICUBIC))  # smooth: JPEG is near
    for data in (encoded(image, "JPEG", progressive=True, quality=95), encoded(image, "WEBP", lossless=True), encoded(image, "BMP"),
                 encoded(Image.fromarray(image).convert("CMYK"), "JPEG", quality=95),
                 encoded(Image.fromarray(image).convert("YCbCr"), "JPEG", quality=95),
                 encoded(image, "MPO", save_all=True, append_images=[Image.new("RGB", (64, 64))], quality=95),
                 encoded(image, "JPEG", quality=95) + b"\0" * 500 + b"after the end"):
        assert np.abs(decode.decode(data).astype(int) - image).mean() < 4
    with pytest.raises(ValueError, match="16 bits a channel, expected 8 bits a channel"):
        decode.decode(png16(image.astype(np.uint16) * 257))
    for kind in ("PNG", "WEBP"):
        with pytest.raises(ValueError, match="2 frames, expected one picture"):
            decode.decode(encoded(image, kind, save_all=True, append_images=[Image.new("RGB", (64, 64))]))


def test_doubtful_colours_are_remarked_on():
    """Four inks and a profile that is not sRGB's; sRGB's own and none are no matter."""
    image = Image.fromarray(noise())
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert decode.remark(encoded(image)) is None
    assert decode.remark(encoded(image, "JPEG", icc_profile=srgb)) is None
    assert "profile that is not sRGB" in decode.remark(encoded(image, "JPEG", icc_profile=lab))
    assert "four inks" in decode.remark(encoded(image.convert("CMYK"), "JPEG"))


# --- black borders ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("strips", "expected"), [
    ({}, (0, 0, 0, 0)), ({"top": 10}, (10, 0, 0, 0)), ({"bottom": 7, "right": 13}, (0, 7, 0, 13)),
    ({"left": 24}, (0, 0, 24, 0)), ({"left": 1}, (0, 0, 1, 0)),
    ({"top": 4, "bottom": 4, "left": 4, "right": 4}, (4, 4, 4, 4))])
def test_border_widths_of_known_strips(strips, expected):
    """Black strips of known width at any side are measured to the pixel."""
    image = noise()
    paint(image, strips)
    assert decode.border_widths(image) == expected


def paint(image, strips):
    side = len(image)
    for where, width in strips.items():
        part = {"top": np.s_[:width], "bottom": np.s_[side - width:], "left": np.s_[:, :width],
                "right": np.s_[:, side - width:]}[where]
        image[part] = np.random.default_rng(width).integers(0, 12, image[part].shape)


def test_dark_skin_and_dark_corners_are_no_borders():
    """A tile that is dark all over, a dark lesion and a black corner wedge are left exactly as they are."""
    dark = np.full((60, 60, 3), 12, np.uint8)
    lesion = noise()
    lesion[15:45, 15:45] = 5
    wedge = noise()
    wedge[np.add.outer(np.arange(60), np.arange(60)) < 30] = 0
    for image in (dark, lesion, wedge):
        assert decode.border_widths(image) == (0, 0, 0, 0)
        assert decode.fill_borders(image) is image


@pytest.mark.parametrize("strips", [{"top": 6}, {"bottom": 12}, {"left": 18}, {"right": 25}, {"top": 9, "right": 14}])
def test_filled_borders_keep_the_inside_and_are_skin(strips):
    """Size, centre and every inner pixel stay. A strip of up to 18 of 60 lines gets skin without the lesion; a wider
    one reaches so far in that some of the lesion is mirrored (a tenth of the side is the least to mirror)."""
    image = noise(60)
    image[26:34, 26:34] = (20, 200, 20)  # a lesion of 2 mm in the middle, green so that a copy would show
    whole = image.copy()
    paint(image, strips)
    filled = decode.fill_borders(image)
    assert filled.shape == image.shape
    top, bottom, left, right = (w + 2 if w else 0 for w in decode.border_widths(image))
    inner = np.s_[top:60 - bottom, left:60 - right]
    assert (filled[inner] == whole[inner]).all()
    assert decode.border_widths(filled) == (0, 0, 0, 0)
    green = (filled == (20, 200, 20)).all(2)
    assert green.sum() == 64 or max(strips.values()) > 18


def test_a_narrow_strip_is_a_plain_mirror():
    """The line at distance k outside the strip's edge equals the line at distance k inside."""
    image = noise(60)
    paint(image, {"left": 8})
    filled = decode.fill_borders(image)
    for k in range(10):
        assert (filled[:, 9 - k] == filled[:, 10 + k]).all()


def test_real_borders(shared):
    """A real tile of which 40 % is a black strip: measured to the pixel, filled; a real one without is untouched."""
    with zipfile.ZipFile(shared / "isic2024" / "ISIC_2024_Permissive_Training_Input.zip") as archive:
        image = decode.decode(archive.read("ISIC_2024_Permissive_Training_Input/ISIC_6979451.jpg"))
        clean = decode.decode(archive.read("ISIC_2024_Permissive_Training_Input/ISIC_0073467.jpg"))
    assert decode.border_widths(image) == (0, 0, round(0.4027 * len(image)), 0)
    assert (decode.fill_borders(image).max(2) <= decode.DARK).mean() < 0.001
    assert decode.fill_borders(clean) is clean


# --- resizing --------------------------------------------------------------------------------------------------------

def test_shrinking_is_antialiased():
    """One-pixel stripes shrunk to a third average to grey; a point sample would leave black or white."""
    stripes = np.zeros((192, 192, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(decode.resize(stripes, 64).astype(int) - 127).max() < 15
    assert decode.resize(noise(64), 64).tolist() == noise(64).tolist()


# --- loading and the cache -------------------------------------------------------------------------------------------

def test_load_tiles_equals_tile_by_tile(folder):
    """Order of the rows, shape, dtype, values; the second time from the cache, memory-mapped and equal."""
    path, rows = folder
    order = [rows[k] for k in (3, 0, 4)]
    first = decode.load_tiles(path, order, 64)
    assert first.images_u8.shape == (3, 64, 64, 3)
    assert first.images_u8.dtype == np.uint8
    assert first.rows == order
    assert first.unreadable == []
    for image, row in zip(first.images_u8, order):
        assert (image == decode.tile((path / row["file_name"]).read_bytes(), 64)).all()
    again = decode.load_tiles(path, order, 64)
    assert isinstance(again.images_u8, np.memmap)
    assert (again.images_u8 == first.images_u8).all()


def test_the_cache_follows_what_decides_the_pixels(folder, monkeypatch):
    """A changed file, another resolution, normalisation or reference, another code version: decoded anew; else not."""
    path, rows = folder
    calls = []
    real = decode.tile
    monkeypatch.setattr(decode, "tile", lambda *a: calls.append(1) or real(*a))

    def decoded(resolution=64):
        calls.clear()
        decode.load_tiles(path, rows, resolution)
        return len(calls)

    assert [decoded(), decoded()] == [5, 0]
    assert [decoded(128), decoded(128), decoded()] == [5, 0, 0]
    (path / rows[2]["file_name"]).write_bytes(layouts.jpeg(99))
    assert [decoded(), decoded()] == [5, 0]
    lines = [{"mean": [mean, -0.4], "direction": [0.7, -0.7]} for mean in (0.6, 0.5)]
    for record in ({"color_norm": "grey-world"}, {"color_norm": "skin-locus", "color_norm_reference": lines[0]},
                   {"color_norm": "skin-locus", "color_norm_reference": lines[1]}):
        (path / "dataset.json").write_text(json.dumps(record), encoding="utf-8")
        assert [decoded(), decoded()] == [5, 0], record
    monkeypatch.setattr(decode, "VERSION", decode.VERSION + 1)
    assert decoded() == 5


def test_the_recorded_normalisation_is_applied(folder):
    """dataset.json's colour normalisation reaches the pixels; a folder without one (synthetic) is taken as it is."""
    path, rows = folder
    raw = np.array(decode.load_tiles(path, rows, 64).images_u8)
    (path / "dataset.json").write_text(json.dumps({"color_norm": "grey-world"}), encoding="utf-8")
    means = decode.load_tiles(path, rows, 64).images_u8.reshape(5, -1, 3).mean(1)
    assert (np.ptp(means, axis=1) < 2).all()
    assert (np.ptp(raw.reshape(5, -1, 3).mean(1), axis=1) > 20).all()
    (path / "dataset.json").write_text(json.dumps({"color_norm": "sepia"}), encoding="utf-8")
    with pytest.raises(ValueError, match="'sepia' is unknown"):
        decode.load_tiles(path, rows, 64)


def test_unreadable_tiles_are_named_and_left_out(folder):
    """Truncated and missing files are listed with a reason, also from the cache; rows match images; all bad: error."""
    path, rows = folder
    (path / rows[1]["file_name"]).write_bytes(layouts.jpeg(1)[:600])
    (path / rows[3]["file_name"]).unlink()
    for _ in range(2):
        found = decode.load_tiles(path, rows, 64)
        assert found.rows == [rows[0], rows[2], rows[4]]
        assert len(found.images_u8) == 3
        assert (found.images_u8[1] == decode.tile((path / rows[2]["file_name"]).read_bytes(), 64)).all()
        assert [line.split(":")[0] for line in found.unreadable] == ["images/1.jpg", "images/3.jpg"]
        assert "No such file" in found.unreadable[1]
    with pytest.raises(ValueError, match="none of the 2 tiles is readable .images/1.jpg: "):
        decode.load_tiles(path, [rows[1], rows[3]], 64)
    with pytest.raises(ValueError, match="no tiles to load"):
        decode.load_tiles(path, [], 64)


def test_a_torn_or_absent_cache_is_decoded_again(folder):
    """Half of the cache's two files: as if there were none. A folder that cannot be written: no cache, same tiles."""
    path, rows = folder
    first = np.array(decode.load_tiles(path, rows, 64).images_u8)
    for suffix in ("json", "npy"):
        next((path / ".cache").glob(f"*.{suffix}")).unlink()
        assert (decode.load_tiles(path, rows, 64).images_u8 == first).all()
    for left in (path / ".cache").iterdir():
        left.unlink()
    (path / ".cache").rmdir()
    (path / ".cache").write_text("in the way", encoding="utf-8")  # cannot be written, also for root
    assert (decode.load_tiles(path, rows, 64).images_u8 == first).all()


def test_a_tile_changed_with_its_size_and_time_kept_is_decoded_again(folder):
    """The cache is keyed by bytes, not by size and time."""
    path, rows = folder
    tile = path / rows[0]["file_name"]
    before = np.array(decode.load_tiles(path, rows, 64).images_u8)
    status, data = os.stat(tile), bytearray(tile.read_bytes())
    data[-100] ^= 8  # among the coded pixels
    tile.write_bytes(data)
    os.utime(tile, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat(tile).st_size == status.st_size
    after = decode.load_tiles(path, rows, 64).images_u8
    assert (after[0] != before[0]).any()
    assert (after[1:] == before[1:]).all()


@pytest.mark.parametrize("kind", ["npy", "json"])
def test_a_damaged_cache_heals(folder, kind):
    """Twenty single bits flipped anywhere in either file, and both files cut: the same tiles as before, and a whole
    cache again."""
    path, rows = folder
    first = np.array(decode.load_tiles(path, rows, 64).images_u8)
    cache = next((path / ".cache").glob(f"*.{kind}"))
    whole = cache.read_bytes()
    rng = np.random.default_rng(1)
    damaged = [whole[:len(whole) // 2], b""]
    for place in rng.integers(0, len(whole), 20):
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(data))
    for data in damaged:
        cache.write_bytes(data)
        found = decode.load_tiles(path, rows, 64)
        assert (found.images_u8 == first).all()
        assert found.rows == rows
        assert cache.read_bytes() == whole


@pytest.mark.parametrize(("numbers", "sealed"), [
    ([2], False), ([9], False), ([], True), ([3, 4], True), ([9], True), ([-1], True), ([True], True), ([3, 3], True),
    (["3"], True), (None, True)])
def test_the_list_of_unreadable_tiles_is_checked(folder, numbers, sealed):
    """Another list beside the same pixels (one bit makes 2 of 3), or one under its right hash that does not account for
    every tile: decoded again, and no row meets another's image."""
    path, rows = folder
    (path / rows[3]["file_name"]).write_bytes(b"torn")
    first = decode.load_tiles(path, rows, 64)
    assert first.rows == [*rows[:3], rows[4]]
    pixels, listing = (next((path / ".cache").glob(f"*.{kind}")) for kind in ("npy", "json"))
    whole = listing.read_bytes()
    record = json.loads(whole)
    record["unreadable"] = numbers and [[number, "why"] for number in numbers]
    if sealed:
        record["sha256"] = decode._seal(pixels, record["unreadable"])
    listing.write_text(json.dumps(record), encoding="utf-8")
    found = decode.load_tiles(path, rows, 64)
    assert found.rows == first.rows
    assert (found.images_u8 == first.images_u8).all()
    assert listing.read_bytes() == whole


def test_many_cores_decode_few_large_pictures_at_once(folder, monkeypatch):
    """With 16 threads large pictures are decoded by two, as each thread keeps their memory, and the others by more;
    images and reasons are in their rows' order."""
    path, _ = folder
    rows = [{"file_name": f"images/{k}.png"} for k in range(24)]
    for k, row in enumerate(rows):
        (path / row["file_name"]).write_bytes(encoded(noise(90 if k % 2 else 40, k))[:-40 if k in (4, 5) else None])
    large, small, real = set(), set(), decode.decode

    def watched(data):
        image = real(data)
        (large if image.shape[0] == 90 else small).add(threading.get_ident())
        time.sleep(0.02)
        return image

    monkeypatch.setattr(decode, "decode", watched)
    monkeypatch.setattr(decode, "LARGE", 50 ** 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    found = decode.load_tiles(path, rows, 16)
    assert found.rows == rows[:4] + rows[6:]
    assert [line.split(":")[0] for line in found.unreadable] == ["images/4.png", "images/5.png"]
    for image, row in zip(found.images_u8, found.rows):
        assert (image == decode.tile((path / row["file_name"]).read_bytes(), 16)).all()
    assert len(large - {threading.get_ident()}) <= 2 < len(small)


def test_a_pipe_is_no_tile(folder):
    """A named pipe among the tiles, which nobody writes to: named as unreadable, not waited for."""
    path, rows = folder
    (path / rows[1]["file_name"]).unlink()
    os.mkfifo(path / rows[1]["file_name"])
    found = decode.load_tiles(path, rows, 64)
    assert found.unreadable == ["images/1.jpg: not a regular file: no tile"]


def test_what_a_killed_run_left_in_the_cache_is_swept(folder):
    """The next cache that is written removes an unfinished one: it may have hundreds of megabytes."""
    path, rows = folder
    (path / ".cache").mkdir()
    (path / ".cache" / ".tiles-0123.npy.abc.tmp").write_bytes(b"half")
    decode.load_tiles(path, rows, 64)
    assert {name.suffix for name in (path / ".cache").iterdir()} == {".npy", ".json"}


def test_progress_sees_every_tile(folder):
    """`progress` wraps the tiles with their total, and is not called when the cache serves."""
    path, rows = folder
    seen = []

    def progress(items, **settings):
        seen.append(settings["total"])
        return items

    decode.load_tiles(path, rows, 64, progress)
    decode.load_tiles(path, rows, 64, progress)
    assert seen == [5]


@pytest.mark.skipif(not os.environ.get("LESION_BIG"), reason="set LESION_BIG=1: loads the 8,980 real tiles twice")
def test_nine_thousand_tiles_load_quickly(tmp_path, shared):
    """The first load of 8,980 real tiles costs under 30 s of CPU a core; the second, which hashes tiles and cache,
    under one."""
    with zipfile.ZipFile(shared / "isic2024" / "ISIC_2024_Permissive_Training_Input.zip") as archive:
        archive.extractall(tmp_path)
        rows = [{"file_name": name} for name in archive.namelist()]
    for limit in (30 * os.cpu_count(), 1.0):
        wall, cpu = time.perf_counter(), time.process_time()
        found = decode.load_tiles(tmp_path, rows, 128)
        cpu = time.process_time() - cpu
        print(f"{len(found.rows)} tiles: {time.perf_counter() - wall:.2f} s, CPU {cpu:.2f} s")
        assert cpu < limit
    assert stat.S_ISREG(next((tmp_path / ".cache").glob("*.npy")).stat().st_mode)
