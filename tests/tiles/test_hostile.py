"""Hostile sources: nothing is read outside the source or written outside the folder, sizes are not believed, no
traceback."""
import io
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib

import h5py
import layouts
import numpy as np
import pytest
from PIL import Image

from lesion import prepare
from lesion.run import files
from lesion.tiles import archives, decode, isic, remote, tables
from lesion.tiles import hdf5 as hdf5_tiles

PATHS = ["../../../x", "/tmp/x", "a/../../x", "..\\x", "C:\\x", "C:x", "..", "a\0b", "x\ny"]


def run(source, out, *flags):
    prepare.main(["--source", str(source), "--out", str(out), "--prompts", "fixed", *map(str, flags)])
    return files.read_manifest(out)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- paths -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("column", ["isic_id", "file_name"])
def test_a_listing_leads_nowhere(tmp_path, name, kind, column):
    """An isic_id or file_name that is a path out of the set is refused in jsonl and csv; no file appears anywhere."""
    source = tmp_path / "in"
    (source / "t").mkdir(parents=True)
    rows = [{"file_name": f"t/{k}.jpg", "label": k % 2, "isic_id": f"I{k}"} for k in range(4)]
    for row in rows:
        (source / row["file_name"]).write_bytes(layouts.jpeg(1, 20))
    rows[2][column] = name
    if kind == "jsonl":
        (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        layouts.write_csv(source / "metadata.csv", list(rows[0]), [list(row.values()) for row in rows])
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"row 3|line \d"):
        run(source, tmp_path / "out", "--split", "image")
    assert tree(tmp_path) == before


