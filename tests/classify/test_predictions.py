"""lesion.classify.predictions: what is written comes back; damaged or foreign tables are refused by name and line."""
import ast
import csv
import os
import subprocess
import sys

import numpy as np
import pytest

from lesion.classify import predictions
from lesion.classify.arms import Parts
from lesion.run import files
from lesion.stats import classification


def parts(count=8, patients=True, start=0):
    rows = [{"file_name": f"images/T{start + i}.jpg", "label": ("benign", "malignant")[i % 2],
             "patient_id": f"P{i // 2}" if patients else None} for i in range(2 * count)]
    return Parts([], rows[:count], rows[count:], False)


def scores(count=8, seed=0):
    return np.random.default_rng(seed).random(count)


def test_round_trip(tmp_path):
    """Scores come back exactly, tiles sorted by id, the threshold chosen on the validation tiles."""
    both = parts()
    predictions.write(tmp_path / "predictions.csv", both, scores(seed=1), scores())
    run = predictions.read(tmp_path / "predictions.csv")
    order = np.argsort([f"T{8 + i}" for i in range(8)])
    assert run.scores.tolist() == scores()[order].tolist()
    assert run.labels.tolist() == np.array([0, 1] * 4)[order].tolist()
    assert run.patients.tolist() == np.array([f"P{i // 2}" for i in range(8, 16)])[order].tolist()
    assert set(run.thresholds) == {classification.choose_threshold(np.array([0, 1] * 4), scores(seed=1))}
    predictions.write(tmp_path / "predictions.csv", parts(patients=False), scores(seed=1), scores())
    assert predictions.read(tmp_path / "predictions.csv").patients is None


def test_names_are_utf8_whatever_the_locale(tmp_path):
    """An id and a patient with umlauts come back as written in a process whose own encoding is ASCII; a BOM, as a
    spreadsheet puts it, is not part of the first column's name."""
    both = parts()
    for row in (*both.val, *both.test):
        row |= {"file_name": row["file_name"].replace("T", "läsion"), "patient_id": f"Müller{row['patient_id']}"}
    path = tmp_path / "fold0" / "predictions.csv"
    predictions.write(path, both, scores(seed=1), scores(), 0)
    code = ("import sys; from pathlib import Path; from lesion.classify import predictions; folder = Path(sys.argv[1]); "
            "predictions.merge_folds(folder, 1); run = predictions.read(folder / 'predictions.csv'); "
            "print(ascii([*map(str, run.ids), *map(str, run.patients)]))")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, encoding="utf-8", check=False,
                          env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == 0, done.stderr
    assert set(ast.literal_eval(done.stdout)) == {*(f"läsion{8 + i}" for i in range(8)), *(f"MüllerP{i}" for i in range(4, 8))}
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(predictions.read(path).ids) == 8


def test_folds_are_merged_when_all_are_there(tmp_path):
    """Two folds make one table once both are written; each tile keeps its own fold's threshold."""
    for fold in range(2):
        assert not (tmp_path / "predictions.csv").exists()
        predictions.write(tmp_path / f"fold{fold}" / "predictions.csv", parts(start=100 * fold), scores(seed=fold) / 2,
                          scores(seed=fold + 5), fold)
        predictions.merge_folds(tmp_path, 2)
    run = predictions.read(tmp_path / "predictions.csv")
    assert len(run.ids) == 16
    limits = [classification.choose_threshold(np.array([0, 1] * 4), scores(seed=fold) / 2) for fold in range(2)]
    assert run.thresholds.tolist() == [limits[len(name) == 4] for name in run.ids]


@pytest.mark.parametrize("bad", [np.array([.1, np.nan] * 4), np.array([.1, 1.5] * 4), np.full(7, .5)])
def test_bad_scores_are_not_written(tmp_path, bad):
    """NaN, a logit, a score too few: an error, and no file."""
    with pytest.raises(ValueError):
        predictions.write(tmp_path / "predictions.csv", parts(), scores(), bad)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("old", "new", "words"), [
    ("id,label,score,split,patient", "id,label,score,split", "no column 'patient'"),
    (",malignant,", ",mole,", "line 3: label 'mole'"),
    (",test,", ",train,", "split 'train'"),
    (",val,", ",test,", "no validation tiles"),
    ("T9,malignant,", "T9,benign,", None),
    ("T9,malignant,0.", "T9,malignant,nan0.", "score 'nan0"),
    ("T9,malignant,0.", "T9,malignant,7.", "not a probability"),
    ("\nT10,", "\nT9,", "test tile T9 is listed twice"),
])
def test_damaged_tables(tmp_path, old, new, words):
    """A column missing, an unknown label or split, no validation, a score out of range, an id twice: named."""
    path = tmp_path / "predictions.csv"
    predictions.write(path, parts(), scores(seed=1), scores())
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    if words is None:
        assert predictions.read(path).labels.sum() == 3
    else:
        with pytest.raises(ValueError, match=words):
            predictions.read(path)


