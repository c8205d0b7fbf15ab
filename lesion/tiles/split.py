"""Who trains, who is held out: the unit is the patient. Sampling, splitting, and the table of what two parts share.

The protocol is the study's 80/20 with a validation part for thresholds, grouped by patient and stratified by class
(scikit-learn's StratifiedGroupKFold). `by_image` reproduces the study's tile-level split, which leaks patients.
Everything is a function of sorted ids and a seed. Proven by tests/test_prepare.py.
"""
from collections.abc import Iterator

import numpy as np
from PIL import Image

from lesion.tiles.decode import fill_borders
from lesion.tiles.tables import Table, columns, split_of
from lesion.tiles.views import VIEWS, dihedral

PARTS = ("train", "val", "test")
FOLDS = {"test": 5, "val": 10}  # a fifth of all is test, a tenth of the rest val
NEAR = 0.91  # between the likest two real train and val tiles (0.87) and the least like of 300 re-encoded ones (0.94)
NEAR_PAIRS = 200_000_000
BLOCK = 2000
SHOWN = 20  # pairs of copies that are named


def by_file(table: Table) -> tuple[dict[str, str], dict[str, str]]:
    """(isic_id -> split, isic_id -> patient_id where the table has that column) of a csv with isic_id and split."""
    split, patients = {}, {}
    for line, (isic_id, part, patient) in columns(table, ["isic_id", "split", "patient_id"], required="isic_id"):
        place = f"{table.name}, line {line}"
        if isic_id is None:
            raise ValueError(f"{place}: no isic_id")
        part = split_of(part, f"{place}, {isic_id}")
        if split.setdefault(isic_id, part) != part:
            raise ValueError(f"{place}: {isic_id} is listed twice, in {split[isic_id]} and in {part}")
        if patient and patients.get(isic_id, patient) != patient:
            raise ValueError(f"{place}: {isic_id} is listed twice, with patients {patients[isic_id]} and {patient}")
        if patient:
            patients[isic_id] = patient
    return split, patients


def by_patient(ids: list[str], labels: dict[str, str], patients: dict[str, str], seed: int) -> dict[str, str]:
    """isic_id -> train, val or test: no patient in two parts, classes spread as evenly as whole patients allow."""
    from sklearn.model_selection import StratifiedGroupKFold
    return _folds(StratifiedGroupKFold, ids, labels, patients, seed)


def by_image(ids: list[str], labels: dict[str, str], seed: int) -> dict[str, str]:
    """isic_id -> train, val or test, tile by tile within each class, as the study did: patients may be on both
    sides."""
    from sklearn.model_selection import StratifiedKFold
    return _folds(StratifiedKFold, ids, labels, {}, seed)


def _folds(kind, ids, labels, groups, seed):
    ids = np.array(sorted(ids), dtype=object)
    y = np.array([labels[i] == "malignant" for i in ids])
    owner = np.unique([groups.get(i, i) for i in ids], return_inverse=True)[1]
    part = np.full(len(ids), "train", dtype=object)
    for name, folds in FOLDS.items():
        rest = np.flatnonzero(part == "train")
        units = len(np.unique(owner[rest]))
        if min(units, y[rest].sum(), (~y[rest]).sum()) < folds:
            raise ValueError(f"too few tiles to split: {units} patients or tiles, {y[rest].sum()} malignant, "
                             f"{(~y[rest]).sum()} benign left for {name}, at least {folds} of each are needed; give "
                             "the split with --split-file CSV")
        splitter = kind(n_splits=folds, shuffle=True, random_state=seed)
        _, held_out = next(splitter.split(rest, y[rest], owner[rest] if groups else None))
        part[rest[held_out]] = name
    return dict(zip(ids.tolist(), part.tolist()))


def sample(split: dict[str, str], labels: dict[str, str], benign: dict[str, int | None], seed: int) -> list[str]:
    """Sorted ids: every malignant tile, and at most benign[part] (None: all) random benign ones of each part."""
    chosen = []
    for number, part in enumerate(PARTS):
        ids = sorted(i for i, p in split.items() if p == part)
        chosen += [i for i in ids if labels[i] == "malignant"]
        candidates = [i for i in ids if labels[i] == "benign"]
        limit = benign.get(part)
        if limit is not None and limit < len(candidates):
            picked = np.random.default_rng([seed, number]).choice(len(candidates), limit, replace=False)
            candidates = [candidates[i] for i in sorted(picked)]
        chosen += candidates
    return sorted(chosen)


