"""Kaggle's train-image.hdf5, read by a process of its own: libhdf5 loops for ever over some damaged files, or crashes.

The process is asked for one tile at a time and has SLOWEST seconds for an answer; then it is ended, and this tile and
all that follow are unreadable. Links and external storage are refused, sizes bounded before anything is read.
Proven by tests/tiles/test_isic.py, tests/tiles/test_hostile.py and tests/fuzz.
"""
import multiprocessing
from collections.abc import Callable
from pathlib import Path

from lesion.tiles.decode import TILE_BYTES
from lesion.tiles.source import Source, origin_of, tile_id
from lesion.tiles.tables import READ_ERRORS, bare_id

DAMAGED = (*READ_ERRORS, KeyError, TypeError, AttributeError, IndexError, RecursionError, ValueError)
SLOWEST = 6.0   # seconds for an answer: a tile takes a thousandth
STARTING = 120  # seconds until the process has imported h5py, on the busiest machine


def source(path: Path) -> Source:
    """The tiles of an hdf5 file: one dataset of encoded bytes a tile, named by its isic_id.

    A tile that is a link, stored outside the file, no bytes, larger than TILE_BYTES, or that does not come in SLOWEST
    seconds is unreadable, and why is said. ValueError for a file that cannot be opened.
    """
    reader, size, where = Reader(path), path.stat().st_size, {}
    for name in reader.names:
        isic_id = tile_id(bare_id(name), path.name)
        if where.setdefault(isic_id, name) != name:
            raise ValueError(f"{path.name} holds {isic_id} twice: {where[isic_id]} and {name}")

    def read(ids):
        for isic_id in ids:
            try:
                yield isic_id, reader.ask("bytes", where[isic_id])
            except ValueError as error:
                yield isic_id, error

    def stamp(isic_id):
        try:
            return [reader.ask("size", where[isic_id]), size]
        except ValueError:
            return [-1, size]

    return Source("hdf5 file", where, read, stamp, lambda i: origin_of(path.name))


class Reader:
    """The process that has the file open; `names` of its tiles."""

    def __init__(self, path: Path):
        self.path = path
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(str(self.path), theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._answer(STARTING, "")
        self.names: list[str] = self._answer(SLOWEST, "")

    def ask(self, what: str, name: str):
        """The "bytes" of a tile, or their number ("size"). ValueError says why there are none."""
        if not self.process.is_alive():
            raise ValueError(f"{self.path.name}: {name} was not tried: the file is damaged")
        self.pipe.send((what, name))
        return self._answer(SLOWEST, f"{name} ")

    def _answer(self, seconds: float, name: str):
        try:
            if not self.pipe.poll(seconds):
                raise EOFError
            found, value = self.pipe.recv()
        except (EOFError, OSError):
            self.process.kill()
            self.process.join()
            raise ValueError(f"{self.path.name}: {name}cannot be read: the file is damaged") from None
        if not found:
            raise ValueError(value)
        return value


def _serve(path: str, pipe) -> None:
    """In the process: say that it is there, then the names, then answer (what, name) with (True, value) or (False, why)."""
    import h5py
    import numpy as np
    pipe.send((True, None))
    name_of_file = Path(path).name
    try:
        handle = h5py.File(path, "r")
        pipe.send((True, list(handle.keys())))
    except DAMAGED as error:
        pipe.send((False, f"{path} is not a readable hdf5 file: {error or type(error).__name__}"))
        return
    answers: dict[str, Callable] = {"bytes": lambda tile: np.asarray(tile[()]).tobytes(), "size": _size}
    while True:
        try:
            what, name = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            pipe.send((True, answers[what](_dataset(handle, name))))
        except DAMAGED as error:
            pipe.send((False, f"{name_of_file}: {error or type(error).__name__}"))


def _size(tile) -> int:
    return int(tile.dtype.itemsize) * int(tile.size)


def _dataset(handle, name: str):
    """The dataset of a tile. ValueError for anything but bytes that lie in the file itself."""
    import h5py
    if not isinstance(handle.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is a link: only tiles stored in the file itself are read")
    tile = handle[name]
    if not isinstance(tile, h5py.Dataset):
        raise ValueError(f"{name} is a group, not a tile")
    if tile.external or tile.is_virtual:
        raise ValueError(f"{name} is stored in another file: only tiles stored in the file itself are read")
    if tile.dtype.kind not in "VSu" or tile.dtype.kind == "u" and tile.dtype.itemsize > 1 or tile.ndim > 1:
        raise ValueError(f"{name} is {tile.dtype} {list(tile.shape)}: the encoded bytes of a picture are expected")
    if _size(tile) > TILE_BYTES:
        raise ValueError(f"{name} has {_size(tile):,} bytes: a tile has at most {TILE_BYTES >> 20} MiB")
    return tile
