"""lesion.classify.arms: the arms' training sets, splits by patient, refused leaks, choices that no order changes."""
import json

import pytest
from tiny_tiles import write_set, write_synthetic

from lesion.classify import arms
from lesion.classify.arms import ARMS, CONTRASTS
from lesion.tiles import seen


def make(counts, patients=True):
    """Rows as a manifest holds them: counts is {split: (benign, malignant)}, two tiles a patient."""
    rows = []
    for split, numbers in counts.items():
        for label, count in zip(("benign", "malignant"), numbers, strict=True):
            for i in range(count):
                name = f"ISIC_{len(rows):07d}"
                rows.append({"file_name": f"images/{name}.jpg", "isic_id": name, "label": label, "split": split,
                             "patient_id": f"{split}{label}{i // 2}" if patients else None,
                             "sha256": f"{len(rows):064x}"})
    return rows


def names(rows):
    return {row["file_name"] for row in rows}


# ---------------------------------------------------------------------------------------------- arms

def test_contrasts_differ_in_one_factor():
    """A1-S2, W1-S2w: synthetic tiles only; O1-S2: what the added tiles are; all else equal."""
    for one, two in CONTRASTS:
        first, second = ARMS[one], ARMS[two]
        assert (first.augmented, first.weighted) == (second.augmented, second.weighted)
        assert first.extra != second.extra
    assert (ARMS["O1"].extra, ARMS["S2"].extra) == ("real", "synthetic")
    assert {name: arm.published for name, arm in ARMS.items() if arm.published} == {
        "B0": (.09, .887, .306), "A1": (.37, .862, .417), "W1": (.48, .9, .464), "S2": (.65, .9, .433),
        "S2w": (.49, .882, .467)}


def test_training_sets():
    """DS1 once; S2 and S2w add the synthetic tiles, O1 as many real ones again, each before any a third time."""
    orders = {name: arms.order_of(arm, real=10, malignant=[2, 5, 7], synthetic=6, count=6)
              for name, arm in ARMS.items()}
    assert orders["B0"] == orders["A1"] == orders["W1"] == list(range(10))
    assert orders["S2"] == orders["S2w"] == list(range(16))
    assert orders["O1"] == [*range(10), 2, 5, 7, 2, 5, 7]
    assert arms.order_of(ARMS["O1"], 10, [2, 5, 7], 0, 4) == [*range(10), 2, 5, 7, 2]
    train = make({"train": (5, 4)})
    assert [arms.extra_count(ratio, train) for ratio in (1.0, 2.5, 0.01)] == [4, 10, 1]


# -------------------------------------------------------------------------------------------- splits

def test_own_parts_are_obeyed():
    """Train, val and test of the data set are used as they are."""
    rows = make({"train": (20, 6), "val": (6, 4), "test": (8, 20)})
    parts = arms.split_parts(rows, 0.2, 0)
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [26, 10, 28]
    assert not parts.val_held_back
    assert parts.notes == []


def test_too_few_malignant_patients_are_told_before_training():
    """Malignant test tiles of nine patients: a note, hours before the report can only say so; of ten: none."""
    for malignant, told in ((18, True), (20, False)):
        parts = arms.split_parts(make({"train": (20, 6), "val": (6, 4), "test": (8, malignant)}), 0.2, 0)
        assert any("come from 9 patients: under 10 the report gives numbers" in note for note in parts.notes) == told
        assert len(parts.notes) == told


@pytest.mark.parametrize("other", ["val", "test"])
def test_validation_is_held_back(other):
    """Without three parts a fifth of train is held back: whole patients, both classes, the same for a seed; said."""
    rows = make({"train": (100, 20), other: (10, 4)})
    parts, again, another = (arms.split_parts(order, 0.2, seed) for order, seed in
                             ((rows, 0), (rows[::-1], 0), (rows, 1)))
    assert parts.val_held_back
    assert names(parts.test) == names(row for row in rows if row["split"] == other)
    assert names(parts.val) == names(again.val) != names(another.val)
    assert not {row["patient_id"] for row in parts.train} & {row["patient_id"] for row in parts.val}
    assert len(parts.val) == pytest.approx(24, abs=4)
    assert sum(row["label"] == "malignant" for row in parts.val) == pytest.approx(4, abs=2)
    assert "held back as validation" in parts.notes[0]


def test_exact_copies_stay_together():
    """Without patients a tile is its own unit, and tiles of the same bytes are one; that none are known is said."""
    rows = make({"train": (60, 20), "test": (4, 4)}, patients=False)
    for row in rows[:10]:
        row["sha256"] = "same"
    parts = arms.split_parts(rows, 0.2, 0)
    assert len({row["sha256"] == "same" and part for part, group in (("train", parts.train), ("val", parts.val))
                for row in group} - {False}) == 1
    assert any("names no patients" in note for note in parts.notes)


