"""csv tables of tiles, read row by row: 400,000 rows of 55 columns never stand in memory. Labels and numbers in them.

Tables come as people save them: UTF-8, UTF-16 or Latin-1, with commas, semicolons, tabs or bars; what was found is said
in `Table.notes`. Proven by tests/tiles/test_tables.py.
"""
import codecs
import contextlib
import csv
import io
import lzma
import re
import shlex
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from lesion.run.files import is_missing, plain_id

# of a damaged or hostile archive or table; NotImplementedError and RecursionError are RuntimeErrors
READ_ERRORS = (OSError, EOFError, RuntimeError, UnicodeError, MemoryError, OverflowError, csv.Error, struct.error,
               zipfile.BadZipFile, zlib.error, lzma.LZMAError)
LABELS = {"0": "benign", "benign": "benign", "false": "benign",
          "1": "malignant", "malignant": "malignant", "malign": "malignant", "true": "malignant"}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
ID_COLUMNS = ("isic_id", "image_name", "image_id", "image", "filename", "id")  # ISIC 2024, 2020, HAM10000, 2019, others
LABEL_COLUMNS = ("malignant", "target", "label", "benign_malignant", "diagnosis_1", "dx")
CAPTION_COLUMNS = ("text", "caption", "prompt")
KNOWN = {*ID_COLUMNS, *LABEL_COLUMNS, *CAPTION_COLUMNS, "patient_id", "lesion_id", "split", "file_name", "attributes"}
DIAGNOSES = {"mel": "malignant", "bcc": "malignant", "scc": "malignant", "akiec": "malignant", "nv": "benign",
             "ak": "benign", "bkl": "benign", "df": "benign", "vasc": "benign", "unk": "skip"}  # ISIC 2018 to 2019, HAM10000
