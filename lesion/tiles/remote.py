"""The official zip at an http(s) URL, read in place: its directory and the sampled members, by range requests.

The study's 10,000 tiles come without the 1.2 GB download. remotezip finds the directory; every range, the directory's
too, is fetched with retries that go on from the last byte received. Proven by tests/tiles/test_isic.py against a local
server that drops connections.
"""
import io
import os
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import requests
from remotezip import PartialBuffer, RemoteFetcher, RemoteZip, RemoteZipError

from lesion.tiles.archives import DAMAGED, check_table, check_tile, tables_in, zip_names
from lesion.tiles.names import arrange
from lesion.tiles.source import Source, label_table_of, origin_of
from lesion.tiles.tables import TABLE_BYTES, Table

TRIES = 8          # in a row without a single byte
TIMEOUT = 10, 30   # seconds: to connect, between bytes
GRACE_S, SLOWEST = 300, 8192  # a range may take so many seconds, and one more for each so many bytes
LOCAL_HEADER = 30  # bytes before a member's name (APPNOTE.TXT 4.3.7)
LONGEST_HEADER = LOCAL_HEADER + 2 * 0xFFFF  # with its name and its extra field


class Absent(ValueError):
    """There is nothing at an address."""


class Unreachable(ValueError):
    """The network or the server fails: not one tile's fault."""