def test_links_that_lead_out_are_not_followed(tmp_path):
    """A linked tile or folder of a source is counted, not read, in loose folders and listings; a link inside is
    fine."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "s.jpg").write_bytes(layouts.jpeg(5, 20))
    folder = layouts.class_folders(tmp_path / "in")
    os.symlink(secret / "s.jpg", folder / "benign" / "s.jpg")
    os.symlink(secret, folder / "malignant" / "more")
    os.symlink(next((folder / "benign").glob("ISIC*")), folder / "benign" / "inside.jpg")
    source = isic.open_source(folder)
    assert "s" not in source.where
    assert "inside" in source.where
    assert source.skipped["links that lead out of the source"] == 2
    listed = layouts.imagefolder(tmp_path / "listed")
    path = listed / "tiles" / f"{layouts.IDS[0]}.jpg"
    path.unlink()
    os.symlink(secret / "s.jpg", path)
    with pytest.raises(ValueError, match="row 1: .* is a link that leads out of the data set"):
        isic.open_source(listed)


def hdf5(path, **tiles):
    with h5py.File(path, "w") as file:
        for isic_id, data in layouts.TILES.items():
            file[isic_id] = np.void(data)
        for name, value in tiles.items():
            del file[layouts.IDS[int(name[1:])]]
            value(file, layouts.IDS[int(name[1:])])
    layouts.ground_truth(path.parent, "ISIC_2024")
    return path


def test_hdf5_reads_only_itself(tmp_path):
    """External storage, external and soft links, virtual and huge datasets, groups and numbers are named as
    unreadable."""
    secret = tmp_path / "secret.bin"
    secret.write_bytes(layouts.jpeg(3, 20))
    size = secret.stat().st_size
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = np.void(layouts.jpeg(3, 20))
        other["y"] = np.frombuffer(layouts.jpeg(3, 20), np.uint8)

    def virtual(file, name):
        layout = h5py.VirtualLayout((size,), np.uint8)
        layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "y", (size,))
        file.create_virtual_dataset(name, layout)

    def put(key, value):
        return lambda file, name: file.__setitem__(name, value)

    path = hdf5(tmp_path / "train-image.hdf5",
                t0=lambda file, name: file.create_dataset(name, (size,), np.uint8, external=[(str(secret), 0, size)]),
                t1=put(1, h5py.ExternalLink(str(tmp_path / "other.h5"), "x")), t2=put(2, h5py.SoftLink("/" + layouts.IDS[9])),
                t3=virtual, t4=lambda file, name: file.create_group(name),
                t5=lambda file, name: file.create_dataset(name, (1 << 40,), np.uint8, chunks=(1 << 20,), compression="gzip"),
                t6=put(6, 5.0), t7=put(7, np.zeros((4, 4), np.uint8)), t8=put(8, np.frombuffer(layouts.jpeg(8, 20), np.uint8)))
    source = isic.open_source(path)
    start = time.perf_counter()
    read = dict(source.read(layouts.IDS))
    assert time.perf_counter() - start < 2
    for number, why in enumerate(["stored in another file", "is a link", "is a link", "stored in another "
                                                                                      "file", "is a group",
                                  "1,099,511,627,776 bytes: a tile has at most 64 MiB", "is float64", "is uint8 .4, "
                                                                                                      "4."]):
        assert isinstance(read[layouts.IDS[number]], ValueError)
        assert why.split(" .")[0] in str(read[layouts.IDS[number]])
        assert source.stamp(layouts.IDS[number])[0] == -1
    assert read[layouts.IDS[8]] == layouts.jpeg(8, 20)
    rows = run(path, tmp_path / "out", "--split-file", layouts.split_file(tmp_path))
    assert len(rows) == len(layouts.IDS) - 8


# --- sizes -----------------------------------------------------------------------------------------------------------

def bomb(path, name, size, data=b"\0"):
    """A zip whose one member unpacks to `size` bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive, archive.open(name, "w") as member:
        piece = data * (1 << 20)
        for _ in range(size >> 20):
            member.write(piece)
    return path


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    """A tile that would unpack to 128 MiB, a table that packs a thousand times: named by their sizes, nothing is
    unpacked."""
    source = isic.open_source(bomb(tmp_path / "a.zip", "benign/x.jpg", 128 << 20))
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (_, error), = source.read(["x"])
    assert "would unpack to 134,217,728 bytes: a tile has at most 64 MiB" in str(error)
    with pytest.raises(ValueError, match=r"GroundTruth.csv would unpack from .* to 134,217,728 bytes: that is no table"):
        isic.open_source(bomb(tmp_path / "b.zip", "x_GroundTruth.csv", 128 << 20, b"\n"))
    with zipfile.ZipFile(tmp_path / "b.zip", "a") as archive:
        archive.writestr("x.jpg", b"x")
    with pytest.raises(ValueError, match="would unpack from"):
        isic.open_source(tmp_path / "b.zip")
    assert time.perf_counter() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_zip_that_lies_about_a_size(tmp_path):
    """A directory that says 10 bytes for a member of a thousand: an error, and never more than was said."""
    path = layouts.official_zip(tmp_path)
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    data[entry + 24:entry + 28] = struct.pack("<I", 10)
    path.write_bytes(data)
    source = isic.open_source(path)
    assert isinstance(dict(source.read([layouts.IDS[0]]))[layouts.IDS[0]], ValueError)
    member = zipfile.ZipInfo("x")
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    raw = packed.compress(bytes(1 << 26)) + packed.flush()
    member.compress_type, member.compress_size, member.file_size, member.CRC = zipfile.ZIP_DEFLATED, len(raw), 10, 0
    with pytest.raises(ValueError, match="bad CRC-32"):
        remote.member_bytes(b"PK\3\4" + bytes(26) + raw, member)


@pytest.mark.parametrize("damage", range(40))
def test_damaged_zips_end_in_one_line(tmp_path, damage):
    """Forty zips with forty random bytes changed, in pictures, headers, directory: ValueError or tiles, nothing
    else."""
    path = layouts.official_zip(tmp_path, metadata=True)
    rng, data = np.random.default_rng(damage), bytearray(path.read_bytes())
    low = len(data) - 4000 if damage % 2 else 0  # every second one in the directory
    for place in rng.integers(low, len(data), 40):
        data[place] = rng.integers(256)
    path.write_bytes(data)
    try:
        source = isic.open_source(path)
    except ValueError as error:
        lines = str(error).splitlines()
    else:
        lines = ["read"]
        assert {type(tile) for _, tile in source.read(list(source.where))} <= {bytes, ValueError}
    assert len(lines) == 1


