"""predictions.csv: the score of every validation and test tile of a run, from which every later number is recomputed.

Columns id, label, score, split (val or test), patient, and under cross-fitting fold; ids and patients as lesion.run.cells writes
them, for spreadsheets. Standard library and numpy only.
Proven by tests/classify/test_predictions.py.
"""
import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lesion.classify.arms import ARMS, LABELS, Parts
from lesion.run import cells, files
from lesion.stats import classification
from lesion.tiles.seen import tile_id

COLUMNS = ("id", "label", "score", "split", "patient")
LONGEST = 1000  # characters of a cell: ids become arrays as wide as the longest


@dataclass
class Run:
    """Test tiles of one training run, sorted by id: ids [n], labels [n] 0/1, scores [n], patients [n] (None: unknown),
    thresholds [n], each chosen on the validation part of the tile's own model, folds [n] (None: all tested by one model)."""
    ids: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    patients: np.ndarray | None
    thresholds: np.ndarray
    folds: np.ndarray | None = None


def write(path: Path, parts: Parts, val_scores: np.ndarray, test_scores: np.ndarray, fold: int | None = None) -> None:
    """One line a validation or test tile, in the order of `parts`; scores with as many digits as make them exact.

    ValueError, and nothing written, for a score that is not finite or not in 0..1, or scores of another number of
    tiles.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *([] if fold is None else ["fold"])])
    for split, rows, scores in (("val", parts.val, val_scores), ("test", parts.test, test_scores)):
        classification.check(np.array([row["label"] == "malignant" for row in rows]), scores)
        for row, score in zip(rows, scores, strict=True):
            writer.writerow([cells.safe(tile_id(row)), row["label"], repr(float(score)), split, cells.safe(row.get("patient_id") or ""),
                             *([] if fold is None else [fold])])
    files.write_bytes(path, text.getvalue().encode())


def merge_folds(folder: Path, folds: int) -> None:
    """Join `folder`/fold<f>/predictions.csv into `folder`/predictions.csv, once all are there."""
    paths = [folder / f"fold{fold}" / "predictions.csv" for fold in range(folds)]
    if all(path.is_file() for path in paths):
        join(paths, folder / "predictions.csv")


def join(paths: list[Path], target: Path) -> None:
    """Write the tables of the folds, in order, as one, each line with the number of its fold. ValueError as `read`'s."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, "fold"], lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for fold, path in enumerate(paths):
        for number, row in enumerate(_rows(path), 2):
            _parse(row, f"{path}, line {number}")
            writer.writerow(row | {"fold": fold})
    files.write_bytes(target, text.getvalue().encode())


def read(path: Path) -> Run:
    """The run of one file. ValueError, naming the line, for anything that is not a table as `write` makes it: missing
    columns, an unknown label or split, a score that is not a number in 0..1, an id tested twice, a class missing."""
    tests, validation = [], {}
    for number, row in enumerate(_rows(path), 2):
        item = _parse(row, f"{path}, line {number}")
        (tests if row["split"] == "test" else validation.setdefault(item[4], [])).append(item)
    ids = [item[0] for item in tests]
    if len(set(ids)) < len(ids):
        doubled = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(f"{path}: the test tile {doubled} is listed twice")
    try:
        limits = {fold: classification.choose_threshold(*_arrays(items)) for fold, items in validation.items()}
        classification.check(*_arrays(tests))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if lost := {item[4] for item in tests} - limits.keys():
        raise ValueError(f"{path} has no validation tiles{f' of fold {min(lost)}' if min(lost) else ''} to choose a "
                         "threshold by")
    tests.sort()
    labels, scores = _arrays(tests)
    patients = np.array([item[3] or f"tile {item[0]}" for item in tests])
    folds = np.array([str(item[4]) for item in tests])
    return Run(np.array([item[0] for item in tests]), labels, scores,
               patients if any(item[3] for item in tests) else None, np.array([limits[item[4]] for item in tests]),
               folds if len(limits) > 1 else None)


def _rows(path):
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise ValueError(f"{path} has no column {missing[0]!r}: expected {', '.join(COLUMNS)} (written by "
                                 "classify.py)")
            yield from reader
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable csv file: {error}") from None


def _parse(row, place):
    """(id, label 0/1, score, patient, fold) of a line."""
    if None in row or None in row.values():
        raise ValueError(f"{place}: not as many cells as the header")
    if max(map(len, row.values())) > LONGEST:
        raise ValueError(f"{place}: a cell has over {LONGEST} characters")
    if row["label"] not in LABELS or row["split"] not in ("val", "test"):
        raise ValueError(f"{place}: label {row['label']!r}, split {row['split']!r}; allowed are "
                         f"{' and '.join(LABELS)}, val and test")
    try:
        score = float(row["score"])
    except ValueError:
        score = float("nan")
    if not 0 <= score <= 1:
        raise ValueError(f"{place}: score {row['score']!r} is not a probability in 0..1")
    return cells.plain(row["id"]), int(row["label"] == "malignant"), score, cells.plain(row["patient"]), row.get("fold", "")


def _arrays(items):
    return np.array([item[1] for item in items]), np.array([item[2] for item in items])


def read_runs(folder: Path) -> dict[str, dict[int, Run]]:
    """Arm -> seed -> run, of all `folder`/<arm>/seed<k>/predictions.csv, arms in the protocol's order.

    ValueError if there are none, or if two of them were made on different test tiles (or labels): then no two arms may
    be compared.
    """
    runs = {}
    for name in ARMS:
        found = {int(path.parent.name[4:]): path for path in Path(folder).glob(f"{name}/seed[0-9]*/predictions.csv")}
        if found:
            runs[name] = {seed: read(found[seed]) for seed in sorted(found)}
    if not runs:
        raise ValueError(f"{folder} holds no <arm>/seed<k>/predictions.csv: run classify.py --out {folder} first")
    first_name, first_seed = next((name, seed) for name in runs for seed in runs[name])
    first = runs[first_name][first_seed]
    for name, seeds in runs.items():
        for seed, run in seeds.items():
            if not (np.array_equal(run.ids, first.ids) and np.array_equal(run.labels, first.labels)):
                raise ValueError(f"{folder}/{name}/seed{seed} was tested on other tiles than "
                                 f"{first_name}/seed{first_seed} ({len(run.ids)} and {len(first.ids)}): predictions of "
                                 "another data set, remove them")
    return runs


def read_args(folder: Path) -> dict:
    """args.json of a run folder of classify.py, {} where there is none. ValueError where what a later command takes from it is of
    another type than classify.py writes."""
    path = Path(folder) / "args.json"
    args = files.read_json(path) if path.is_file() else {}
    fits = {"notes": _texts, "experiments": _texts, "counts": _counts, "checked": lambda value: value is None or _objects(value),
            "seeds": lambda value: type(value) is int and value > 0, "synthetic_sha256": lambda value: isinstance(value, str | None)}
    for key, fit in fits.items():
        if key in args and not fit(args[key]):
            raise ValueError(f"{path} is damaged: {key} is {str(args[key])[:40]!r}, which classify.py does not write; restore it")
    return args


def _texts(value):
    return isinstance(value, list) and all(isinstance(one, str) and one for one in value)


def _objects(value):
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _counts(value):
    """Tiles by part and label, and those that arms add, of each fold."""
    try:
        numbers = [number for one in value for number in (one["added"], *(one[part][label] for part in ("train", "val", "test")
                                                                          for label in LABELS))]
    except (KeyError, TypeError):
        return False
    return bool(numbers) and all(type(number) is int for number in numbers)
