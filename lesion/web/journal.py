"""An append-only journal of answers: one JSON object a line, on disk (fsync) before `append` returns.

How to use it:

    journal = Journal(folder / "ann.jsonl")      # ValueError if another process has it open; check=f judges each row
    journal.rows, journal.bad                    # the good rows in order; (line number, reason) of the other lines
    with journal.lock:                           # look and append in one step, against other threads and tabs
        if not any(row["tile"] == tile for row in journal.rows):
            journal.append({"tile": tile, "answer": 4})
    rows, bad = read_journal(path)               # to look from another process, without the lock

Nothing is ever rewritten: later rows overrule earlier ones by what the app makes of them, so an undo is a row too. A
line that is no JSON object (a hand edit, a file cut in the middle) is skipped and reported with its number, and its
bytes stay; a last line torn by a crash is closed with a newline, so that the next row starts on its own. A write that
fails (disk full) is taken back, so that the file never holds half a row that the caller was told is lost.
This is not the rule of lesion.run.files.append_jsonl, which cuts a torn last line off, on purpose: what a machine wrote
is written again, and a resumed log must equal an uninterrupted one byte for byte; what a person said cannot be had
again, so no byte of theirs is ever removed, and one bad line must not shut the journal (read_jsonl would raise).
One process writes a journal: the file is locked (flock) while it is open. Proven by tests/web/test_journal.py.
"""
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no lock between processes
    fcntl = None

from lesion.run import files
from lesion.run.files import parse_json


class Journal:
    """Rows of an append-only file, for one process and any number of threads."""

    def __init__(self, path: Path, check: Callable[[dict], None] | None = None):
        """Open or create `path`; `check` as in `read_journal`. ValueError if another process has it open."""
        self.path = Path(path)
        self.lock = threading.RLock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0) | files.NO_LINKS, 0o644)
        try:
            if fcntl:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.rows, self.bad = read_journal(self.path, check)
            self._close_last_line()
        except BlockingIOError:
            os.close(self._file)
            raise ValueError(f"{self.path} is open in another process: use that one, or stop it first") from None
        except BaseException:
            os.close(self._file)
            raise
        if is_new:
            _fsync_folder(self.path.parent)

    def append(self, row: dict) -> None:
        """Write `row` and fsync; only then is it in `rows`. OSError if the disk refuses: the file is as before.
        ValueError for a value JSON cannot hold (NaN included)."""
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with self.lock:
            before = os.fstat(self._file).st_size
            try:
                _write_all(self._file, line)
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, before)
                raise
            self.rows.append(row)

    def close(self) -> None:
        """Release the file; the rows stay readable."""
        with self.lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def _close_last_line(self) -> None:
        if not os.fstat(self._file).st_size:
            return
        os.lseek(self._file, -1, os.SEEK_END)
        if os.read(self._file, 1) != b"\n":
            _write_all(self._file, b"\n")
            os.fsync(self._file)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read_journal(path: Path, check: Callable[[dict], None] | None = None) -> tuple[list[dict], list[tuple[int, str]]]:
    """The good rows in order, and (line number, reason) of every other line; both empty without a file.

    A good row is a JSON object for which `check`, where given, raises no ValueError (as on a senseless hand edit).
    """
    path = Path(path)
    rows, bad = [], []
    if not path.exists():
        return rows, bad
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            bad.append((number, f"not JSON ({error})"))
            continue
        if not isinstance(row, dict):
            bad.append((number, f"expected a JSON object, got {type(row).__name__}"))
            continue
        try:
            if check:
                check(row)
            rows.append(row)
        except ValueError as error:
            bad.append((number, str(error)))
    return rows, bad


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data):]


def _fsync_folder(folder: Path) -> None:
    if os.name == "posix":  # a new file is durable only once its folder is
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
