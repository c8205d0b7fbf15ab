"""Loose tiles in a folder: by class, with captions beside them (kohya), or listed in a Hugging Face imagefolder.

Proven by tests/tiles/test_isic.py.
"""
import json
import os
import re
from pathlib import Path

from lesion.run import files
from lesion.tiles.source import LABEL_COLUMNS, Source, is_tile, origin_of
from lesion.tiles.tables import SPLITS, columns, file_table, header_of, label_of, split_of

CLASS_FOLDER = re.compile(r"^(?:\d+_)?(benign|malignant)\b", re.IGNORECASE)  # kohya: "10_malignant lesion"


def folder(folder: Path) -> Source:
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


def listings(folder: Path) -> list[Path]:
    """metadata.jsonl, or metadata.csv with a file_name column, in `folder` or its train, val, test folders."""
    found = []
    for place in [folder, *(p for p in sorted(folder.iterdir()) if p.is_dir() and p.name.lower() in SPLITS)]:
        if (place / files.MANIFEST).is_file():
            found.append(place / files.MANIFEST)
        elif (place / "metadata.csv").is_file() and "file_name" in header_of(file_table(place / "metadata.csv")):
            found.append(place / "metadata.csv")
    return found


def imagefolder(folder: Path, tables: list[Path]) -> Source:
    """The tiles that the `listings` of a folder name, with labels and all that came with them."""
    where, labels, given, missing = {}, {}, {}, []
    for listing in tables:
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