def test_a_class_missing_is_named(tmp_path):
    """Benign test tiles only: the file is named, no metric is made up."""
    path = tmp_path / "predictions.csv"
    predictions.write(path, parts(), scores(seed=1), scores())
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line for line in lines if "malignant" not in line or ",val," in line), encoding="utf-8")
    with pytest.raises(ValueError, match=r"predictions\.csv: 4 tiles of one class only"):
        predictions.read(path)


def test_runs_of_other_tiles_are_refused(tmp_path):
    """Two arms tested on different tiles, or on the same with other labels, may not be compared; nor may nothing."""
    with pytest.raises(ValueError, match="run classify.py"):
        predictions.read_runs(tmp_path)
    predictions.write(tmp_path / "A1/seed0/predictions.csv", parts(), scores(seed=1), scores())
    predictions.write(tmp_path / "A1/seed10/predictions.csv", parts(), scores(seed=1), scores())
    predictions.write(tmp_path / "A1/seed2/predictions.csv", parts(), scores(seed=1), scores())
    assert list(predictions.read_runs(tmp_path)["A1"]) == [0, 2, 10]
    predictions.write(tmp_path / "S2/seed0/predictions.csv", parts(start=3), scores(seed=1), scores())
    with pytest.raises(ValueError, match="S2/seed0 was tested on other tiles than A1/seed0"):
        predictions.read_runs(tmp_path)


def odd(start=0):
    """Tiles and patients whose names hold what splits lines elsewhere, commas and quotes, or begin like a formula."""
    both = parts(start=start)
    for number, row in enumerate((*both.val, *both.test)):
        name = ("{}", "a\u2028{}", "a\x85{}", 'a\n"b",{}', "=1+1|{}", "'=1+1|{}", "'{}", "@SUM({})")[number % 8]
        row |= {"isic_id": name.format(start + number), "patient_id": name.format(f"P{start + number}")}
    return both


def test_odd_names_come_back_also_from_joined_folds(tmp_path):
    """Every id and patient as it was, written and read, merged by classify.py or joined from runs without a fold column; the table
    holds no cell that a spreadsheet runs."""
    for fold in range(2):
        for name, number in ((f"fold{fold}", fold), (f"run{fold}", None)):
            predictions.write(tmp_path / name / "predictions.csv", odd(100 * fold), scores(seed=1), scores(), number)
    predictions.merge_folds(tmp_path, 2)
    predictions.join([tmp_path / f"run{fold}" / "predictions.csv" for fold in range(2)], tmp_path / "joined.csv")
    assert (tmp_path / "joined.csv").read_bytes() == (tmp_path / "predictions.csv").read_bytes()
    for path, starts in ((tmp_path / "run1" / "predictions.csv", [100]), (tmp_path / "joined.csv", [0, 100])):
        run, rows = predictions.read(path), [row for start in starts for row in odd(start).test]
        assert dict(zip(run.ids, run.patients)) == {row["isic_id"]: row["patient_id"] for row in rows}
    with open(tmp_path / "joined.csv", newline="", encoding="utf-8") as file:
        assert not [cell for row in csv.reader(file) for cell in row if cell.startswith(("=", "@"))]


def test_a_damaged_fold_is_not_joined(tmp_path):
    """An empty table, a line too short: named, and nothing written."""
    predictions.write(tmp_path / "0.csv", parts(), scores(seed=1), scores())
    for text, words in (("", "no column 'id'"), ((tmp_path / "0.csv").read_text(encoding="utf-8") + "T99,benign\n", "1.csv, line 18")):
        (tmp_path / "1.csv").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            predictions.join([tmp_path / "0.csv", tmp_path / "1.csv"], tmp_path / "joined.csv")
    assert not (tmp_path / "joined.csv").exists()


@pytest.mark.parametrize("damage", [{"notes": [5]}, {"notes": [""]}, {"notes": {"a": 1}}, {"notes": None}, {"seeds": "5"}, {"seeds": 0},
                                    {"experiments": 5}, {"experiments": [1]}, {"checked": [1]}, {"counts": []}, {"counts": [{}]},
                                    {"synthetic_sha256": 5}])
def test_a_damaged_record_is_named(tmp_path, damage):
    """args.json with a value of a type that classify.py never writes: one line names the file and the key."""
    assert predictions.read_args(tmp_path) == {}
    good = {"notes": ["x"], "seeds": 5, "experiments": ["A1"], "checked": None, "synthetic_sha256": None, "counts": [
        {"added": 0, **{part: {"benign": 2, "malignant": 1} for part in ("train", "val", "test")}}]}
    files.write_json(tmp_path / "args.json", good)
    assert predictions.read_args(tmp_path) == good
    files.write_json(tmp_path / "args.json", good | damage)
    with pytest.raises(ValueError, match=f"args.json is damaged: {next(iter(damage))} is "):
        predictions.read_args(tmp_path)
