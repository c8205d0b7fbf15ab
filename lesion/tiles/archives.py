"""Tiles in an archive on this machine: the official zip, or several, and Kaggle's, read in place.

What an archive says of itself is not believed: sizes are bounded before anything is unpacked.
Proven by tests/tiles/test_isic.py and tests/tiles/test_hostile.py.
"""
import os
import re
import zipfile
from pathlib import Path

from lesion.tiles.decode import TILE_BYTES
from lesion.tiles.hdf5 import DAMAGED
from lesion.tiles.names import arrange, is_hidden
from lesion.tiles.source import Source, origin_of
from lesion.tiles.tables import TABLE_BYTES, Table

PACKED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED  # bzip2 and LZMA make gigabytes of a kilobyte before one can count them
RATIO = 200  # a table packs 5 to 10 times; what unpacks to more than this times its size is made to fill a memory


def _open_zip(path: Path) -> zipfile.ZipFile:
    if not path.is_file():
        raise ValueError(f"{path} is not a readable zip file: it is no file")
    try:
        return zipfile.ZipFile(path)
    except DAMAGED as error:
        raise ValueError(f"{path} is not a readable zip file: {error or type(error).__name__}") from None


def zip_names(archive: zipfile.ZipFile, top: str) -> dict[str, zipfile.ZipInfo]:
    """The files of a zip: path with forward slashes (Windows zips have others) below `top`, the archive's own name.

    ValueError for one path twice with different bytes.
    """
    members = {}
    for member in archive.infolist():
        name = member.filename.replace("\\", "/")
        if not name.endswith("/") and members.setdefault(f"{top}/{name.lstrip('/')}", member).CRC != member.CRC:
            raise ValueError(f"{top}.zip holds {name} twice with different bytes")
    return members


def zip_table(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Table:
    """A csv table inside a zip; opening it raises ValueError where it would unpack to too much."""
    def open_member():
        check_table(member)
        return archive.open(member)

    return Table(member.filename, open_member)


def check_table(member: zipfile.ZipInfo) -> None:
    """ValueError for a table that would unpack to more than TABLE_BYTES, or RATIO times its packed size, or is packed in
    another way than PACKED."""
    _check_packing(member)
    if member.file_size > TABLE_BYTES or member.file_size > max(1 << 24, RATIO * member.compress_size):
        raise ValueError(f"{member.filename} would unpack from {member.compress_size:,} to {member.file_size:,} bytes: "
                         f"that is no "
                         "table of tiles")


def check_tile(member: zipfile.ZipInfo) -> None:
    """ValueError for a tile that would unpack to more than TILE_BYTES, or comes from more, or is packed in another way
    than PACKED."""
    _check_packing(member)
    if (size := max(member.file_size, member.compress_size)) > TILE_BYTES:
        raise ValueError(f"{member.filename} would unpack to {size:,} bytes: a tile has at most {TILE_BYTES >> 20} MiB")


def _check_packing(member: zipfile.ZipInfo) -> None:
    if member.compress_type not in PACKED:
        raise ValueError(f"{member.filename}: compression {member.compress_type} is not read: only stored and deflated members are")


def tables_in(members: dict[str, zipfile.ZipInfo]) -> list[str]:
    """The paths of csv tables in a zip, those of other parts (Kaggle's test part and sample) left out."""
    return [name for name in members if name.lower().endswith(".csv") and not is_hidden(name)
            and not re.match(r"test-|sample_submission", name.rpartition("/")[2], re.IGNORECASE)]


def zips(paths: list[Path], label_map: dict[str, str] | None = None) -> Source:
    """The tiles of zip files, and their tables; ValueError if one is damaged, or an id is there twice with different
    bytes."""
    archives = [_open_zip(path) for path in paths]
    members, number_of = {}, {}
    for number, (path, archive) in enumerate(zip(paths, archives)):
        for name, member in zip_names(archive, path.stem).items():
            members[name], number_of[name] = member, number

    def unpack(name):
        check_tile(members[name])
        try:
            with archives[number_of[name]].open(members[name]) as file:
                return file.read(members[name].file_size + 1)  # read() would unpack all there is before it is cut
        except DAMAGED as error:
            raise ValueError(f"{paths[number_of[name]].name}: {error or type(error).__name__}") from None

    def same(a, b):
        return (members[a].CRC, members[a].file_size) == (members[b].CRC, members[b].file_size)

    found = arrange(members, unpack, label_map, same)
    where = found.where

    def read(ids):
        for isic_id in ids:
            try:
                yield isic_id, unpack(where[isic_id])
            except ValueError as error:
                yield isic_id, error

    return Source("zip", where, read, lambda i: [members[where[i]].file_size, members[where[i]].CRC],
                  lambda i: origin_of(paths[number_of[where[i]]].name),
                  [zip_table(archives[number_of[name]], members[name]) for name in tables_in(members)], found.labels,
                  given=found.given, suffix=lambda i: os.path.splitext(where[i])[1].lower(), notes=found.notes,
                  skipped=found.skipped, unlabelled=found.unlabelled)
