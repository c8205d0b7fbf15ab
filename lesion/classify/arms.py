"""The experiments: which tiles each arm learns from, who is held out, and what must never meet.

The six arms differ from each other in named factors only; three pairs differ in exactly one (`CONTRASTS`) and carry the
question. The unit of every split is the patient; a tile without a known patient is its own, with its exact copies.
Standard library and numpy only at import. Proven by tests/classify/test_arms.py.
"""
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lesion.run import files
from lesion.tiles.seen import Parts, tile_id, unit_of, values

LABELS = ("benign", "malignant")


@dataclass(frozen=True)
class Arm:
    """What an arm adds to DS1, how it trains, and what the study found."""
    extra: str | None           # malignant tiles beside DS1: "synthetic", "real" (the same ones a second time) or None
    augmented: bool
    weighted: bool
    published: tuple[float, float, float] | None  # recall, AUROC, AUPRC of the study (79 malignant of 2,079 held out)
    meaning: str


ARMS = {
    "B0": Arm(None, False, False, (0.09, 0.887, 0.306), "real tiles only"),
    "A1": Arm(None, True, False, (0.37, 0.862, 0.417), "+ augmentation"),
    "W1": Arm(None, True, True, (0.48, 0.900, 0.464), "+ augmentation + weighted loss"),
    "S2": Arm("synthetic", True, False, (0.65, 0.900, 0.433), "+ augmentation + synthetic malignant tiles"),
    "S2w": Arm("synthetic", True, True, (0.49, 0.882, 0.467), "+ augmentation + synthetic + weighted loss"),
    "O1": Arm("real", True, False, None, "+ augmentation + the real malignant tiles a second time"),
}
RATIO_FREE = [name for name, arm in ARMS.items() if arm.extra is None]  # the same at every ratio: trained once
CONTRASTS = {
    ("A1", "S2"): "synthetic tiles added",
    ("W1", "S2w"): "synthetic tiles added under a weighted loss",
    ("O1", "S2"): "synthetic tiles in place of the real ones a second time, at the same class balance",
}
PRIMARY = ("O1", "S2")  # the contrast that decides, in AUROC, named before any run (docs/PROTOCOL.md)


# ------------------------------------------------------------------------------------------------ splits

def split_parts(rows: list[dict], share: float, seed: int) -> Parts:
    """The data set's own parts. With train and val only, val is the test part and a share of train is held back to
    choose by; with train and test only, likewise. ValueError for other splits, an unknown label or a doubled id."""
    check_rows(rows)
    found = {name: [row for row in rows if row.get("split") == name] for name in ("train", "val", "test")}
    names = [name for name, part in found.items() if part]
    if names == ["train", "val", "test"]:
        parts = Parts(*found.values(), val_held_back=False)
    elif names in (["train", "val"], ["train", "test"]):
        train, val = hold_back(found["train"], share, seed)
        parts = Parts(train, val, found[names[1]], val_held_back=True)
        parts.notes.append(f"the data set has the parts {' and '.join(names)}: `{names[1]}` is the test part, and "
                           f"{len(val)} tiles ({_malignant(val)} malignant) of `train` are held back as validation")
    else:
        raise ValueError(f"the data set has the parts {', '.join(names) or 'none'}: train and at least one of val and "
                         "test are needed (see `python -m lesion prepare`)")
    if not any(row.get("patient_id") for row in rows):
        parts.notes.append("the data set names no patients: every tile counts as a patient of its own, so intervals "
                           "are too narrow if some patients have several tiles")
    from lesion.stats.inference import LEAST_PATIENTS
    carriers = len({unit_of(row) for row in parts.test if row["label"] == "malignant"})
    if carriers < LEAST_PATIENTS:
        parts.notes.append(f"the malignant test tiles come from {carriers} patients: under {LEAST_PATIENTS} the report gives "
                           "numbers, but no interval and no verdict")
    return parts


def split_folds(rows: list[dict], folds: int, share: float, seed: int) -> list[Parts]:
    """Cross-fitting: every tile is tested once, by a model that saw none of its patient. Patients are needed."""
    check_rows(rows)
    if missing := sum(not row.get("patient_id") for row in rows):
        raise ValueError(f"--folds needs the patient of every tile, and {missing} of {len(rows)} have none: leave "
                         "--folds out to use the data set's own split")
    parts = []
    for fold, (rest, test) in enumerate(_grouped_folds(rows, folds, seed)):
        train, val = hold_back(rest, share, seed + fold)
        parts.append(Parts(train, val, test, val_held_back=False))
    return parts