def test_cross_fitting_tests_each_tile_once():
    """Five folds: every tile tested once, no patient on two sides of a fold, both classes in every part."""
    rows = make({"train": (100, 40), "val": (40, 10)})
    folds = arms.split_folds(rows, 5, 0.2, 0)
    assert sorted(row["file_name"] for parts in folds for row in parts.test) == sorted(names(rows))
    for parts in folds:
        arms.check_parts(parts, accept_overlap=False)
    with pytest.raises(ValueError, match="needs the patient of every tile"):
        arms.split_folds(make({"train": (50, 20)}, patients=False), 5, 0.2, 0)
    with pytest.raises(ValueError, match="cannot be dealt to 50 folds"):
        arms.split_folds(rows, 50, 0.2, 0)


def test_choices_do_not_depend_on_order_and_nest():
    """The 50 benign tiles kept of 100 are the same in any order and hold the 20 that would be; malignant all stay."""
    rows = make({"train": (100, 8)})
    fifty, again, twenty = (arms.limit_benign(order, most, 0) for order, most in
                            ((rows, 50), (rows[::-1], 50), (rows, 20)))
    assert len(fifty) == 58
    assert names(twenty) < names(fifty) == names(again)
    assert names(fifty) != names(arms.limit_benign(rows, 50, 1))
    assert arms.limit_benign(rows, 0, 0) == rows


@pytest.mark.parametrize(("change", "words"), [
    (lambda rows: [row.update(split="train") for row in rows], "has the parts train: train and at least one"),
    (lambda rows: rows[0].update(label="mole"), "label 'mole'"),
    (lambda rows: rows[1].update(isic_id=rows[0]["isic_id"]), "have the same id"),
    (lambda rows: [row.update(label="benign") for row in rows if row["split"] == "test"], "test part has no malignant"),
    (lambda rows: rows[0].update(patient_id=rows[-1]["patient_id"]), "1 patients are in both train and test"),
    (lambda rows: rows[0].update(sha256=rows[-1]["sha256"]), "1 identical tiles are in both train and test"),
    (lambda rows: rows[60].update(patient_id=rows[-1]["patient_id"]), "1 patients are in both val and test"),
    (lambda rows: rows[60].update(sha256=rows[-1]["sha256"]), "1 identical tiles are in both val and test"),
    (lambda rows: rows[0].update(patient_id=rows[60]["patient_id"]), "1 patients are in both train and val"),
    (lambda rows: rows[0].update(sha256=rows[60]["sha256"]), "1 identical tiles are in both train and val"),
])
def test_bad_parts(change, words):
    """One part only, an unknown label, a doubled id, a class missing, a patient or a copy on both sides: refused."""
    rows = make({"train": (40, 20), "val": (8, 4), "test": (8, 4)})
    change(rows)
    with pytest.raises(ValueError, match=words):
        arms.check_parts(arms.split_parts(rows, 0.2, 0), accept_overlap=False)


def test_accepted_overlap_is_noted():
    """The study's split by tile can be reproduced knowingly; the report will say so."""
    rows = make({"train": (40, 20), "val": (8, 4), "test": (8, 4)})
    rows[0]["patient_id"] = rows[-1]["patient_id"]
    parts = arms.split_parts(rows, 0.2, 0)
    arms.check_parts(parts, accept_overlap=True)
    assert any("1 patients are in both train and test" in note for note in parts.notes)


