"""What every reader of tiles gives: which tiles there are, whose they are, how to read them; and the tables joined to
it.

Tables are read twice, for the few columns that decide the sample and then for the sampled tiles only: 400,000 rows of
55 columns never stand in memory. Proven by tests/tiles/test_isic.py.
"""
import contextlib
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from lesion.run import files
from lesion.tiles.tables import CAPTION_COLUMNS, DIAGNOSES, LABEL_COLUMNS, PICTURES, Table, agree, columns, header_of, label_of, some, typed

SUFFIXES = {"." + ending for ending in PICTURES}
NO_NAME = re.compile(r"^\.|[/\\:\x00-\x1f\x7f]")
ID_BYTES = 200  # of a file name's 255: room for its ending and for a temporary name


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
    skipped: Counter = field(default_factory=Counter)  # why files or rows were passed over -> how many
    unlabelled: Counter = field(default_factory=Counter)  # folders that say no class -> their pictures
    remote: bool = False

    def account(self) -> str:
        """One line: how many tiles are read, how much was passed over and why."""
        why = "; ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        return f"{len(self.where)} tiles to read; passed over: {why or 'nothing'}"


def tile_id(value: object, place: str) -> str:
    """An identifier from a source, checked to be a file's name and never a path. The one rule for every reader.

    Unicode's composed form (NFC). ValueError, naming `place`, for none, for separators of any system, a drive's colon,
    control characters, a dot in front, or more than ID_BYTES.
    """
    name = files.plain_id(value)
    if name is None:
        raise ValueError(f"{place}: no isic_id")
    if not name.isascii():
        name = unicodedata.normalize("NFC", files.check_text(name, f"{place}: isic_id"))
    if NO_NAME.search(name):
        raise ValueError(f"{place}: the id {name!r} is not allowed: an id names a file, so no / \\ : or control "
                         f"characters, and no "
                         "dot in front")
    if len(name) > ID_BYTES // 4 and len(name.encode()) > ID_BYTES:
        raise ValueError(f"{place}: the id {name[:40]!r}... is longer than {ID_BYTES} bytes")
    return name


def read_labels(table: Table, source: Source, label_map: dict[str, str] | None = None) -> None:
    """Put the labels of a table into `source`: from the first of LABEL_COLUMNS, which others that say a label may not
    contradict, or one column a diagnosis (ISIC 2019).

    `label_map`: word -> benign, malignant or skip. ValueError names the line of a label that is missing, wrong or
    twice.
    """
    names, label_map = header_of(table), label_map or {}
    present = [name for name in LABEL_COLUMNS if name in names]
    classes = [] if present else [name for name in names if name.lower() in DIAGNOSES]
    if "isic_id" in names and not present and len(classes) < 3:
        raise ValueError(f"{table.name} has no column malignant or target: it has {some(names)}")
    wanted = present[:1] or classes
    rule = {**DIAGNOSES, **label_map} if classes or wanted == ["dx"] else label_map
    if classes or wanted == ["dx"]:
        named = classes or [name.upper() for name in DIAGNOSES]
        groups = {label: ", ".join(n for n in named if rule[n.lower()] == label)
                  for label in ("malignant", "benign", "skip")}
        said = "; ".join(f"{label} are {group}" for label, group in groups.items() if group)
        source.notes.append(f"{table.name}: {said} (--label-map NAME=LABEL changes it)")
    seen = {}
    for line, (isic_id, *values) in columns(table, ["isic_id", *wanted, *present[1:]], required="isic_id"):
        place = f"{table.name}, line {line}"
        if isic_id is None:
            raise ValueError(f"{place}: no isic_id")
        if isic_id not in source.where:
            isic_id = tile_id(isic_id, place)
        if classes:
            chosen = [name for name, value in zip(classes, values) if _share(value, place) >= 0.5]
            if len(chosen) != 1:
                raise ValueError(f"{place}, {isic_id}: {len(chosen)} of the columns {', '.join(classes)} are 1, "
                                 f"expected one")
            label = rule[chosen[0].lower()]
        elif values[0] is None and wanted[0] not in ("malignant", "target", "label"):
            label = "skip"  # isic-cli leaves the column empty for pictures without a diagnosis
        else:
            said = {wanted[0]: label_of(values[0], f"{place}, {isic_id}", rule)}
            for name, value in zip(present[1:], values[1:]):
                with contextlib.suppress(ValueError):  # none, or a diagnosis
                    said[name] = label_of(value, place, label_map)
            label = agree(said, f"{place}, {isic_id}")
        if seen.setdefault(isic_id, label) != label:
            raise ValueError(f"{place}: {isic_id} is listed twice, as {seen[isic_id]} and as {label}")
        if label == "skip":
            if source.where.pop(isic_id, None) is not None:
                source.skipped["tiles whose label is none or mapped to skip"] += 1
            continue
        if source.labels.setdefault(isic_id, label) != label:
            raise ValueError(f"{place}: {isic_id} is {label} here and {source.labels[isic_id]} elsewhere in the source")


