"""Files that survive a crash: atomic writes and the sweep of what kills leave, append-only JSON lines, hashes, and the tile manifest.

Standard library only, so that every command can import it before it has parsed its flags.
A manifest is `metadata.jsonl` in a folder (the Hugging Face imagefolder convention), one JSON object a tile:
`file_name` (relative to the folder) and, where known, `text`, `label`, `split`, `patient_id`, `attributes`,
`source`, `license`; synthetic tiles add `prompt`, `seed`, `sampler`, `steps`, `guidance_scale`, `base_sha256`,
`lora_sha256`.
Proven by tests/run/test_files.py.
"""
import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MANIFEST = "metadata.jsonl"
DATASET = "dataset.json"  # how the set was made: beside the manifest
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)  # a link is not opened for it: what we write stays in its folder
TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # as mkstemp names them in `atomic_path`
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
MISSING = {"", "na", "n/a", "nan", "null", "none", "<na>"}
IDS = frozenset({"isic_id", "patient_id", "lesion_id"})
TEXTS = frozenset({"text", "caption", "prompt", "split", "sha256", "source", "license", "attribution"})
DEEPEST = 100  # lists and objects within each other
LONGEST_NUMBER = 300  # digits: a float has 308
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON escapes half a surrogate pair, and the halves of a whole one
KNOWN = (IDS | TEXTS | {"label", "attributes", "metadata"}) - {"prompt"}  # of these a hole is None; an empty prompt is a prompt


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it over `path`, on failure remove it.

    A reader sees the old file or the whole new one, never a part: rename(2) is atomic within a file system.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            _mark(handle)
        if os.name != "posix":
            os.close(handle)  # Windows renames no open file
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        if os.name == "posix":
            os.close(handle)


def _mark(handle: int) -> None:
    """Hold a lock on the temporary file: `sweep` of another process sees that its writer lives. OSError if it is held."""
    if fcntl:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sweep(folder: Path, deep: bool = True) -> list[Path]:
    """Remove the temporary files that killed writers left in `folder` and, if `deep`, below it; those of the living stay.

    Links are not followed. Returns what was removed; nothing on Windows, where the living cannot be told from the dead.
    """
    gone = []
    if not fcntl:
        return gone
    for place, inner, names in os.walk(folder):
        for path in (Path(place, name) for name in names if TEMPORARY.fullmatch(name)):
            with contextlib.suppress(OSError):  # held by its writer, or gone meanwhile
                handle = os.open(path, os.O_RDONLY | NO_LINKS)
                try:
                    _mark(handle)
                finally:
                    os.close(handle)
                path.unlink()
                gone.append(path)
        if not deep:
            inner.clear()
    return gone


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_folder(folder: Path) -> None:
    if os.name == "posix":  # the rename itself is durable only once its folder is
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict:
    """The JSON object in a file; ValueError, naming the file, if it holds anything else."""
    try:
        value = parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def parse_json(data: bytes | str) -> object:
    """The value of a JSON text; ValueError for anything else, and for what no honest writer writes and readers would
    stumble over: text too large for memory, nesting over DEEPEST, half a surrogate pair, a whole number that no float
    can hold."""
    text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except MemoryError:
        raise ValueError("too large for this machine's memory") from None
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(value, DEEPEST):
        raise ValueError("nested too deeply")
    if HALF.search(text):
        check_text(json.dumps(value, ensure_ascii=False), "it")
    return value


