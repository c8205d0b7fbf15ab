"""Readers of lesion tiles: what each published layout holds, by isic_id, without touching a pixel.

Layouts (ISIC 2024 / SLICE-3D, Kurtansky et al. 2024, doi:10.1038/s41597-024-03743-w, as archive and Kaggle publish it):
  the official zip (or several), read in place, or its folder however nested, with *_GroundTruth.csv beside it, and
  where present *_Supplement.csv and metadata.csv; the same zip at an http(s) URL (lesion/tiles/remote.py);
  Kaggle's train-metadata.csv with train-image/image/*.jpg or train-image.hdf5;
  folders named benign and malignant (also under train, val, test; also kohya's "10_malignant"); a Hugging Face
  imagefolder (metadata.jsonl or .csv with file_name: a prepared data set is one); kohya captions (.txt, .caption)
  beside any loose tiles.
Tables are read twice, for the few columns that decide the sample and then for the sampled tiles only: 400,000 rows of
55 columns never stand in memory. Proven by tests/tiles/test_isic.py.
"""
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lesion.run import files
from lesion.tiles.tables import SPLITS, Table, columns, file_table, header_of, label_of, some, split_of, typed

SUFFIXES = {".jpg", ".jpeg", ".png"}
LABEL_COLUMNS = ("malignant", "target", "label")
CLASS_FOLDER = re.compile(r"^(?:\d+_)?(benign|malignant)\b", re.IGNORECASE)  # kohya: "10_malignant lesion"
LABEL_TABLES = ("*GroundTruth*.csv", "train-metadata.csv")
MORE_TABLES = ("*Supplement*.csv", "metadata.csv")


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


def open_source(path: str | Path, ground_truth: str | Path | None = None, workers: int = 4) -> Source:
    """Recognise the layout at `path` (folder, zip, hdf5, csv, URL); read which tiles, labels, patients, lesions it has.

    `ground_truth`: the label csv, where it is not beside the tiles. Tiles without a label and labels without a tile are
    left out and counted in `notes`. `workers`: connections to a URL. ValueError says what is missing, wrong or twice.
    """
    if str(path).startswith(("http://", "https://")):
        from lesion.tiles import remote
        source, label_tables = remote.open_url(str(path), ground_truth, workers)
    else:
        source, label_tables = _open_local(Path(path), ground_truth)
    for table in label_tables:
        _read_labels(table, source)
    for table in source.tables:
        _read_groups(table, source)
    return _matched(source)


def _open_local(path: Path, ground_truth) -> tuple[Source, list[Table]]:
    if not path.exists():
        raise ValueError(f"--source {path} does not exist: give the folder, zip, hdf5 file or URL of the tiles")
    if path.suffix.lower() == ".csv" and path.is_file():
        path, ground_truth = path.parent, ground_truth or path
    if path.is_dir() and (listings := _imagefolder_listings(path)):
        return _imagefolder(path, listings), []
    folder = path if path.is_dir() else path.parent
    source, names = _tiles(path, folder)
    labels = [file_table(ground_truth, "--ground-truth")] if ground_truth else _tables(folder, LABEL_TABLES)
    if len(labels) > 1:  # several releases may share a folder: only their own labels belong to the tiles
        labels = [t for t in labels if t.name.lower() in names] or labels
    if not labels and not source.labels:
        raise ValueError(f"{path}: no labels found: expected *_GroundTruth.csv or train-metadata.csv beside the tiles, "
                         "folders named benign and malignant, or --ground-truth CSV")
    source.tables = labels + _tables(folder, MORE_TABLES) + source.tables
    return source, labels


def _tiles(path: Path, folder: Path) -> tuple[Source, set[str]]:
    """The tiles at `path`, and the names their label tables would have."""
    suffix = path.suffix.lower() if path.is_file() else ""
    if suffix in (".hdf5", ".h5"):
        return _hdf5(path), {"train-metadata.csv"}
    if suffix not in ("", ".zip"):
        raise ValueError(f"--source {path} is not a folder, .zip, .hdf5 or .csv file")
    zips = [path] if suffix else sorted(folder.glob("*.zip"), key=lambda p: ("Permissive" not in p.name, p.name))
    if zips:
        return _zips(zips), {label_table_of(p.name).lower() for p in zips}
    if (folder / "train-image.hdf5").is_file() and not (folder / "train-image").is_dir():
        return _hdf5(folder / "train-image.hdf5"), {"train-metadata.csv"}
    return _folder(folder), set()


def label_table_of(name: str) -> str:
    """The label table's name that goes with an official archive's (..._Input.zip -> ..._GroundTruth.csv)."""
    return re.sub(r"(_Input)?\.zip$", "_GroundTruth.csv", name)


def _tables(folder: Path, patterns: Iterable[str]) -> list[Table]:
    """csv tables in `folder` and one level below (the archive's doubly nested folder)."""
    found = [p for pattern in patterns for p in sorted([*folder.glob(pattern), *folder.glob("*/" + pattern)])]
    return [file_table(p) for p in found]