def _share(value, place):
    try:
        return float(value or 0)
    except ValueError:
        raise ValueError(f"{place}: {value!r} is not a number") from None


def read_groups(table: Table, source: Source) -> None:
    """Patients, lesions and captions of a table; the first table that names one wins. Equal values share their
    memory."""
    names = header_of(table)
    caption = next((name for name in CAPTION_COLUMNS if name in names), "")
    if "isic_id" not in names or not {"patient_id", "lesion_id", caption} & set(names):
        return
    shared = {}
    wanted = ["isic_id", "patient_id", "lesion_id", caption]
    for _, (isic_id, patient, lesion, text) in columns(table, wanted, only=source.where):
        if patient:
            source.patients.setdefault(isic_id, shared.setdefault(patient, patient))
        if lesion:
            source.lesions.setdefault(isic_id, shared.setdefault(lesion, lesion))
        if text and caption:
            source.given.setdefault(isic_id, {}).setdefault("text", text)


def metadata(source: Source, ids: Iterable[str]) -> dict[str, dict]:
    """All columns with a value of the tiles `ids`, joined on isic_id over the source's tables; numbers as numbers."""
    wanted = {isic_id: {} for isic_id in ids}
    for table in source.tables:
        names = header_of(table)
        if "isic_id" in names:
            for _, (isic_id, *values) in columns(table, ["isic_id", *names], only=wanted):
                for name, value in zip(names, values):
                    if value is not None and name not in ("isic_id", "", *CAPTION_COLUMNS):
                        wanted[isic_id].setdefault(name, typed(name, value))
    return wanted


def matched(source: Source) -> Source:
    """Only tiles that have a label, in order of isic_id; what was left out is noted."""
    if not source.where:
        found = f": it holds {source.skipped.total()} other files, {source.account().partition('; ')[2]}" \
            if source.skipped else ""
        raise ValueError(f"no tiles ({', '.join(sorted(SUFFIXES))}) found in this {source.layout}{found}")
    unlabelled, absent = source.where.keys() - source.labels.keys(), source.labels.keys() - source.where.keys()
    if source.unlabelled and unlabelled and not source.tables:
        folder, count = source.unlabelled.most_common(1)[0]
        raise ValueError(f"the folder {folder!r} ({count} pictures) is neither benign nor malignant: say what its "
                         f"tiles are with "
                         f"--label-map {shlex.quote(folder + '=malignant')} (or =benign, or =skip)")
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
    if re.search(r"isic[_-]2024|train-image|train-metadata", name, re.IGNORECASE):
        return "ISIC 2024", "CC-BY-NC"
    return name, None


def label_table_of(name: str) -> str:
    """The label table's name that goes with an official archive's (..._Input.zip -> ..._GroundTruth.csv)."""
    return re.sub(r"(_Input)?\.zip$", "_GroundTruth.csv", name)
