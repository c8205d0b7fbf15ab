"""Who trains, who is held out: the unit is the patient. Sampling, splitting, and the table of what two parts share.

The protocol is the study's 80/20 with a validation part for thresholds, grouped by patient and stratified by class
(scikit-learn's StratifiedGroupKFold). `by_image` reproduces the study's tile-level split, which leaks patients.
Everything is a function of sorted ids and a seed. Proven by tests/data/test_prepare.py.
"""
import numpy as np

from lesion.data.isic import SPLITS, Table, columns

PARTS = ("train", "val", "test")
FOLDS = {"test": 5, "val": 10}  # a fifth of all is test, a tenth of the rest val


def by_file(table: Table) -> tuple[dict[str, str], dict[str, str]]:
    """(isic_id -> split, isic_id -> patient_id where the table has that column) of a csv with isic_id and split."""
    split, patients = {}, {}
    for line, (isic_id, part, patient) in columns(table, ["isic_id", "split", "patient_id"], required="isic_id"):
        if str(part).lower() not in SPLITS:
            raise ValueError(f"{table.name}, line {line}: split {part!r} is not allowed: use train, val or test")
        if isic_id in split:
            raise ValueError(f"{table.name}, line {line}: {isic_id} is listed twice")
        split[isic_id] = SPLITS[part.lower()]
        if patient:
            patients[isic_id] = patient
    return split, patients


def by_patient(ids: list[str], labels: dict[str, str], patients: dict[str, str], seed: int) -> dict[str, str]:
    """isic_id -> train, val or test: no patient in two parts, classes spread as evenly as whole patients allow."""
    from sklearn.model_selection import StratifiedGroupKFold
    return _folds(StratifiedGroupKFold, ids, labels, patients, seed)


def by_image(ids: list[str], labels: dict[str, str], seed: int) -> dict[str, str]:
    """isic_id -> train, val or test, tile by tile within each class, as the study did: patients may be on both sides."""
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
            raise ValueError(f"too few tiles to split: {units} patients or tiles, {y[rest].sum()} malignant, {(~y[rest]).sum()} "
                             f"benign left for {name}, at least {folds} of each are needed; give the split with --split-file CSV")
        splitter = kind(n_splits=folds, shuffle=True, random_state=seed)
        _, held_out = next(splitter.split(rest, y[rest], owner[rest]))
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
    """(malignant test tiles whose patient also has training tiles, malignant test tiles)."""
    training = {patients[i] for i, p in split.items() if p != "test" and i in patients}
    positives = [i for i, p in split.items() if p == "test" and labels[i] == "malignant"]
    return sum(patients.get(i) in training for i in positives), len(positives)
