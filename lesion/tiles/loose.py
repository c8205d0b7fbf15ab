"""Loose tiles in a folder: by class, with captions beside them (kohya), or listed in a Hugging Face imagefolder.

Proven by tests/tiles/test_isic.py.
"""
import os
from pathlib import Path

from lesion.run import files
from lesion.tiles.decode import read_tile
from lesion.tiles.names import Names, arrange, is_hidden
from lesion.tiles.source import Source, origin_of, tile_id
from lesion.tiles.tables import CAPTION_COLUMNS, LABEL_COLUMNS, SPLITS, columns, file_table, header_of, split_of, take_label


def folder(folder: Path, label_map: dict[str, str] | None = None) -> Source:
    """Loose tiles, however nested; labels and split by folder names where these say so, captions from files beside
    them."""
    names, linked = walk(folder)
    found = arrange(names, lambda name: _bytes(folder / name), label_map)
    if linked:
        found.skipped["links that lead out of the source"] += linked
    return _from_paths("folder", folder, {i: str(folder / name) for i, name in found.where.items()}, found)


def walk(folder: Path) -> tuple[list[str], int]:
    """(paths of the files below `folder` with forward slashes, in order; how many links lead out of it and are passed
    over).

    ValueError for a folder that cannot be listed.
    """
    names, linked = [], 0

    def stop(error):
        raise ValueError(f"{error.filename} cannot be listed: {error.strerror}")

    for place, folders, here in os.walk(folder, onerror=stop):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        inner = os.path.relpath(place, folder).replace(os.sep, "/")
        for name in sorted(here):
            path = os.path.join(place, name)
            if os.path.islink(path) and not files.within(path, folder):
                linked += 1
            else:
                names.append(name if inner == "." else f"{inner}/{name}")
        linked += sum(os.path.islink(os.path.join(place, f)) for f in folders)
    return names, linked


def _bytes(path):
    """A file's bytes; ValueError says why not."""
    try:
        return read_tile(path)
    except (OSError, ValueError) as error:
        raise ValueError(getattr(error, "strerror", None) or str(error)) from None


def _from_paths(layout: str, folder: Path, where: dict, found: Names) -> Source:
    def read(ids):
        for isic_id in ids:
            try:
                yield isic_id, _bytes(where[isic_id])
            except ValueError as error:
                yield isic_id, error

    def stamp(isic_id):
        status = os.stat(where[isic_id])
        return [status.st_size, status.st_mtime_ns]

    def origin(isic_id):
        parts = [*Path(where[isic_id]).relative_to(folder).parts[:-1], *(t.name for t in source.tables)]
        known = [origin_of(part) for part in (*parts, folder.resolve().name)]
        return next((o for o in known if o[1]), known[-1])

    source = Source(layout, where, read, stamp, origin, labels=found.labels, given=found.given,
                    suffix=lambda i: os.path.splitext(where[i])[1].lower(), notes=found.notes, skipped=found.skipped,
                    unlabelled=found.unlabelled)
    return source


def listings(folder: Path) -> list[Path]:
    """metadata.jsonl, or metadata.csv or another table with a file_name column, in `folder` or its train, val, test
    folders."""
    found = []
    for place in [folder, *(p for p in sorted(folder.iterdir()) if p.is_dir() and p.name.lower() in SPLITS)]:
        if (place / files.MANIFEST).is_file():
            found.append(place / files.MANIFEST)
        elif (place / "metadata.csv").is_file() and "file_name" in header_of(file_table(place / "metadata.csv")):
            found.append(place / "metadata.csv")
        else:
            found += [path for path in sorted(place.glob("*.csv")) if not is_hidden(path.name) and _lists_files(path)]
    return found


def _lists_files(path):
    try:
        names = header_of(file_table(path))
    except ValueError:
        return False
    return "file_name" in names and any(name in names for name in LABEL_COLUMNS)