PICTURES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp")
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
TABLE_BYTES = 2 << 30  # Kaggle's, the largest known, has 246 MB
LINE = 1 << 20         # characters
COLUMNS = 10_000       # Kaggle's has 55
LEADS_OUT = re.compile(r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|^[A-Za-z]:")


@dataclass
class Table:
    """A csv table: its name for messages, how to open its bytes, and what is unusual about it, once it was opened."""
    name: str
    open: Callable[[], BinaryIO]
    notes: list[str] = field(default_factory=list)
    form: tuple[str, str, int] | None = None  # encoding, delimiter, lines before the header

    def say(self, note: str) -> None:
        """Add a note once."""
        if note not in self.notes:
            self.notes.append(note)


def file_table(path: str | Path, flag: str = "") -> Table:
    """The csv file at `path`; ValueError naming `flag` if there is none, or one too large to be a table."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{flag} {path} does not exist")
    if path.stat().st_size > TABLE_BYTES:
        raise ValueError(f"{flag} {path} is larger than {TABLE_BYTES >> 30} GiB: that is no table of tiles")
    return Table(path.name, lambda: open(path, "rb"))


def columns(table: Table, wanted: Iterable[str], required: str | None = None,
            only: dict | None = None) -> Iterator[tuple[int, list[str | None]]]:
    """(line number, values of `wanted` in order; None where missing, empty or NA) of each row of a csv table.

    `only`: rows whose first wanted value is in it. Column names of `KNOWN` are found in any case, ids without a
    picture's ending. Empty rows are passed over, cells missing at a row's end are empty. ValueError without the column
    `required`, or where a row has more cells than the header.
    """
    with _reader(table) as (reader, header, decimal_comma):
        if required and required not in header:
            raise ValueError(f"{table.name} has no column {required}: it has {some(header)}")
        place_of = {name: place for place, name in reversed(list(enumerate(header)))}  # of one name twice the first
        places = [(place_of.get(name), name in place_of and name.endswith("_id")) for name in wanted]
        first = places[0][0]
        for row in reader:
            if len(row) > len(header) and not any(cell.strip() for cell in row[len(header):]):
                row = row[:len(header)]
            if len(row) > len(header):
                raise ValueError(f"{table.name}, line {reader.line_num}: {len(row)} columns, the header has "
                                 f"{len(header)}")
            if not any(cell.strip() for cell in row):
                continue
            if len(row) < len(header):
                table.say(f"{table.name} has rows with fewer cells than its header: the missing ones count as empty")
                row += [""] * (len(header) - len(row))
            if only is None or bare_id(row[first]) in only:
                yield reader.line_num, [None if i is None else _value(row[i], is_id, decimal_comma)
                                        for i, is_id in places]


def header_of(table: Table) -> list[str]:
    """Column names of a csv table, those of `KNOWN` in small letters; the column of ids is called isic_id."""
    with _reader(table) as (_, header, _):
        return header


def _value(cell, is_id, decimal_comma):
    cell = cell.strip()
    if is_missing(cell):
        return None
    if is_id:
        return plain_id(bare_id(cell))
    if decimal_comma and re.fullmatch(r"-?\d+,\d+", cell):
        return cell.replace(",", ".")
    return cell


def bare_id(cell: str) -> str:
    """An id as tables write it, without spaces around, folders before and a picture's ending, in Unicode's composed
    form (NFC)."""
    cell = cell.strip()
    if ("/" in cell or "\\" in cell) and not LEADS_OUT.search(cell):  # else it stays as it is, to be refused
        cell = cell.replace("\\", "/").rpartition("/")[2]
    stem, dot, ending = cell.rpartition(".")
    cell = stem if dot and ending.lower() in PICTURES else cell
    return cell if cell.isascii() else unicodedata.normalize("NFC", cell)


@contextlib.contextmanager
def _reader(table):
    """(csv reader behind the header, header, whether numbers have a decimal comma)."""
    try:
        encoding, delimiter, before = _form(table)
        with table.open() as raw, io.TextIOWrapper(raw, encoding=encoding, newline="") as text:
            for _ in range(before):
                text.readline(LINE)
            reader = csv.reader(_lines(text, table.name), delimiter=delimiter)
            header = _header(next(reader, []))
            if len(header) > COLUMNS:
                raise ValueError(f"{table.name} has {len(header):,} columns: a table of tiles has at most {COLUMNS:,}")
            yield reader, header, delimiter == ";"
    except READ_ERRORS as error:
        raise ValueError(f"{table.name} is not a readable csv file: {error or type(error).__name__}") from None


def _lines(text, name):
    while line := text.readline(LINE):
        if len(line) >= LINE:
            raise ValueError(f"{name} is not a readable csv file: a line of over {LINE:,} characters")
        yield line


def _header(cells):
    names = [name.strip().lstrip("\ufeff") for name in cells]
    names = [name.lower() if name.lower() in KNOWN else name for name in names]
    if "isic_id" not in names and "file_name" not in names:
        for alias in ID_COLUMNS:
            if alias in names:
                names[names.index(alias)] = "isic_id"
                break
    return names


def _form(table):
    """(encoding, delimiter, lines before the header) of a table, found once; the unusual is noted."""
    if table.form is None:
        with table.open() as raw:
            start = raw.read(LINE)
            if start[:4] in (b"PK\3\4", b"\xd0\xcf\x11\xe0"):
                raise ValueError(f"{table.name} is a spreadsheet, not a csv file: save it as CSV")
            encoding = _encoding(start, raw)
        lines = start.decode(encoding, errors="replace").lstrip("\ufeff").splitlines() or [""]
        hint = re.fullmatch(r'"?sep=(.)"?', lines[0].strip(" \r\n"))
        first = lines[1] if hint and len(lines) > 1 else lines[0]
        delimiter = max(DELIMITERS, key=lambda sign: _fit(first, sign))
        if encoding not in ("utf-8", "utf-8-sig"):
            table.say(f"{table.name} is not UTF-8: read as "
                      f"{'UTF-16' if encoding.startswith('utf') else 'Latin-1 (Windows-1252)'}")
        if delimiter != ",":
            table.say(f"{table.name} is separated by {DELIMITERS[delimiter]}")
        table.form = encoding, delimiter, int(bool(hint))
    return table.form


def _encoding(start, raw):
    if start.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in start[:4]:
        return "utf-16-be" if start[:1] == b"\0" else "utf-16-le"
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        piece = start
        while piece:
            decoder.decode(piece)
            piece = raw.read(LINE)
        decoder.decode(b"", final=True)
        return "utf-8"
    except UnicodeDecodeError:
        return "cp1252" if not set(start) & {0x81, 0x8D, 0x8F, 0x90, 0x9D} else "latin-1"


def _fit(line, sign):
    """How well a delimiter splits a header: known columns first, then columns; a comma where all are equal."""
    cells = next(csv.reader([line], delimiter=sign), [])
    return sum(name.strip().lower() in KNOWN for name in cells), len(cells), sign == ","


def some(names: list[str]) -> str:
    """The first six of `names`, for a message of one line."""
    shown = ", ".join(" ".join(name.split())[:40] for name in names[:6])
    return shown + (", ..." if len(names) > 6 else "") if names else "no columns"


def label_of(value: object, place: str, label_map: dict[str, str] | None = None) -> str:
    """"benign" or "malignant" from 0 or 1, however written, or the word; `label_map` (small letters) goes before and
    may say "skip". ValueError names the place otherwise."""
    word = str(value).strip().lower()
    if label_map and word in label_map:
        return label_map[word]
    try:
        number = float(word)
        word = str(int(number)) if number in (0, 1) else word
    except ValueError:
        pass
    if word not in LABELS:
        known = value is not None and len(word) < 60 and re.fullmatch(r"[\w .,/()-]*[^\W\d][\w .,/()-]*", word)
        hint = f", or say what it means with --label-map {shlex.quote(word + '=malignant')}" if known else ""
        raise ValueError(f"{place}: label {value!r} is not allowed: use 0 or benign, 1 or malignant{hint}")
    return LABELS[word]


def take_label(row: dict, place: str, label_map: dict[str, str] | None = None) -> str:
    """`label_of` what `row`'s LABEL_COLUMNS say, which leave it; "skip" if one says that. A column that says no label
    beside one that does stays, as a diagnosis (`label` leaves: the prepared row has one of its own). ValueError, naming
    `place`, where none says anything, or two say different things."""
    said = {}
    for name in LABEL_COLUMNS:
        value = row.pop(name, None)
        if is_missing(value):
            continue
        try:
            said[name] = label_of(value, place, label_map)
        except ValueError:
            if not said:
                raise
            if name != "label":
                row[name] = value
    if not said:
        raise ValueError(f"{place}: no label: expected a column label, malignant or target")
    return agree(said, place)


def agree(said: dict[str, str], place: str) -> str:
    """The one label that all columns of `said` {column: label} say, "skip" if one says that. ValueError, naming `place`,
    where they contradict each other."""
    if "skip" in said.values():
        return "skip"
    if len(set(said.values())) > 1:
        raise ValueError(f"{place}: {' but '.join(f'{name} says {label}' for name, label in said.items())}: correct one")
    return next(iter(said.values()))


def split_of(value: object, place: str) -> str:
    """"train", "val" or "test", however spelt; ValueError names the place otherwise."""
    part = SPLITS.get(str(value).strip().lower())
    if part is None:
        raise ValueError(f"{place}: split {value!r} is not allowed: use train, val or test")
    return part


def typed(name: str, value: str) -> object:
    """A csv value as a number where it is one; ids stay text."""
    if name.endswith("_id"):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    if number != number or abs(number) == float("inf"):
        return value
    return int(number) if number.is_integer() and abs(number) < 2 ** 53 else number