@pytest.mark.parametrize("method", [99, 93, 12, 14])
def test_a_compression_that_is_not_known_is_named(tmp_path, method):
    """An encrypted (AES), Zstandard, bzip2 or LZMA member with other bytes inside: unreadable, and why."""
    path = layouts.official_zip(tmp_path)
    data = bytearray(path.read_bytes())
    for mark, place in ((b"PK\1\2", 10), (b"PK\3\4", 8)):
        entry = data.index(mark)
        data[entry + place:entry + place + 2] = struct.pack("<H", method)
    path.write_bytes(data)
    assert isinstance(dict(isic.open_source(path).read([layouts.IDS[0]]))[layouts.IDS[0]], ValueError)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_a_bomb_that_lies_about_its_size_is_not_unpacked(tmp_path, method):
    """128 MiB packed into a few kilobytes or less, said to be 1,000 bytes: an error at once, and nothing near 128 MiB."""
    path = tmp_path / "t.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("benign/x.jpg", bytes(128 << 20))
        archive.writestr("malignant/y.jpg", b"y")
    data = bytearray(path.read_bytes())
    for mark, place in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        entry = data.index(mark)
        data[entry + place:entry + place + 4] = struct.pack("<I", 1000)
    path.write_bytes(data)
    script = ("import resource, sys; from lesion.tiles import isic; source = isic.open_source(sys.argv[1]);"
              "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; (_, error), = source.read(['x']);"
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, type(error).__name__)")
    grown, kind = subprocess.run([sys.executable, "-c", script, path], check=True, capture_output=True).stdout.split()
    assert kind == b"ValueError"
    assert int(grown) < 30_000  # KiB


def test_a_gap_behind_a_member_is_not_fetched(tmp_path, monkeypatch):
    """2 MiB of nothing behind a tile of 3 bytes, as a hostile directory may have: less than 150 kB are asked for."""
    path = tmp_path / "x_Training_Input.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("benign/a.jpg", b"abc")
        archive.fp.write(bytes(2 << 20))
        archive.start_dir = archive.fp.tell()
        archive.writestr("malignant/b.jpg", b"x")
    asked, real = [], remote.Remote.read
    monkeypatch.setattr(remote.Remote, "read", lambda self, start, end: asked.append(end - start + 1) or real(self, start, end))
    with layouts.serve(tmp_path) as server:
        source = remote.open_url(f"{server.url}/{path.name}", 1)
        asked.clear()
        assert dict(source.read(["a", "b"])) == {"a": b"abc", "b": b"x"}
    assert max(asked) < 150_000


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path):
    """A named pipe called like a tile is unreadable; one called like a zip ends in one line."""
    folder = layouts.class_folders(tmp_path / "in")
    os.mkfifo(folder / "benign" / "a.jpg")
    (_, error), = isic.open_source(folder).read(["a"])
    assert str(error) == "not a regular file: no tile"
    os.mkfifo(folder / "a.zip")
    with pytest.raises(ValueError, match="a.zip is not a readable zip file: it is no file"):
        isic.open_source(folder)


def test_a_picture_of_too_many_pixels_is_not_decoded():
    """21 kB of PNG that are 13,300 squared pixels of one bit: refused by its header."""
    stream = io.BytesIO()
    Image.new("1", (13_300, 13_300)).save(stream, "PNG")
    start = time.perf_counter()
    with pytest.raises(ValueError, match="13300x13300 pixels: a tile has at most 50,000,000"):
        decode.decode(stream.getvalue())
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PPM", "ICO", "EPS", "PCX", "TGA", "JPEG2000"])
def test_no_other_decoder_is_opened(kind, monkeypatch):
    """JPEG, PNG, WebP and BMP are read; another kind, whatever its ending, meets no decoder (EPS would look for
    Ghostscript)."""
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 150, 130)).save(stream, kind)
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(ValueError, match="not a picture: JPEG, PNG, WebP and BMP are read"):
        decode.decode(stream.getvalue())


def test_a_large_file_is_no_tile(tmp_path):
    """A tile of 65 MiB in a folder is left out by its size."""
    folder = layouts.class_folders(tmp_path / "in")
    with open(folder / "benign" / "big.jpg", "wb") as file:
        file.truncate(65 << 20)
    (_, error), = isic.open_source(folder).read(["big"])
    assert str(error) == "larger than 64 MiB: no tile"


# --- the network -----------------------------------------------------------------------------------------------------

def serve(answer):
    """A server that lets `answer(connection)` say what it wants; its URL."""
    server = socket.create_server(("127.0.0.1", 0))

    def talk():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=talk, daemon=True).start()
    return server, f"http://127.0.0.1:{server.getsockname()[1]}/x_Training_Input.zip"