def hold_back(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(rest, held back): about `share` of the rows, whole patients, stratified by class, the same for the same seed."""
    return _grouped_folds(rows, max(2, round(1 / share)), seed)[0]


def _grouped_folds(rows, folds, seed):
    from sklearn.model_selection import StratifiedGroupKFold
    rows = sorted(rows, key=lambda row: row["file_name"])
    malignant = np.array([row["label"] == "malignant" for row in rows])
    units = np.unique([unit_of(row) for row in rows], return_inverse=True)[1]
    for name, chosen in (("malignant", malignant), ("benign", ~malignant)):
        if (number := len(np.unique(units[chosen]))) < folds:
            raise ValueError(f"{number} patients with {name} tiles cannot be dealt to {folds} folds: use fewer "
                             "--folds, or a larger --validation-share")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return [([rows[i] for i in a], [rows[i] for i in b]) for a, b in splitter.split(units, malignant, units)]


def check_rows(rows: list[dict]) -> None:
    """ValueError for a label other than benign or malignant, or an id that stands for two tiles."""
    seen = {}
    for row in rows:
        if row.get("label") not in LABELS:
            raise ValueError(f"{row['file_name']}: label {row.get('label')!r}; allowed are {' and '.join(LABELS)}")
        if tile_id(row) in seen:
            raise ValueError(f"{row['file_name']} and {seen[tile_id(row)]} have the same id {tile_id(row)}: every tile "
                             "needs its own")
        seen[tile_id(row)] = row["file_name"]


def check_parts(parts: Parts, accept_overlap: bool) -> None:
    """ValueError if a part lacks a class, or (unless accepted) a patient or an exact copy of a tile is on two sides."""
    named = {"train": parts.train, "val": parts.val, "test": parts.test}
    for name, rows in named.items():
        for label in LABELS:
            if not any(row["label"] == label for row in rows):
                raise ValueError(f"the {name} part has no {label} tile: both classes are needed in every part")
    for one, other in (("train", "test"), ("val", "test"), ("train", "val")):
        for kind, key in (("patients", "patient_id"), ("identical tiles", "sha256")):
            shared = values(named[one], key) & values(named[other], key)
            if shared and accept_overlap:
                parts.notes.append(f"{len(shared)} {kind} are in both {one} and {other} (accepted by "
                                   "--accept-overlap): the figures are too good")
            elif shared:
                raise ValueError(f"{len(shared)} {kind} are in both {one} and {other} (first: {min(shared)}): prepare "
                                 "the data with --split patient, or go on knowingly with --accept-overlap")


# --------------------------------------------------------------------------------------- training sets

def first_by_hash(rows: list[dict], count: int, seed: int) -> list[dict]:
    """`count` of the rows, chosen by the hash of (seed, name): the same whatever the order, a smaller choice part of a
    larger one. In the given order."""
    rank = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{row['file_name']}".encode()).digest())
    chosen = {row["file_name"] for row in rank[:count]}
    return [row for row in rows if row["file_name"] in chosen]


def limit_benign(rows: list[dict], most: int, seed: int) -> list[dict]:
    """All malignant rows and at most `most` benign ones (0: all)."""
    benign = [row for row in rows if row["label"] == "benign"]
    kept = {row["file_name"] for row in (first_by_hash(benign, most, seed) if most else benign)}
    return [row for row in rows if row["label"] == "malignant" or row["file_name"] in kept]


def extra_count(ratio: float, train: list[dict]) -> int:
    """How many malignant tiles an arm adds: ratio times the real malignant ones, at least one."""
    return max(1, round(ratio * _malignant(train)))


def choose_synthetic(folder: Path, count: int, seed: int) -> list[dict]:
    """`count` malignant rows of a synthetic folder. ValueError if there is no such folder or it holds too few."""
    if not Path(folder).is_dir():
        raise ValueError(f"--synthetic {folder}: no such folder; make one with generate.py, or leave S2 and S2w out")
    rows = files.read_manifest(folder)
    if unlabelled := [row["file_name"] for row in rows if row.get("label") not in LABELS]:
        raise ValueError(f"{folder}/{unlabelled[0]} has no label benign or malignant in {files.MANIFEST}")
    rows = [row for row in rows if row["label"] == "malignant"]
    if len(rows) < count:
        raise ValueError(f"{folder} holds {len(rows)} synthetic malignant tiles and {count} are needed: draw more with "
                         f"generate.py --count {count}, or ask for less with --ratio")
    return first_by_hash(rows, count, seed)


def order_of(arm: Arm, real: int, malignant: list[int], synthetic: int, count: int) -> list[int]:
    """Indices of one epoch's tiles for an arm: tiles 0..real-1 are DS1, real..real+synthetic-1 the synthetic ones,
    `malignant` those of DS1 that are; `count` tiles are added to DS1."""
    if arm.extra == "synthetic":
        return list(range(real)) + list(range(real, real + synthetic))
    if arm.extra == "real":
        return list(range(real)) + (malignant * math.ceil(count / len(malignant)))[:count]
    return list(range(real))


def _malignant(rows):
    return sum(row["label"] == "malignant" for row in rows)


def ratio_name(ratio: float) -> str:
    """ratio-1, ratio-0.5: a folder's name."""
    return f"ratio-{ratio:g}"
