"""What every reader of tiles gives: which tiles there are, whose they are, how to read them; and the tables joined to it.

Tables are read twice, for the few columns that decide the sample and then for the sampled tiles only: 400,000 rows of
55 columns never stand in memory. Proven by tests/tiles/test_isic.py.
"""
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from lesion.tiles.tables import Table, columns, header_of, label_of, some, typed

SUFFIXES = {".jpg", ".jpeg", ".png"}
LABEL_COLUMNS = ("malignant", "target", "label")


@dataclass
class Source:
    """What a source holds. `where` has every tile: isic_id -> whatever `read` and `stamp` need to find it."""
    layout: str
    where: dict[str, object]
    read: Callable[[list[str]], Iterator[tuple[str, bytes | ValueError]]]  # isic_ids -> their bytes, or why not
    stamp: Callable[[str], list]                     # isic_id -> what changes with its bytes; of a zip [size, CRC-32]
    origin: Callable[[str], tuple[str, str | None]]  # isic_id -> (name of the data set, licence)
    tables: list[Table] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    lesions: dict[str, str] = field(default_factory=dict)
    given: dict[str, dict] = field(default_factory=dict)  # what came with a tile: split, text, attributes ...
    suffix: Callable[[str], str] = lambda isic_id: ".jpg"
    notes: list[str] = field(default_factory=list)
    remote: bool = False


def read_labels(table: Table, source: Source) -> None:
    """Put the labels of a table into `source`; ValueError names the line of one that is missing, wrong or twice."""
    names = header_of(table)
    present = [name for name in LABEL_COLUMNS if name in names]
    if "isic_id" in names and not present:
        raise ValueError(f"{table.name} has no column malignant or target: it has {some(names)}")
    seen = set()
    for line, (isic_id, value) in columns(table, ["isic_id", *present[:1]], required="isic_id"):
        place = f"{table.name}, line {line}"
        if isic_id is None:
            raise ValueError(f"{place}: no isic_id")
        if isic_id in seen:
            raise ValueError(f"{place}: {isic_id} is listed twice")
        seen.add(isic_id)
        label = label_of(value, f"{place}, {isic_id}")
        if source.labels.setdefault(isic_id, label) != label:
            raise ValueError(f"{place}: {isic_id} is {label} here and {source.labels[isic_id]} elsewhere in the source")


def read_groups(table: Table, source: Source) -> None:
    """Patients and lesions of a table; the first table that names one wins. Equal values share their memory."""
    names = header_of(table)
    if "isic_id" not in names or not {"patient_id", "lesion_id"} & set(names):
        return
    shared = {}
    for _, (isic_id, patient, lesion) in columns(table, ["isic_id", "patient_id", "lesion_id"], only=source.where):
        if patient:
            source.patients.setdefault(isic_id, shared.setdefault(patient, patient))
        if lesion:
            source.lesions.setdefault(isic_id, shared.setdefault(lesion, lesion))


def metadata(source: Source, ids: Iterable[str]) -> dict[str, dict]:
    """All columns with a value of the tiles `ids`, joined on isic_id over the source's tables; numbers as numbers."""
    wanted = {isic_id: {} for isic_id in ids}
    for table in source.tables:
        names = header_of(table)
        if "isic_id" in names:
            for _, (isic_id, *values) in columns(table, ["isic_id", *names], only=wanted):
                for name, value in zip(names, values):
                    if value is not None and name != "isic_id":
                        wanted[isic_id].setdefault(name, typed(name, value))
    return wanted


def matched(source: Source) -> Source:
    """Only tiles that have a label, in order of isic_id; what was left out is noted."""
    if not source.where:
        raise ValueError(f"no tiles (.jpg, .jpeg, .png) found in this {source.layout}")
    unlabelled, absent = source.where.keys() - source.labels.keys(), source.labels.keys() - source.where.keys()
    if len(unlabelled) == len(source.where):
        raise ValueError(f"none of the {len(source.where)} tiles has a label: is the label table of another release? "
                         f"(tile {min(source.where)}, label for {min(source.labels, default='none')})")
    if unlabelled:
        source.notes.append(f"{len(unlabelled)} tiles have no label and are left out (first: {min(unlabelled)})")
    if absent:
        source.notes.append(f"{len(absent)} labels have no tile and are left out (first: {min(absent)})")
    source.where = {isic_id: source.where[isic_id] for isic_id in sorted(source.where.keys() - unlabelled)}
    return source


def origin_of(name: str) -> tuple[str, str | None]:
    """(data set, licence) by an archive's or folder's name: the Permissive release is CC-BY, the full one CC-BY-NC."""
    if "permissive" in name.lower():
        return "ISIC 2024 Permissive", "CC-BY"
    if re.search(r"isic_2024|train-image|train-metadata", name, re.IGNORECASE):
        return "ISIC 2024", "CC-BY-NC"
    return name, None


def label_table_of(name: str) -> str:
    """The label table's name that goes with an official archive's (..._Input.zip -> ..._GroundTruth.csv)."""
    return re.sub(r"(_Input)?\.zip$", "_GroundTruth.csv", name)


def is_tile(name: str) -> bool:
    """Whether a path inside an archive or folder is a tile (macOS leaves ._ twins behind)."""
    base = name.rpartition("/")[2]
    return os.path.splitext(base)[1].lower() in SUFFIXES and not base.startswith(".")