def dripping(connection):
    """A first answer, then headers or a body a byte at a time."""
    request = connection.recv(4096)
    head = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-0/1000000\r\nContent-Length: 1\r\n\r\n"
    if b"bytes=0-0" in request:
        connection.sendall(head + b"x")
        request = connection.recv(4096)
    if not request:
        return
    start = request.split(b"bytes=")[1].split(b"-")[0]
    connection.sendall(head.replace(b"bytes 0-0", b"bytes " + start + b"-999999").replace(b"Length: 1", b"Length: 900000"))
    try:
        while True:
            connection.sendall(b"x")
            time.sleep(0.05)
    except OSError:
        pass


def dripping_head(connection):
    """Headers that never end."""
    try:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 206 Partial Content\r\nX: ")
        while True:
            connection.sendall(b"x")
            time.sleep(0.05)
    except OSError:
        pass


def endless(connection):
    """More bytes than were asked for, without end."""
    try:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-0/100\r\n\r\n")
        while True:
            connection.sendall(bytes(1 << 16))
    except OSError:
        pass


@pytest.mark.parametrize("answer", [dripping, dripping_head])
def test_a_download_that_drips_ends(answer, monkeypatch):
    """A byte now and then keeps no one waiting longer than the limit for the whole range."""
    monkeypatch.setattr(remote, "GRACE_S", 1)
    server, url = serve(answer)
    start = time.monotonic()
    with server, pytest.raises(ValueError, match="no whole answer within"):
        remote.Remote(url).read(0, 5000)
    assert time.monotonic() - start < 5


def test_a_download_that_never_ends_is_cut(monkeypatch):
    """No more than the asked range is kept of an endless answer."""
    server, url = serve(endless)
    with server:
        assert remote.Remote(url).read(0, 99) == bytes(100)


# --- JSON ------------------------------------------------------------------------------------------------------------

DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize("data", [
    b'{"file_name": "a.jpg", "x": ' + DEEP + b"}\n", b'{"file_name": ["a"]}\n', b'{"file_name": NaN}\n', b"[]\n", b"7\n", b"null\n",
    b"\xff\xfe\n", b'{"file_name": "a.jpg", "text": 5}\n', b'{"file_name": "a.jpg", "text": ["b"]}\n',
    b'{"file_name": "a.jpg", "attributes": [1]}\n', b'{"file_name": "a.jpg", "label": {}}\n', b'{"file_name": "a.jpg", "patient_id": []}\n',
    b'{"file_name": "a.jpg", "text": "\\ud800"}\n', b'{"file_name": "a.jpg", "split": 4}\n', b'{"file_name": "a.jpg"}\n{"file_na'])
