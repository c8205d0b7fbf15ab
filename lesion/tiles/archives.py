"""Tiles in an archive on this machine: the official zip, or several, and Kaggle's hdf5 file, read in place.

Proven by tests/tiles/test_isic.py.
"""
import io
import os
import re
import zipfile
import zlib
from pathlib import Path

from lesion.tiles.source import Source, is_tile, origin_of
from lesion.tiles.tables import Table


def zip_members(archive: zipfile.ZipFile, name: str) -> dict[str, zipfile.ZipInfo]:
    """Tiles of a zip by isic_id; ValueError if one id is there twice with different bytes."""
    members = {}
    for member in archive.infolist():
        if is_tile(member.filename):
            isic_id = os.path.splitext(member.filename.rpartition("/")[2])[0]
            if members.setdefault(isic_id, member).CRC != member.CRC:
                raise ValueError(f"{name} holds {isic_id} twice with different bytes: {members[isic_id].filename}, "
                                 f"{member.filename}")
    return members


def is_table(name: str) -> bool:
    """Whether a path inside an archive is metadata.csv or a Supplement."""
    return re.search(r"(^|/)(metadata|[^/.][^/]*Supplement[^/]*)\.csv$", name) is not None


def zip_tables(archive: zipfile.ZipFile) -> list[Table]:
    """metadata.csv and its like inside a zip."""
    return [Table(n, lambda n=n: io.TextIOWrapper(archive.open(n), encoding="utf-8-sig", newline=""))
            for n in filter(is_table, archive.namelist())]


def zips(paths: list[Path]) -> Source:
    """The tiles of zip files; ValueError if one is damaged, or an id is there twice with different bytes."""
    where, tables, archives = {}, [], []
    for number, path in enumerate(paths):
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{path} is not a readable zip file: {error}") from None
        archives.append(archive)
        for isic_id, member in zip_members(archive, path.name).items():
            if where.setdefault(isic_id, (number, member))[1].CRC != member.CRC:
                raise ValueError(f"{isic_id} differs between {paths[where[isic_id][0]].name} and {path.name}: "
                                 "give one of the two as --source")
        tables += zip_tables(archive)

    def read(ids):
        for isic_id in ids:
            number, member = where[isic_id]
            try:
                yield isic_id, archives[number].read(member)
            except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, EOFError) as error:
                yield isic_id, ValueError(f"{paths[number].name}: {error}")

    return Source("zip", where, read, lambda i: [where[i][1].file_size, where[i][1].CRC],
                  lambda i: origin_of(paths[where[i][0]].name), tables,
                  suffix=lambda i: os.path.splitext(where[i][1].filename)[1].lower())


def hdf5(path: Path) -> Source:
    """The tiles of Kaggle's train-image.hdf5: one dataset of encoded bytes a tile, named by its isic_id."""
    import h5py
    try:
        handle = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is not a readable hdf5 file: {error}") from None
    where, size = dict.fromkeys(handle.keys()), path.stat().st_size

    def read(ids):
        import numpy as np
        for isic_id in ids:
            try:
                yield isic_id, np.asarray(handle[isic_id][()]).tobytes()
            except (OSError, KeyError, RuntimeError) as error:
                yield isic_id, ValueError(f"{path.name}: {error}")

    return Source("hdf5 file", where, read, lambda i: [int(handle[i].dtype.itemsize) * int(handle[i].size), size],
                  lambda i: origin_of(path.name))