def imagefolder(folder: Path, tables: list[Path], label_map: dict[str, str] | None = None) -> Source:
    """The tiles that the `listings` of a folder name, with labels and all that came with them.

    ValueError for a row without a label or with a file outside the folder, and for captions beside the tiles that no
    row has.
    """
    where, found, listed = {}, Names(), set()
    for listing in tables:
        rows, notes = (files.read_manifest(listing.parent), []) if listing.suffix == ".jsonl" else _csv_rows(listing)
        found.notes += notes
        for number, row in enumerate(rows, 1):
            place = f"{listing.name}, row {number}"
            path = listing.parent / row.pop("file_name")
            listed.add(os.path.relpath(path, folder).replace(os.sep, "/"))
            isic_id = tile_id(row.pop("isic_id", None) or path.stem, place)
            label = take_label(row, place, label_map)
            if isic_id in where or isic_id in found.labels:
                raise ValueError(f"{place}: {isic_id} is listed twice")
            split = row.pop("split", None) or (listing.parent.name if listing.parent != folder else None)
            if label == "skip":
                found.skipped["tiles whose label is mapped to skip"] += 1
                continue
            found.labels[isic_id] = label
            if not path.is_file():
                continue
            if not files.within(path, listing.parent):
                raise ValueError(f"{place}: {path.name} is a link that leads out of the data set: put the file itself "
                                 f"there")
            where[isic_id] = str(path)
            caption = next((name for name in CAPTION_COLUMNS if row.get(name)), None)
            if caption not in (None, "text"):
                row["text"] = row.pop(caption)
            found.given[isic_id] = {**row, **({"split": split_of(split, place)} if split else {})}
    _unlisted(folder, listed, where, found)
    source = _from_paths("imagefolder", folder, where, found)
    source.patients = {i: r["patient_id"] for i, r in found.given.items() if r.get("patient_id") is not None}
    source.lesions = {i: r["lesion_id"] for i, r in found.given.items() if r.get("lesion_id") is not None}
    return source


def _unlisted(folder, listed, where, found):
    """Count what lies in an imagefolder and is not in its listing."""
    names, linked = walk(folder)
    beside = {os.path.relpath(path, folder).replace(os.sep, "/"): i for i, path in where.items()}
    texts = [name for name in names if name.lower().endswith((".txt", ".caption")) and not is_hidden(name)]
    stems = {os.path.splitext(name)[0]: i for name, i in beside.items()}
    for text in texts:
        isic_id = stems.get(os.path.splitext(text)[0]) or beside.get(os.path.splitext(text)[0])
        if isic_id and not found.given[isic_id].get("text"):
            raise ValueError(f"{text} is a caption that the listing does not have: give it there as text")
    own = {"attributes.png"} if "dataset.json" in names else set()  # a prepared set's
    known = {*listed, *texts, *own}
    rest = arrange([name for name in names if name not in known], lambda name: b"", same=lambda a, b: True)
    found.skipped.update(rest.skipped)
    if rest.where:
        found.skipped["tiles that are not listed"] += len(rest.where)
    if linked:
        found.skipped["links that lead out of the source"] += linked


def _csv_rows(path: Path) -> tuple[list[dict], list[str]]:
    table = file_table(path)
    names = header_of(table)
    rows, seen = [], set()
    for line, values in columns(table, names, required="file_name"):
        place = f"{path.name}, line {line}"
        row = {name: value for name, value in zip(names, values) if value is not None and name}
        row["file_name"] = files.inside(row.get("file_name"), place)
        if row["file_name"] in seen:
            raise ValueError(f"{place}: {row['file_name']!r} is listed twice")
        seen.add(row["file_name"])
        if "attributes" in row:
            try:
                row["attributes"] = files.parse_json(row["attributes"])
            except ValueError as error:
                raise ValueError(f"{place}: attributes is not JSON ({error})") from None
        files.check_row(row, f"{place}, {row['file_name']}")
        rows.append(row)
    return rows, table.notes