def test_a_manifest_of_wrong_types_is_named(tmp_path, data):
    """Nesting without end, wrong types, half a character, a last row cut off: ValueError with file and line, at
    once."""
    (tmp_path / "metadata.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=r"metadata.jsonl, (line|row) \d"):
        files.read_manifest(tmp_path)


@pytest.mark.parametrize("data", [DEEP, b"[]", b"{", b'{"color_norm": ["x"]}',
                                  b'{"color_norm": "skin-locus", "color_norm_reference": {"mean": 3}}',
                                  b'{"color_norm": "skin-locus", "color_norm_reference": {"mean": [1, 2], "direction": [NaN, 1]}}'])
def test_a_damaged_dataset_json_is_named(tmp_path, data):
    """The recorded normalisation is a known name with a line of four numbers, or the folder is refused."""
    (tmp_path / "dataset.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"dataset.json|is unknown: allowed are"):
        decode.recorded_norm(tmp_path)


def test_every_damage_is_a_value_error():
    """The kinds of error that libraries raise on hostile bytes are all in the list that is turned into one line."""
    import lzma
    for kind in (zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, KeyError, TypeError, MemoryError, RecursionError,
                 struct.error, UnicodeDecodeError, OverflowError, EOFError, AttributeError, IndexError):
        assert issubclass(kind, archives.DAMAGED)


# --- anything at all -------------------------------------------------------------------------------------------------

def mutations(data, count, seed):
    """`data` with bytes changed, cut out, repeated and cut off."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        found = bytearray(data)
        for _ in range(rng.integers(1, 6)):
            place, kind = int(rng.integers(len(found) + 1)), rng.integers(4)
            if kind == 0:
                found[place:place + 1] = rng.bytes(1)
            elif kind == 1:
                del found[place:place + int(rng.integers(1, 40))]
            elif kind == 2:
                found[place:place] = rng.choice([b'"', b"\0", b"\xff\xfe", b",;\t", b"nan", b"[[[", b"1e999", b"\r", b"../", b"{}"])
            else:
                found[place:place] = found[place:place + int(rng.integers(1, 200))]
        yield bytes(found[:int(rng.integers(len(found) + 1))] if rng.random() < 0.1 else found)


def judged(function, *arguments):
    """A result, or the one line of a ValueError; anything else goes through and fails the test."""
    try:
        return function(*arguments)
    except ValueError as error:
        lines = str(error).splitlines()
    assert len(lines) == 1, lines
    return None


def test_mutated_manifests(tmp_path):
    """1,000 damaged metadata.jsonl: rows of known types, or one line."""
    rows = [{"file_name": f"t/{k}.jpg", "label": k % 2, "text": "é mole", "patient_id": k, "attributes": {"color": "red"}}
            for k in range(4)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for found in mutations(data, 1000, 1):
        (tmp_path / "metadata.jsonl").write_bytes(found)
        for row in judged(files.read_manifest, tmp_path) or []:
            assert isinstance(row["file_name"], str)
            assert ".." not in row["file_name"].split("/")
            assert isinstance(row.get("text"), str | None)
            assert isinstance(row.get("patient_id"), str | None)


def test_mutated_tables(tmp_path):
    """1,000 damaged label tables: labels, or one line."""
    data = ("isic_id,target,patient_id\n" + "".join(f"ISIC_{k},{k % 2},IP_{k}\n" for k in range(6))).encode()
    path = tmp_path / "t.csv"

    def read():
        table = tables.file_table(path)
        source = isic.Source("test", {f"ISIC_{k}": 0 for k in range(6)}, None, None, None)
        isic.read_labels(table, source)
        isic.read_groups(table, source)
        return source.labels

    for coding in ("utf-8", "utf-16"):
        for found in mutations(data.decode().encode(coding), 500, 2):
            path.write_bytes(found)
            assert set((judged(read) or {}).values()) <= {"benign", "malignant"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_mutated_pictures(kind):
    """200 damaged pictures of each kind: pixels, or one line."""
    stream = io.BytesIO()
    Image.open(io.BytesIO(layouts.jpeg(1, 24))).save(stream, kind, **({"exif": Image.Exif()} if kind != "BMP" else {}))
    for found in mutations(stream.getvalue(), 200, 3):
        image = judged(decode.decode, found)
        if image is not None:
            assert image.dtype == np.uint8
            assert image.shape[2] == 3
            judged(decode.remark, found)


def test_mutated_hdf5(tmp_path):
    """60 damaged hdf5 files: tiles and errors by tile, or one line."""
    data = hdf5(tmp_path / "train-image.hdf5").read_bytes()
    for number, found in enumerate(mutations(data, 60, 4)):
        path = tmp_path / f"{number}" / "train-image.hdf5"
        path.parent.mkdir()
        path.write_bytes(found)
        source = judged(hdf5_tiles.source, path)
        if source:
            assert {type(tile) for _, tile in source.read(list(source.where))} <= {bytes, ValueError}
            assert all(len(source.stamp(i)) == 2 for i in source.where)


def test_a_picture_of_too_many_scans_is_not_decoded():
    """A progressive JPEG whose last scan comes 500 times: each would cost the time of all pixels."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 150, 130)).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    last = data.rindex(b"\xff\xda")
    with pytest.raises(ValueError, match="scans: a JPEG has at most 100"):
        decode.decode(data[:last] + data[last:-2] * 500 + data[-2:])


@pytest.mark.parametrize("how", ["hangs", "dies"])
def test_an_hdf5_library_that_does_not_come_back(tmp_path, monkeypatch, how):
    """A tile over which libhdf5 loops or crashes is unreadable after SLOWEST seconds, and so is what follows."""
    path = tmp_path / "train-image.hdf5"
    with h5py.File(path, "w") as file:
        for name in ("a", "b"):
            file[name] = np.frombuffer(b"bytes", np.uint8)
    source = hdf5_tiles.source(path)
    assert dict(source.read(["a", "b"])) == {"a": b"bytes", "b": b"bytes"}
    reader = hdf5_tiles.Reader(path)
    os.kill(reader.process.pid, signal.SIGSTOP if how == "hangs" else signal.SIGKILL)
    monkeypatch.setattr(hdf5_tiles, "SLOWEST", 0.5)
    began = time.monotonic()
    for name in ("a", "b"):
        with pytest.raises(ValueError, match="the file is damaged"):
            reader.ask("bytes", name)
    assert time.monotonic() - began < 5