def _read_labels(table: Table, source: Source) -> None:
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


def _read_groups(table: Table, source: Source) -> None:
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


def _matched(source: Source) -> Source:
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


# --- layouts ---------------------------------------------------------------------------------------------------------

def is_tile(name: str) -> bool:
    """Whether a path inside an archive or folder is a tile (macOS leaves ._ twins behind)."""
    base = name.rpartition("/")[2]
    return os.path.splitext(base)[1].lower() in SUFFIXES and not base.startswith(".")


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


def _zips(paths: list[Path]) -> Source:
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


def _hdf5(path: Path) -> Source:
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


def _folder(folder: Path) -> Source:
    """Loose tiles, however nested; labels and split by folder names where these say so, captions from sidecars."""
    where, labels, given = {}, {}, {}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        inner = Path(place).relative_to(folder).parts
        label = next((m.group(1).lower() for part in reversed(inner) if (m := CLASS_FOLDER.match(part))), None)
        split = next((SPLITS[part.lower()] for part in inner if label and part.lower() in SPLITS), None)
        sidecars = {n for n in names if n.endswith((".txt", ".caption"))}
        for name in sorted(filter(is_tile, names)):
            isic_id, path = os.path.splitext(name)[0], os.path.join(place, name)
            if isic_id in where:
                raise ValueError(f"{isic_id} is there twice: {where[isic_id]} and {path}")
            where[isic_id] = path
            extra = {"split": split} if split else {}
            if sidecar := next((isic_id + end for end in (".txt", ".caption") if isic_id + end in sidecars), None):
                extra["text"] = Path(place, sidecar).read_text(encoding="utf-8-sig").strip()
            if label:
                labels[isic_id] = label
            if extra:
                given[isic_id] = extra
    return _from_paths("folder", folder, where, labels, given)


def _from_paths(layout: str, folder: Path, where: dict, labels: dict, given: dict) -> Source:
    def read(ids):
        for isic_id in ids:
            try:
                yield isic_id, Path(where[isic_id]).read_bytes()
            except OSError as error:
                yield isic_id, ValueError(error.strerror or str(error))

    def stamp(isic_id):
        status = os.stat(where[isic_id])
        return [status.st_size, status.st_mtime_ns]

    def origin(isic_id):
        parts = [*Path(where[isic_id]).relative_to(folder).parts[:-1], *(t.name for t in source.tables)]
        known = [origin_of(part) for part in (*parts, folder.resolve().name)]
        return next((o for o in known if o[1]), known[-1])

    source = Source(layout, where, read, stamp, origin, labels=labels, given=given,
                    suffix=lambda i: os.path.splitext(where[i])[1].lower())
    return source


def _imagefolder_listings(folder: Path) -> list[Path]:
    """metadata.jsonl, or metadata.csv with a file_name column, in `folder` or its train, val, test folders."""
    listings = []
    for place in [folder, *(p for p in sorted(folder.iterdir()) if p.is_dir() and p.name.lower() in SPLITS)]:
        if (place / files.MANIFEST).is_file():
            listings.append(place / files.MANIFEST)
        elif (place / "metadata.csv").is_file() and "file_name" in header_of(file_table(place / "metadata.csv")):
            listings.append(place / "metadata.csv")
    return listings


def _imagefolder(folder: Path, listings: list[Path]) -> Source:
    where, labels, given, missing = {}, {}, {}, []
    for listing in listings:
        rows = files.read_manifest(listing.parent) if listing.suffix == ".jsonl" else _csv_rows(listing)
        for number, row in enumerate(rows, 1):
            place = f"{listing.name}, row {number}"
            path = listing.parent / row.pop("file_name")
            isic_id = str(row.pop("isic_id", None) or path.stem)
            value = next((row.pop(name) for name in LABEL_COLUMNS if row.get(name) is not None), None)
            if value is None:
                raise ValueError(f"{place}: no label: expected a column label, malignant or target")
            if isic_id in where:
                raise ValueError(f"{place}: {isic_id} is listed twice")
            split = row.pop("split", None) or (listing.parent.name if listing.parent != folder else None)
            labels[isic_id] = label_of(value, place)
            if not path.is_file():
                missing.append(isic_id)
                continue
            where[isic_id] = str(path)
            given[isic_id] = {**row, **({"split": split_of(split, place)} if split else {})}
    source = _from_paths("imagefolder", folder, where, labels, given)
    source.patients = {i: str(r["patient_id"]) for i, r in given.items() if r.get("patient_id") is not None}
    source.lesions = {i: str(r["lesion_id"]) for i, r in given.items() if r.get("lesion_id") is not None}
    return source


def _csv_rows(path: Path) -> list[dict]:
    table = file_table(path)
    names = header_of(table)
    rows = []
    for line, values in columns(table, names, required="file_name"):
        row = {name: value for name, value in zip(names, values) if value is not None}
        if "file_name" not in row:
            raise ValueError(f"{path.name}, line {line}: no file_name")
        if "attributes" in row:
            row["attributes"] = json.loads(row["attributes"])
        rows.append(row)
    return rows