class Remote:
    """A file at a URL: its size, and any range of it. One HTTP session a thread."""

    def __init__(self, url: str, pause_s: float = 0.5):
        self.url, self.pause_s, self.local = url, pause_s, threading.local()
        self.size = self._in_time(GRACE_S, self._size, self._session())

    def _session(self) -> requests.Session:
        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()
            self.local.session.headers["Accept-Encoding"] = "identity"
        return self.local.session

    def _size(self, session) -> int:
        for attempt in range(TRIES):
            try:
                first = {"Range": "bytes=0-0"}
                with session.get(self.url, headers=first, stream=True, timeout=TIMEOUT) as answer:
                    self._check(answer)
                    size = answer.headers["Content-Range"].rpartition("/")[2]
                    if not size.isdigit():
                        raise ValueError(f"{self.url}: the server does not say how large the file is: download it and "
                                         f"give its path")
                    return int(size)
            except requests.RequestException as error:
                self._wait(attempt, error)
        raise AssertionError

    def read(self, start: int, end: int) -> bytes:
        """Bytes start..end, both included. A broken connection is taken up again where it broke.

        Raises ValueError where the server does not serve ranges, TRIES attempts in a row brought nothing, or less than
        SLOWEST bytes a second come after the first GRACE_S.
        """
        if end - start > TABLE_BYTES:
            raise ValueError(f"{self.url}: {end - start + 1:,} bytes at once: that is no archive of tiles")
        limit = GRACE_S + (end - start) / SLOWEST
        return self._in_time(limit, self._read, self._session(), start, end, time.monotonic() + limit)

    def _in_time(self, limit_s: float, function, *arguments):
        """What `function` returns or raises; Unreachable after `limit_s`. A server that sends a byte now and then holds
        a thread of its own, not us."""
        result = []

        def run():
            try:
                result.append(function(*arguments))
            except Exception as error:  # carried to the caller's thread
                result.append(error)

        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        worker.join(limit_s)
        if not result:
            raise Unreachable(f"{self.url}: no whole answer within {limit_s:.0f} s: check the network; the same "
                              f"command goes on "
                              "from here")
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]

    def _read(self, session, start, end, deadline) -> bytes:
        data, idle = bytearray(), 0
        while len(data) <= end - start:
            before = len(data)
            error = None
            try:
                headers = {"Range": f"bytes={start + before}-{end}"}
                with session.get(self.url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
                    self._check(answer, start + before)
                    for piece in answer.iter_content(4096):  # a break loses one piece at most
                        data += piece
                        if len(data) > end - start or time.monotonic() > deadline:
                            break
            except requests.RequestException as problem:
                error = problem
            idle = 0 if len(data) > before else idle + 1
            if len(data) <= end - start:
                self._wait(idle, error)
        return bytes(data[:end - start + 1])

    def _check(self, answer: requests.Response, start: int = 0) -> None:
        if answer.status_code >= 500 or answer.status_code == 429:
            raise requests.HTTPError(f"HTTP {answer.status_code}")  # may pass: tried again
        if answer.status_code in (403, 404):  # the archive answers 403 for what is not there
            raise Absent(f"{self.url}: HTTP {answer.status_code} {answer.reason}: check the address")
        if answer.status_code >= 400:
            raise ValueError(f"{self.url}: HTTP {answer.status_code} {answer.reason}: check the address")
        if answer.status_code != 206 or "Content-Range" not in answer.headers:
            raise ValueError(f"{self.url}: the server does not serve ranges: download the file and give its path")
        if not answer.headers["Content-Range"].startswith(f"bytes {start}-"):
            raise ValueError(f"{self.url}: asked for bytes from {start}, the server sent "
                             f"{answer.headers['Content-Range']!r}")

    def _wait(self, idle: int, error: Exception | None) -> None:
        if idle >= TRIES - 1:
            raise Unreachable(f"{self.url}: no answer after {TRIES} tries "
                              f"({type(error).__name__ if error else 'closed early'}): "
                              "check the network; the same command goes on from here") from None
        time.sleep(self.pause_s * 2 ** min(idle, 4))


class _Fetcher(RemoteFetcher):
    """remotezip's view of a Remote: ranges by absolute position, whole in memory."""

    def fetch(self, data_range, stream=False):
        remote, (start, end) = self._url, data_range
        start = max(0, remote.size + start) if start < 0 else start
        data = remote.read(start, remote.size - 1 if end is None else min(end, remote.size - 1))
        return PartialBuffer(io.BytesIO(data), start, len(data), stream=False)


def open_url(url: str, workers: int, label_map: dict[str, str] | None = None) -> Source:
    """The zip at `url`: its tiles and the tables inside it; `workers` connections fetch tiles."""
    name = url.partition("?")[0].rpartition("/")[2]
    if not name.lower().endswith(".zip"):
        raise ValueError(f"--source {url}: the URL of a .zip is expected, as ISIC_2024_Permissive_Training_Input.zip's")
    remote = Remote(url)
    try:
        archive = RemoteZip(remote, fetcher=_Fetcher)
    except (Absent, Unreachable):
        raise
    except (RemoteZipError, *DAMAGED) as error:
        raise ValueError(f"{url} is not a readable zip file: {error or type(error).__name__}") from None
    members = zip_names(archive, name.rpartition(".")[0])
    starts = sorted({member.header_offset for member in archive.infolist()} | {archive.start_dir})
    ends = dict(zip(starts, starts[1:]))

    def ranges(member, check):
        check(member)
        if member.header_offset not in ends:
            raise ValueError(f"{name}: {member.filename} lies outside the archive")
        most = member.header_offset + LONGEST_HEADER + member.compress_size  # a gap behind a member is not fetched
        return member.header_offset, min(ends[member.header_offset], most) - 1

    def fetch(member, check=check_tile):
        return member_bytes(remote.read(*ranges(member, check)), member)

    def fetch_tile(isic_id):
        member = members[where[isic_id]]
        try:
            place = ranges(member, check_tile)
        except ValueError as error:
            return error
        raw = remote.read(*place)  # what fails here is the network's fault and ends the run
        try:
            return member_bytes(raw, member)
        except ValueError as error:
            return ValueError(f"{name}: {error}")

    def read(ids) -> Iterator[tuple[str, bytes | ValueError]]:
        pool = ThreadPoolExecutor(max(workers, 8))
        try:
            yield from zip(ids, pool.map(fetch_tile, ids))
        finally:
            pool.shutdown(cancel_futures=True)

    def same(a, b):
        return (members[a].CRC, members[a].file_size) == (members[b].CRC, members[b].file_size)

    found = arrange(members, lambda path: fetch(members[path]), label_map, same)
    where = found.where
    tables = [_table(members[path].filename, lambda m=members[path]: fetch(m, check_table))
              for path in tables_in(members)]
    return Source("zip at a URL", where, read, lambda i: [members[where[i]].file_size, members[where[i]].CRC],
                  lambda i: origin_of(name), tables, found.labels, given=found.given, remote=True,
                  suffix=lambda i: os.path.splitext(where[i])[1].lower(), notes=found.notes, skipped=found.skipped,
                  unlabelled=found.unlabelled)


def member_bytes(raw: bytes, member: zipfile.ZipInfo) -> bytes:
    """A zip member's bytes from its local header on; ValueError if damaged. Stored and deflated members."""
    if raw[:4] != b"PK\x03\x04" or len(raw) < LOCAL_HEADER:
        raise ValueError(f"{member.filename}: no local header at byte {member.header_offset}")
    start = LOCAL_HEADER + sum(struct.unpack("<HH", raw[26:30]))  # lengths of the name and the extra field
    data = raw[start:start + member.compress_size]
    try:
        if member.compress_type == zipfile.ZIP_DEFLATED:
            unpacker = zlib.decompressobj(-15)
            data = unpacker.decompress(data, member.file_size + 1)  # no more than was said
        elif member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename}: compression {member.compress_type} is not read remotely")
    except zlib.error as error:
        raise ValueError(f"{member.filename}: {error}") from None
    if zlib.crc32(data) != member.CRC:
        raise ValueError(f"{member.filename}: bad CRC-32")
    return data


def table_at(address: str) -> Table:
    """The csv table at a URL, fetched whole."""
    remote = Remote(address)
    if remote.size > TABLE_BYTES:
        raise ValueError(f"{address} has {remote.size:,} bytes: that is no table of tiles")
    data = remote.read(0, remote.size - 1)
    return _table(address.partition("?")[0].rpartition("/")[2], lambda: data)


def tables_beside(url: str, labels_given: bool = False) -> tuple[list[Table], list[Table], str]:
    """(label table, Supplement, what is absent) of the tables that go with an official archive's URL, each where there
    is one; the label table is not fetched where labels are given."""
    name = url.partition("?")[0].rpartition("/")[2]
    label = label_table_of(name)
    found, absent = {}, []
    for other in ([] if labels_given else [label]) + [label.replace("GroundTruth", "Supplement")]:
        try:
            found[other] = [table_at(url.replace(name, other))]
        except Absent as error:
            absent.append(str(error))
    return found.pop(label, []), sum(found.values(), []), "; ".join(absent)


def _table(name, fetch):
    """A table whose bytes a function fetches when it is first opened."""
    kept = []

    def open_bytes():
        if not kept:
            kept.append(fetch())
        return io.BytesIO(kept[0])

    return Table(name, open_bytes)
