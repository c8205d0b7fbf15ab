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

RATIO = 200  # a table packs 5 to 10 times; what unpacks to more than this times its size is made to fill a memory


def _open_zip(path: Path) -> zipfile.ZipFile:
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
    """ValueError for a table that would unpack to more than TABLE_BYTES, or RATIO times its packed size."""
    if member.file_size > TABLE_BYTES or member.file_size > max(1 << 24, RATIO * member.compress_size):
        raise ValueError(f"{member.filename} would unpack from {member.compress_size:,} to {member.file_size:,} bytes: "
                         f"that is no "
                         "table of tiles")


def check_tile(member: zipfile.ZipInfo) -> None:
    """ValueError for a tile that would unpack to more than TILE_BYTES."""
    if member.file_size > TILE_BYTES:
        raise ValueError(f"{member.filename} would unpack to {member.file_size:,} bytes: a tile has at most "
                         f"{TILE_BYTES >> 20} MiB")


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
            return archives[number_of[name]].read(members[name])
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
