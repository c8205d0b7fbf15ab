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

from lesion.tiles.archives import is_table, zip_members
from lesion.tiles.source import Source, label_table_of, origin_of
from lesion.tiles.tables import Table, file_table

TRIES = 8          # in a row without a single byte
TIMEOUT = 10, 30   # seconds: to connect, between bytes
LOCAL_HEADER = 30  # bytes before a member's name (APPNOTE.TXT 4.3.7)


class Remote:
    """A file at a URL: its size, and any range of it. One HTTP session a thread."""

    def __init__(self, url: str, pause_s: float = 0.5):
        self.url, self.pause_s, self.local = url, pause_s, threading.local()
        self.size = self._size()

    def _session(self) -> requests.Session:
        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()
            self.local.session.headers["Accept-Encoding"] = "identity"
        return self.local.session

    def _size(self) -> int:
        for attempt in range(TRIES):
            try:
                first = {"Range": "bytes=0-0"}
                with self._session().get(self.url, headers=first, stream=True, timeout=TIMEOUT) as answer:
                    self._check(answer)
                    return int(answer.headers["Content-Range"].rpartition("/")[2])
            except requests.RequestException as error:
                self._wait(attempt, error)
        raise AssertionError

    def read(self, start: int, end: int) -> bytes:
        """Bytes start..end, both included. A broken connection is taken up again where it broke.

        Raises ValueError where the server does not serve ranges, or TRIES attempts in a row brought nothing.
        """
        data, idle = bytearray(), 0
        while len(data) <= end - start:
            before = len(data)
            error = None
            try:
                headers = {"Range": f"bytes={start + before}-{end}"}
                with self._session().get(self.url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
                    self._check(answer)
                    for piece in answer.iter_content(4096):  # a break loses one piece at most
                        data += piece
            except requests.RequestException as problem:
                error = problem
            idle = 0 if len(data) > before else idle + 1
            if len(data) <= end - start:
                self._wait(idle, error)
        return bytes(data[:end - start + 1])

    def _check(self, answer: requests.Response) -> None:
        if answer.status_code >= 500 or answer.status_code == 429:
            raise requests.HTTPError(f"HTTP {answer.status_code}")  # may pass: tried again
        if answer.status_code >= 400:
            raise ValueError(f"{self.url}: HTTP {answer.status_code} {answer.reason}: check the address")
        if answer.status_code != 206 or "Content-Range" not in answer.headers:
            raise ValueError(f"{self.url}: the server does not serve ranges: download the file and give its path")

    def _wait(self, idle: int, error: Exception | None) -> None:
        if idle >= TRIES - 1:
            raise ValueError(f"{self.url}: no answer after {TRIES} tries "
                             f"({type(error).__name__ if error else 'closed early'}): check the network; the same command "
                             "goes on from here") from None
        time.sleep(self.pause_s * 2 ** min(idle, 4))


class _Fetcher(RemoteFetcher):
    """remotezip's view of a Remote: ranges by absolute position, whole in memory."""

    def fetch(self, data_range, stream=False):
        remote, (start, end) = self._url, data_range
        start = max(0, remote.size + start) if start < 0 else start
        data = remote.read(start, remote.size - 1 if end is None else min(end, remote.size - 1))
        return PartialBuffer(io.BytesIO(data), start, len(data), stream=False)


def open_url(url: str, ground_truth: str | None, workers: int) -> tuple[Source, list[Table]]:
    """The official archive at `url` and its label table, from beside it or `ground_truth` (a path or URL)."""
    name = url.partition("?")[0].rpartition("/")[2]
    if not name.lower().endswith(".zip"):
        raise ValueError(f"--source {url}: the URL of a .zip is expected, as ISIC_2024_Permissive_Training_Input.zip's")
    remote = Remote(url)
    try:
        archive = RemoteZip(remote, fetcher=_Fetcher)
    except (zipfile.BadZipFile, RemoteZipError) as error:
        raise ValueError(f"{url} is not a readable zip file: {error}") from None
    members = zip_members(archive, name)
    starts = sorted([member.header_offset for member in archive.infolist()] + [archive.start_dir])
    ends = dict(zip(starts, starts[1:]))

    def fetch(member):
        raw = remote.read(member.header_offset, ends[member.header_offset] - 1)
        try:
            return member_bytes(raw, member)
        except ValueError as error:
            return ValueError(f"{name}: {error}")

    def read(ids) -> Iterator[tuple[str, bytes | ValueError]]:
        pool = ThreadPoolExecutor(max(workers, 8))
        try:
            yield from zip(ids, pool.map(lambda i: fetch(members[i]), ids))
        finally:
            pool.shutdown(cancel_futures=True)

    tables = [_text(member.filename, lambda m=member: fetch(m)) for member in archive.infolist()
              if is_table(member.filename)]
    source = Source("zip at a URL", members, read, lambda i: [members[i].file_size, members[i].CRC],
                    lambda i: origin_of(name), tables, remote=True,
                    suffix=lambda i: os.path.splitext(members[i].filename)[1].lower())
    labels = _labels(url, name, ground_truth)
    source.tables = [labels, *_supplement(url, name), *tables]
    return source, [labels]


def member_bytes(raw: bytes, member: zipfile.ZipInfo) -> bytes:
    """A zip member's bytes from its local header on; ValueError if damaged. Stored and deflated members."""
    if raw[:4] != b"PK\x03\x04":
        raise ValueError(f"{member.filename}: no local header at byte {member.header_offset}")
    start = LOCAL_HEADER + sum(struct.unpack("<HH", raw[26:30]))  # lengths of the name and the extra field
    data = raw[start:start + member.compress_size]
    try:
        if member.compress_type == zipfile.ZIP_DEFLATED:
            data = zlib.decompress(data, -15)
        elif member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename}: compression {member.compress_type} is not read remotely")
    except zlib.error as error:
        raise ValueError(f"{member.filename}: {error}") from None
    if zlib.crc32(data) != member.CRC:
        raise ValueError(f"{member.filename}: bad CRC-32")
    return data


def _labels(url: str, name: str, ground_truth: str | None) -> Table:
    if ground_truth and not str(ground_truth).startswith(("http://", "https://")):
        return file_table(ground_truth, "--ground-truth")
    address = ground_truth or url.replace(name, label_table_of(name))
    return _text(address.rpartition("/")[2], _whole(address))


def _supplement(url: str, name: str) -> list[Table]:
    """The archive's Supplement table, where there is one."""
    address = url.replace(name, label_table_of(name).replace("GroundTruth", "Supplement"))
    try:
        return [_text(address.rpartition("/")[2], _whole(address))]
    except ValueError as error:
        if "HTTP 404" in str(error) or "HTTP 403" in str(error):  # the archive answers 403 for what is not there
            return []
        raise


def _whole(address: str) -> bytes:
    remote = Remote(address)
    return remote.read(0, remote.size - 1)


def _text(name: str, data) -> Table:
    """A table of bytes in memory, or of what a function fetches when it is first opened."""
    kept = [] if callable(data) else [data]

    def open_text():
        if not kept:
            kept.append(data())
        if isinstance(kept[0], ValueError):
            raise kept[0]
        return io.TextIOWrapper(io.BytesIO(kept[0]), encoding="utf-8-sig", newline="")

    return Table(name, open_text)
