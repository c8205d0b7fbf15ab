"""lesion.classify.folds: every tile is tested once, units stay together, a fold's generator has seen nothing that is held out."""
import numpy as np
import pytest
from PIL import Image
from tiny_tiles import write_set

from lesion.classify import folds
from lesion.run import files


@pytest.fixture
def known(tmp_path):
    """68 tiles with two of each patient."""
    return tmp_path, write_set(tmp_path, {"train": (32, 12), "val": (8, 4), "test": (8, 4)})


def strip(rows):
    return [{**row, "patient_id": None} for row in rows]


def test_patients_stay_together_and_every_tile_is_tested_once(known):
    """Known patients: over 3 folds each tile is in one test part; no patient on two sides of any; classes in proportion."""
    _, rows = known
    units = [f"patient {row['patient_id']}" for row in rows]
    parts = folds.split(rows, units, 3, 0.2, seed=0)
    assert [sum(part[i] == "test" for part in parts) for i in range(len(rows))] == [1] * len(rows)
    for part in parts:
        sides = {}
        for unit, side in zip(units, part):
            assert sides.setdefault(unit, side) == side
        for side in ("train", "val", "test"):
            assert {row["label"] for row, mine in zip(rows, part) if mine == side} == {"benign", "malignant"}
    assert folds.split(rows, units, 3, 0.2, seed=0) == parts != folds.split(rows, units, 3, 0.2, seed=1)


def test_unknown_patients_keep_the_held_out_part_together(known):
    """Without patients the set's own val and test tiles are fold 0, whole: of it the split file's promise still holds."""
    _, rows = known
    rows = strip(rows)
    parts = folds.split(rows, [f"tile {row['file_name']}" for row in rows], 3, 0.2, seed=0)
    assert [row["split"] != "train" for row in rows] == [side == "test" for side in parts[0]]
    assert [sum(part[i] == "test" for part in parts) for i in range(len(rows))] == [1] * len(rows)


def test_near_copies_are_one_unit(tmp_path):
    """Of tiles without a patient a turned, recompressed copy shares its original's unit; unlike tiles do not."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(4):
        small = Image.fromarray(rng.integers(0, 255, (12, 12, 3)).astype(np.uint8)).resize((64, 64), Image.BICUBIC)
        image = small if i < 3 else Image.open(tmp_path / "images" / "0.png").rotate(90)
        image.save(tmp_path / "images" / (f"{i}.png" if i < 3 else "3.jpg"))
        name = f"images/{i}.png" if i < 3 else "images/3.jpg"
        rows.append({"file_name": name, "label": "benign", "sha256": files.sha256_file(tmp_path / name)})
    units = folds.units_of(tmp_path, rows)
    assert units[3] == units[0]
    assert len(set(units)) == 3
    rows[1]["patient_id"] = rows[2]["patient_id"] = "P1"
    assert folds.units_of(tmp_path, rows)[1:3] == ["patient P1"] * 2


def test_sizes_are_nested_and_only_malignant_training_tiles_go(known):
    """Of 3 and 6 malignant training tiles the 3 are among the 6; nothing else is left out; more than there are: all."""
    _, rows = known
    part = [row["split"] for row in rows]
    out = {most: {row["file_name"] for row, side in zip(rows, folds.limit(rows, part, most, 0)) if side == "unused"} for most in (3, 6)}
    assert (len(out[3]), len(out[6])) == (9, 6)
    assert out[6] < out[3]
    assert all(row["label"] == "malignant" and row["split"] == "train" for row in rows if row["file_name"] in out[3])
    assert folds.limit(rows, part, None, 0) == folds.limit(rows, part, 99, 0) == part


def test_a_fold_is_a_prepared_data_set(known):
    """Its manifest has the fold's parts and units, its tiles are the set's, the record says what it is."""
    data, rows = known
    part = ["unused", *(row["split"] for row in rows[1:])]
    folds.write(data, rows, [f"unit {i}" for i in range(len(rows))], part, data / "fold")
    written = files.read_manifest(data / "fold")
    assert [row["file_name"] for row in written] == [row["file_name"] for row in rows[1:]]
    assert [row["unit"] for row in written] == [f"unit {i}" for i in range(1, len(rows))]
    assert all(files.sha256_file(data / "fold" / row["file_name"]) == row["sha256"] for row in written)
    assert files.read_json(data / "fold" / "dataset.json")["split"] == "crossfit"


def test_leaks(known):
    """A held-out tile that the generator saw is named; so is one of the same patient, and one that is a near copy (same unit)."""
    _, rows = known
    rows = [{**row, "unit": f"tile {i}"} for i, row in enumerate(rows)]
    train, test = ([row for row in rows if row["split"] == name] for name in ("train", "test"))
    seen = [{"file_name": row["file_name"], "sha256": row["sha256"], "patient_id": row["patient_id"]} for row in train]
    assert folds.leaks(seen, rows) == []
    assert folds.leaks([*seen, seen[0] | {"sha256": test[0]["sha256"]}], rows) == [test[0]["file_name"]]
    assert folds.leaks([*seen, seen[0] | {"patient_id": test[0]["patient_id"]}], rows) == [row["file_name"] for row in test[:2]]
    test[3]["unit"] = train[0]["unit"]
    assert folds.leaks(seen, rows) == [test[3]["file_name"]]


def test_too_many_folds(known):
    """More folds than patients of a class: one line."""
    _, rows = known
    with pytest.raises(ValueError, match="cannot be dealt to 40 folds"):
        folds.split(rows, [f"patient {row['patient_id']}" for row in rows], 40, 0.2, seed=0)