def _whole(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


_DECODER = json.JSONDecoder(parse_int=_whole)


def _is_deep(value: object, left: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left < 0 or any(_is_deep(item, left - 1) for item in inner)


def append_jsonl(path: Path, *rows: dict) -> None:
    """Append rows to a JSON-lines file and fsync. A torn last line left by a crash is cut off first; a whole one that
    only lacks its newline (an editor's work) gets it. For what a machine writes and can write again; people's answers
    are never cut: lesion.web.journal."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with open(path, "ab+", opener=lambda name, flags: os.open(name, flags | NO_LINKS, 0o666)) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                whole = file.read()
                start = whole.rfind(b"\n") + 1
                try:
                    parse_json(whole[start:])
                    data = b"\n" + data
                except ValueError:
                    file.truncate(start)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path, whole: bool = False) -> list[dict]:
    """Rows of a JSON-lines file. A torn last line (a crash in mid-write) is dropped, unless the file was to be `whole`;
    any other bad line raises ValueError with its number."""
    rows = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            if number == len(lines) and not whole:
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}"
                             + (": write one object a line, not one list" if isinstance(row, list) else ""))
        rows.append(row)
    return rows


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write rows as JSON lines, atomically."""
    write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def is_missing(value: object) -> bool:
    """Whether a value says that there is none: None, NaN, nothing, or NA, nan, null, none in any case."""
    return value is None or value != value or (isinstance(value, str) and value.strip().lower() in MISSING)


def plain_id(value: object) -> str | None:
    """An identifier as text, None where missing: 7, 7.0 and "7.0" are all "7", as a column with a hole turns whole
    numbers into floats."""
    if is_missing(value):
        return None
    text = str(value).strip()
    return text[:-2] if text.endswith(".0") and text[:-2].isdigit() else text


def inside(name: object, place: str) -> str:
    """A file name from a source as a relative path with forward slashes, without "./"; ValueError, naming `place`, for
    what is no text, holds control characters, or leads out of its folder."""
    if not isinstance(name, str) or is_missing(name):
        raise ValueError(f"{place}: no `file_name`")
    path = name.replace("\\", "/")
    if path.startswith("/") or ".." in path.split("/") or re.match("[A-Za-z]:", path):
        raise ValueError(f"{place}: {name!r} leads out of the data set")
    if CONTROL.search(path):
        raise ValueError(f"{place}: {name!r} holds a control character")
    return PurePosixPath(path).as_posix()


def within(path: Path, folder: Path) -> bool:
    """Whether a path lies in `folder` once every link is followed."""
    return os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))


def read_manifest(folder: Path) -> list[dict]:
    """Rows of `folder`/metadata.jsonl; ValueError if absent, empty, without `file_name`, or with one listed twice.

    What is missing, however written (`is_missing`), is None; ids are text (`plain_id`). ValueError, too, names the row
    of a value of the wrong type: a caption that is a number or a list, attributes that are no object.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is not a prepared data set: it has no {MANIFEST} (see `python -m lesion prepare`)")
    rows = read_jsonl(path, whole=True)
    if not rows:
        raise ValueError(f"{path} is empty")
    seen = set()
    for number, row in enumerate(rows, 1):
        name = row["file_name"] = inside(row.get("file_name"), f"{path}, row {number}")
        if name in seen:
            raise ValueError(f"{path}, row {number}: {name!r} is listed twice")
        seen.add(name)
        check_row(row, f"{path}, row {number}, {name}")
    return rows


def check_row(row: dict, place: str) -> None:
    """Put the known values of a manifest's row into their types: missing ones None, ids text. ValueError names
    `place`."""
    for name, value in row.items():
        if value != value or name in KNOWN and is_missing(value):  # NaN, which is no JSON, in any column
            row[name] = None
    for name in row.keys() & IDS:
        if not isinstance(row[name], str | int | float | None):
            raise ValueError(f"{place}: {name} is of type {type(row[name]).__name__}, expected text or a number")
        row[name] = plain_id(row[name])
    for name in row.keys() & TEXTS:
        check_text(row[name], f"{place}: {name}")
    if not isinstance(row.get("label"), str | int | float | None):
        raise ValueError(f"{place}: label is of type {type(row['label']).__name__}, expected text or a number")
    for name in ("attributes", "metadata"):
        if not isinstance(row.get(name), dict | None):
            raise ValueError(f"{place}: {name} is of type {type(row[name]).__name__}, expected an object of name: "
                             f"value")
    if not isinstance(row.get("suggested"), dict | None):
        raise ValueError(f"{place}: suggested is of type {type(row['suggested']).__name__}, expected an object of attributes and text")
    if row.get("suggested"):
        check_row(row["suggested"], f"{place}: suggested")
    if row.get("metadata"):
        row["metadata"] = {name: value for name, value in row["metadata"].items() if value == value}


def check_text(value: object, place: str) -> str | None:
    """`value` if it is text that UTF-8 can hold, or None; ValueError, naming `place`, otherwise."""
    if value is not None and not isinstance(value, str):
        hint = ": give one caption a tile" if isinstance(value, list) else ""
        raise ValueError(f"{place} is of type {type(value).__name__}, expected text{hint}")
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place} holds half of a surrogate pair: that is no text") from None
    return value


def write_manifest(folder: Path, rows: Iterable[dict]) -> None:
    """Write `folder`/metadata.jsonl atomically."""
    write_jsonl(Path(folder) / MANIFEST, rows)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in 1 MiB pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_bytes(data: bytes | memoryview) -> str:
    """Hex SHA-256 of bytes or of anything that shows its bytes (a contiguous array)."""
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: object) -> str:
    """Hex SHA-256 of a value's canonical JSON (sorted keys, no spaces): the key of every cache."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