def shared(split: dict[str, str], groups: dict[str, str]) -> dict[tuple[str, str], set[str]]:
    """(part, other part) -> the groups (patients, lesions, hashes) that have tiles in both."""
    members = {part: set() for part in PARTS}
    for isic_id, part in split.items():
        if isic_id in groups:
            members[part].add(groups[isic_id])
    return {(a, b): members[a] & members[b] for a, b in (("train", "val"), ("train", "test"), ("val", "test"))}


def leaked_positives(split: dict[str, str], labels: dict[str, str], patients: dict[str, str]) -> tuple[int, int]:
    """(malignant test tiles whose patient also has train or val tiles, malignant test tiles)."""
    training = {patients[i] for i, part in split.items() if part != "test" and i in patients}
    positives = [i for i, part in split.items() if part == "test" and labels[i] == "malignant"]
    return sum(patients.get(i) in training for i in positives), len(positives)


def fingerprint(image: np.ndarray) -> np.ndarray:
    """What stays of a tile [S,S,3] uint8 under re-encoding, resizing and a change of brightness: float16 [1024].

    Grey 32x32 block means less an 8x8 blur of themselves, at unit length: two tiles' likeness is the dot product.
    """
    grey = Image.fromarray(np.ascontiguousarray(fill_borders(image))).convert("L").resize((32, 32), Image.BOX)
    small = grey.resize((8, 8), Image.BOX).resize((32, 32), Image.BILINEAR)
    detail = np.asarray(grey, np.float32) - np.asarray(small, np.float32)
    detail -= detail.mean()
    return (detail / max(np.linalg.norm(detail), 1e-6)).ravel().astype(np.float16)


def near_copies(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """(row of a, row of b, likeness) of fingerprints at least NEAR alike in one of the 8 dihedral views, b turned."""
    for i, j, likeness in _near_blocks(a, b):
        yield from zip(i.tolist(), j.tolist(), (round(value, 3) for value in likeness.tolist()))


def _near_blocks(a, b):
    """`near_copies` as arrays, those of BLOCK rows of each at once: many copies of many tiles never stand in memory."""
    for start in range(0, len(a), BLOCK):
        rows = a[start:start + BLOCK].astype(np.float32)
        for first in range(0, len(b), BLOCK):
            square = b[first:first + BLOCK].reshape(-1, 32, 32)
            best = np.zeros((len(rows), len(square)), np.float32)
            for view in range(VIEWS):
                turned = dihedral(square, view, (1, 2)).reshape(len(square), -1).astype(np.float32)
                np.maximum(best, rows @ turned.T, out=best)
            i, j = np.nonzero(best >= NEAR)
            yield i + start, j + first, best[i, j]


def overlap(split: dict[str, str], patients: dict[str, str], lesions: dict[str, str],
            prints: dict[str, tuple[str, np.ndarray]]) -> dict[str, dict]:
    """"train and test" -> how many patients, lesions, files ("exact") and near copies the two parts share.

    `prints`: isic_id -> (SHA-256, `fingerprint`). None means unknown: no ids, or more than NEAR_PAIRS pairs to compare.
    `pairs`: the SHOWN likest exact and near copies, [isic_id, isic_id, likeness].
    """
    same = shared(split, {i: digest for i, (digest, _) in prints.items()})
    people, moles = shared(split, patients), shared(split, lesions)
    table = {}
    for a, b in same:
        left, right = (sorted(i for i, part in split.items() if part == name) for name in (a, b))
        if not left or not right:
            continue
        near, exact, pairs = None, len(same[a, b]), []
        if len(left) * len(right) <= NEAR_PAIRS:
            exact, near, pairs = _copies(left, right, prints)
        table[f"{a} and {b}"] = {"patients": len(people[a, b]) if patients else None,
                                 "lesions": len(moles[a, b]) if lesions else None, "exact": exact,
                                 "near": near, "pairs": pairs}
    return table


def _copies(left, right, prints):
    """(pairs of tiles `left` and `right` that are the same file, others that are near copies, the SHOWN likest of both)."""
    numbers = {digest: number for number, digest in enumerate({prints[i][0] for i in (*left, *right)})}
    mine, theirs = (np.array([numbers[prints[i][0]] for i in side]) for side in (left, right))
    exact, near, pairs = 0, 0, []
    for i, j, likeness in _near_blocks(*(np.stack([prints[i][1] for i in side]) for side in (left, right))):
        same = int((mine[i] == theirs[j]).sum())
        exact, near = exact + same, near + len(i) - same
        some = np.argsort(-np.round(likeness, 3), kind="stable")[:SHOWN]
        pairs += [[left[i[n]], right[j[n]], round(float(likeness[n]), 3)] for n in some]
        pairs = sorted(pairs, key=lambda pair: (-pair[2], *pair[:2]))[:SHOWN]
    return exact, near, pairs