# ------------------------------------------------------------------------------------ synthetic tiles

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Parts of a small data set with files: (folder, parts with a val of its own, parts with a val held back)."""
    folder = tmp_path_factory.mktemp("set")
    rows = write_set(folder, {"train": (30, 12), "val": (6, 4), "test": (6, 4)})
    two = [row for row in rows if row["split"] != "val"]
    return folder, arms.split_parts(rows, 0.2, 0), arms.split_parts(two, 0.2, 0)


def check(folder, count, parts, **accept):
    return seen.check_synthetic(folder, arms.choose_synthetic(folder, count, 0), parts, **accept)


def test_clean_synthetic_tiles_pass(data, tmp_path):
    """A LoRA that saw training tiles only is fine, and what was checked is recorded."""
    _, parts, _ = data
    write_synthetic(tmp_path, 8, [row for row in parts.train if row["label"] == "malignant"])
    record = check(tmp_path, 8, parts)
    assert (record["tiles"], record["accepted_unknown"], record["held_back_seen"]) == (8, False, 0)
    assert record["loras"][0]["tiles"] == 12


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("by", ["sha256", "patient_id", "file_name"])
def test_planted_leak_is_refused(data, tmp_path, part, by):
    """One held-out tile among the LoRA's: found by its bytes, by its patient, or by its ISIC id when re-encoded;
    no flag lets it pass."""
    _, parts, _ = data
    leak = {"file_name": "images/other.jpg", "sha256": "0" * 64, "patient_id": "someone"}
    leak[by] = getattr(parts, part)[0][by]
    write_synthetic(tmp_path, 8, [*parts.train, leak])
    for accept in ({}, {"accept_unknown": True}):
        with pytest.raises(ValueError, match=r"was trained on \d held-out tiles"):
            check(tmp_path, 8, parts, **accept)


def test_study_split_compares_tiles_only(data, tmp_path):
    """With the study's split by tile accepted, a shared patient passes, a shared tile still does not."""
    _, parts, _ = data
    leak = {"file_name": "other.jpg", "sha256": "0" * 64, "patient_id": parts.test[0]["patient_id"]}
    write_synthetic(tmp_path, 8, [*parts.train, leak])
    check(tmp_path, 8, parts, accept_overlap=True)
    write_synthetic(tmp_path, 8, [*parts.train, parts.test[0]])
    with pytest.raises(ValueError, match="was trained on 1 held-out tiles"):
        check(tmp_path, 8, parts, accept_overlap=True)


def test_held_back_validation_seen_is_recorded(data, tmp_path):
    """A validation part taken from train here was open to the LoRA: allowed, and counted for the report."""
    _, _, parts = data
    write_synthetic(tmp_path, 8, parts.train + parts.val)
    record = check(tmp_path, 8, parts)
    assert record["held_back_seen"] == len(parts.val)


def test_unknown_provenance_needs_the_flag(data, tmp_path):
    """No provenance.json, a torn one, a LoRA it does not know or whose tiles it does not tell: refused, or recorded."""
    _, parts, _ = data
    write_synthetic(tmp_path, 8, None)
    cases = [None, "{torn", json.dumps({"loras": [{"file": "x", "sha256": "cd" * 32, "train_files": parts.train[:3]}]}),
             json.dumps({"loras": [{"file": "x", "sha256": "ab" * 32, "train_files": []}]}),
             json.dumps({"loras": [{"file": "x", "sha256": "ab" * 32}]}), json.dumps([1])]
    for text in cases:
        if text is not None:
            (tmp_path / "provenance.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="--accept-unknown-synthetic"):
            check(tmp_path, 8, parts)
        assert check(tmp_path, 8, parts, accept_unknown=True)["accepted_unknown"]


def test_untuned_base_needs_no_lora(data, tmp_path):
    """Tiles of the base model alone (no LoRA) pass: their provenance.json lists none."""
    _, parts, _ = data
    write_synthetic(tmp_path, 8, [], lora=None)
    (tmp_path / "provenance.json").write_text(json.dumps({"base_sha256": "00", "loras": []}), encoding="utf-8")
    assert check(tmp_path, 8, parts)["loras"] == []


def test_bad_synthetic_folders(tmp_path):
    """No folder, no manifest, too few malignant tiles, a row without label: one line each."""
    with pytest.raises(ValueError, match="no such folder"):
        arms.choose_synthetic(tmp_path / "none", 5, 0)
    with pytest.raises(ValueError, match="no metadata.jsonl"):
        arms.choose_synthetic(tmp_path, 5, 0)
    write_synthetic(tmp_path, 5, None)
    with pytest.raises(ValueError, match="holds 5 synthetic malignant tiles and 6 are needed"):
        arms.choose_synthetic(tmp_path, 6, 0)
    assert len(arms.choose_synthetic(tmp_path, 3, 0)) == 3
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "00000.png"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="has no label"):
        arms.choose_synthetic(tmp_path, 1, 0)


def test_every_accepted_overlap_is_noted():
    """Between train and val too: a threshold chosen on trained tiles is no less to be said."""
    rows = make({"train": (40, 20), "val": (8, 4), "test": (8, 4)})
    rows[0]["patient_id"] = rows[60]["patient_id"]
    parts = arms.split_parts(rows, 0.2, 0)
    arms.check_parts(parts, accept_overlap=True)
    assert any("1 patients are in both train and val" in note for note in parts.notes)


def test_the_seed_chooses_the_synthetic_tiles(tmp_path):
    """Another seed takes other tiles of the folder."""
    write_synthetic(tmp_path, 40, None)
    assert names(arms.choose_synthetic(tmp_path, 10, 0)) != names(arms.choose_synthetic(tmp_path, 10, 1))
