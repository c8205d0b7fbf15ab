"""csv tables of tiles, read row by row: 400,000 rows of 55 columns never stand in memory. Labels and numbers in them.

Proven by tests/tiles/test_isic.py.
"""
import csv
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LABELS = {"0": "benign", "0.0": "benign", "benign": "benign",
          "1": "malignant", "1.0": "malignant", "malignant": "malignant"}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
MISSING = {"", "na", "nan", "null", "none"}


@dataclass
class Table:
    """A csv table: its name for messages, and how to open it as text."""
    name: str
    open: Callable[[], io.TextIOBase]


def file_table(path: str | Path, flag: str = "") -> Table:
    """The csv file at `path`; ValueError naming `flag` if there is none."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{flag} {path} does not exist")
    return Table(path.name, lambda: open(path, encoding="utf-8-sig", newline=""))


def columns(table: Table, wanted: Iterable[str], required: str | None = None,
            only: dict | None = None) -> Iterator[tuple[int, list[str | None]]]:
    """(line number, values of `wanted` in order; None where missing, empty or NA) of each row of a csv table.

    `only`: rows whose first wanted value is in it. ValueError without the column `required` or on a ragged row.
    """
    with table.open() as text:
        try:
            reader = csv.reader(text)
            header = [name.strip() for name in next(reader, [])]
            if required and required not in header:
                raise ValueError(f"{table.name} has no column {required}: it has {some(header)}")
            places = [header.index(name) if name in header else None for name in wanted]
            for row in reader:
                if row and len(row) != len(header):
                    raise ValueError(f"{table.name}, line {reader.line_num}: {len(row)} columns, the header has "
                                     f"{len(header)}")
                if row and (only is None or row[places[0]].strip() in only):
                    yield reader.line_num, [None if i is None or row[i].strip().lower() in MISSING else row[i].strip()
                                            for i in places]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{table.name} is not a readable csv file: {error}") from None


def header_of(table: Table) -> list[str]:
    """Column names of a csv table."""
    with table.open() as text:
        try:
            return [name.strip() for name in next(csv.reader(text), [])]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{table.name} is not a readable csv file: {error}") from None


def some(names: list[str]) -> str:
    """The first six of `names`, for a message."""
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "no columns"


def label_of(value: object, place: str) -> str:
    """"benign" or "malignant" from 0 or 1, however written, or the word; ValueError names the place otherwise."""
    if isinstance(value, bool | int | float):
        value = float(value)
    label = LABELS.get(str(value).strip().lower())
    if label is None:
        raise ValueError(f"{place}: label {value!r} is not allowed: use 0 or benign, 1 or malignant")
    return label


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
