"""Folds over all tiles of a data set, for cross-fitting: who belongs together, and each fold as a prepared data set of its own.

The unit is the patient. Where a tile's patient is unknown its unit is the tile with its exact and near copies, and no split can
promise more: two tiles of one patient may then lie in different folds. If such a set has parts of its own (a split file that keeps
patients apart, as for the ISIC 2024 sample), its held-out part is fold 0 as a whole, so that of this fold at least the promise holds.
Proven by tests/classify/test_folds.py.
"""
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from lesion.classify import arms
from lesion.run import files
from lesion.tiles import seen
from lesion.tiles.decode import load_tiles
from lesion.tiles.split import fingerprint, near_copies

UNIT = "unit"  # the manifest column of a fold's data set that names who a tile belongs to


def units_of(data: Path, rows: list[dict], progress=None) -> list[str]:
    """The unit of each row: "patient ..." where known, else "tile ..." of its first exact or near copy in the set.

    Near copies are found by fingerprint (lesion.tiles.split); a patient's tile and a copy without a patient are one unit.
    """
    tiles = load_tiles(data, rows, 64, progress)
    place = {row["file_name"]: i for i, row in enumerate(rows)}
    prints = np.stack([fingerprint(image) for image in tiles.images_u8])
    number = [place[row["file_name"]] for row in tiles.rows]
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        parent[root(i)] = root(first.setdefault(seen.unit_of(row), i))
    for i, j, _ in near_copies(prints, prints):
        one, other = sorted((root(number[i]), root(number[j])))
        parent[other] = one
    return [seen.unit_of(rows[root(i)]) for i in range(len(rows))]


def split(rows: list[dict], units: list[str], folds: int, share: float, seed: int) -> list[list[str]]:
    """For each fold the part (train, val or test) of every row. Every row is tested once; units are never on two sides.

    Folds are stratified by class; `share` of the rest is held back as val. With unknown patients and parts of its own, the set's
    held-out part (and whatever shares a unit with it) is fold 0. ValueError if a class has fewer units than folds.
    """
    units = np.array(units)
    tested = np.full(len(rows), -1)
    first = 0
    if not all(row.get("patient_id") for row in rows) and any(row.get("split") in ("val", "test") for row in rows):
        held = set(units[[row.get("split") in ("val", "test") for row in rows]])
        tested[[unit in held for unit in units]] = 0
        first = 1
    rest = np.flatnonzero(tested < 0)
    for number, some in enumerate(_deal([rows[i] for i in rest], units[rest], folds - first, seed), first):
        tested[rest[some]] = number
    parts = []
    for fold in range(folds):
        part = np.where(tested == fold, "test", "train").astype(object)
        learnt = np.flatnonzero(tested != fold)
        held_back = _deal([rows[i] for i in learnt], units[learnt], max(2, round(1 / share)), seed + fold)[0]
        part[learnt[held_back]] = "val"
        parts.append(part.tolist())
    return parts


def _deal(rows: list[dict], units: np.ndarray, folds: int, seed: int) -> list[np.ndarray]:
    """Indices of each fold: whole units, about the same share of malignant tiles in each, the same for the same seed."""
    from sklearn.model_selection import StratifiedGroupKFold
    malignant = np.array([row["label"] == "malignant" for row in rows], dtype=bool)
    for name, chosen in (("malignant", malignant), ("benign", ~malignant)):
        if (number := len(np.unique(units[chosen]))) < folds:
            raise ValueError(f"{number} patients (or tiles of unknown ones) with {name} tiles cannot be dealt to {folds} folds: use "
                             "fewer --folds")
    if folds == 1:
        return [np.arange(len(rows))]
    order = np.argsort([row["file_name"] for row in rows])
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    groups = np.unique(units, return_inverse=True)[1]
    return [order[some] for _, some in splitter.split(order, malignant[order], groups[order])]


def limit(rows: list[dict], parts: list[str], most: int | None, seed: int) -> list[str]:
    """The parts with all but `most` malignant training tiles taken out (part "unused"); a smaller choice is part of a larger."""
    malignant = [row for row, part in zip(rows, parts) if part == "train" and row["label"] == "malignant"]
    if most is None or len(malignant) <= most:
        return parts
    kept = {row["file_name"] for row in arms.first_by_hash(malignant, most, seed)}
    out = {row["file_name"] for row in malignant} - kept
    return ["unused" if row["file_name"] in out else part for row, part in zip(rows, parts)]


def write(data: Path, rows: list[dict], units: list[str], parts: list[str], folder: Path) -> None:
    """A prepared data set of the rows in `parts`, its tiles linked to those of `data`. Written last: the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    used = [{**row, "split": part, UNIT: unit} for row, unit, part in zip(rows, units, parts) if part != "unused"]
    for top in sorted({Path(row["file_name"]).parts[0] for row in used}):
        link(data / top, folder / top)
    about = files.read_json(data / "dataset.json") if (data / "dataset.json").is_file() else {"format": 1, "color_norm": "none"}
    counts = Counter((row["split"], row["label"]) for row in used)
    files.write_json(folder / "dataset.json", about | {
        "split": "crossfit", "counts": {part: {label: counts[part, label] for label in arms.LABELS} for part in ("train", "val", "test")}})
    files.write_manifest(folder, used)


def link(source: Path, target: Path) -> None:
    """`target` shows what is at `source`: a symbolic link, or where that is not allowed hard links of every file."""
    if target.exists():
        return
    try:
        os.symlink(source.resolve(), target, target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            shutil.copytree(source, target, copy_function=os.link)
        else:
            os.link(source, target)


def leaks(train_files: list[dict], rows: list[dict]) -> list[str]:
    """File names of held-out rows of a fold's data set that a generator has seen: the tile, its patient or its unit."""
    held = [row for row in rows if row["split"] in ("val", "test")]
    names = {tile["file_name"] for tile in train_files}
    known = {row[UNIT] for row in rows if row["file_name"] in names}
    return sorted({*seen.overlap(train_files, held), *(row["file_name"] for row in held if row[UNIT] in known)})
