"""classify.py: a sweep from folder to table, kill -9 and go on with the same bytes, refusals that write nothing."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_tiles import write_set, write_synthetic

import classify
from lesion.classify import predictions
from lesion.run import files

ROOT = Path(__file__).resolve().parents[2]

QUICK = ["--arch", "resnet18", "--weights", "none", "--image-size", "32", "--epochs", "2", "--batch-size", "16",
         "--device", "cpu", "--seeds", "1", "--save-weights", "none"]


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """A set of 44 training, 12 val, 12 test tiles, and 12 synthetic ones whose LoRA saw training tiles only."""
    folder = tmp_path_factory.mktemp("tiles")
    rows = write_set(folder / "data", {"train": (32, 12), "val": (8, 4), "test": (8, 4)})
    seen = [row for row in rows if row["split"] == "train" and row["label"] == "malignant"]
    write_synthetic(folder / "synthetic", 12, seen)
    return folder


def flags(tiles, out, *more):
    return ["--data", str(tiles / "data"), "--synthetic", str(tiles / "synthetic"), "--out", str(out), *QUICK, *more]


def start(arguments):
    return subprocess.Popen([sys.executable, str(ROOT / "classify.py"), *arguments], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, encoding="utf-8")


@pytest.fixture(scope="module")
def sweep(tiles):
    """A finished sweep of three arms."""
    out = tiles / "whole"
    process = start(flags(tiles, out, "--experiments", "A1", "S2", "O1"))
    text, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out, text


def bytes_of(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.name in ("predictions.csv", "metrics.jsonl")}


def test_sweep_writes_predictions(sweep, tiles):
    """Every validation and test tile once, with label, split and patient; a table; args.json with flags and counts."""
    out, text = sweep
    rows = {row["isic_id"]: row for row in files.read_manifest(tiles / "data")}
    for arm in ("A1", "S2", "O1"):
        with open(out / arm / "seed0" / "predictions.csv", newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        assert list(table[0]) == ["id", "label", "score", "split", "patient"]
        assert sorted(row["id"] for row in table) == sorted(n for n, row in rows.items() if row["split"] != "train")
        for row in table:
            known = rows[row["id"]]
            assert (row["label"], row["split"], row["patient"]) == (known["label"], known["split"], known["patient_id"])
            assert 0 <= float(row["score"]) <= 1
        assert not (out / arm / "seed0" / "state.safetensors").exists()
        steps = [row["step"] for row in files.read_jsonl(out / arm / "seed0" / "metrics.jsonl")]
        assert steps == [3, 6], "the same number of steps in every arm: two epochs of DS1, 44 tiles in batches of 16"
    args = json.loads((out / "args.json").read_text(encoding="utf-8"))
    assert args["experiments"] == ["A1", "S2", "O1"]
    assert args["counts"][0] == {"train": {"benign": 32, "malignant": 12}, "val": {"benign": 8, "malignant": 4},
                                 "test": {"benign": 8, "malignant": 4}, "added": 12}
    assert args["checked"][0]["loras"][0]["tiles"] == 12
    assert "S2" in text
    assert "evaluate.py" in text


def test_killed_sweep_ends_with_the_same_bytes(sweep, tiles):
    """kill -9 as the first arm's state, then as the second's is being written: the sweep goes on and ends equal."""
    out = tiles / "killed"
    arguments = flags(tiles, out, "--experiments", "A1", "S2", "O1")
    for arm in ("A1", "S2"):
        process, deadline = start(arguments), time.monotonic() + 240
        while not (found := list((out / arm).glob("seed0/*state.safetensors*"))):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert found
        assert not (out / arm / "seed0" / "predictions.csv").exists()
    process = start(arguments)
    text, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "A1 seed 0: done before" in text
    assert bytes_of(out) == bytes_of(sweep[0])


def test_finished_runs_are_skipped_and_more_can_be_added(sweep, tiles, capsys):
    """Done arms are not trained again; another arm joins; a second seed of one arm too; another recipe is refused."""
    out = sweep[0]
    before = bytes_of(out)
    classify.main(flags(tiles, out, "--experiments", "A1", "B0"))
    assert "A1 seed 0: done before" in capsys.readouterr().out
    after = bytes_of(out)
    assert before.items() <= after.items()
    assert "B0/seed0/predictions.csv" in after
    assert json.loads((out / "args.json").read_text(encoding="utf-8"))["experiments"] == ["B0", "A1", "S2", "O1"]
    with pytest.raises(ValueError, match="lr was 0.001, now 0.5"):
        classify.main(flags(tiles, out, "--lr", "0.5"))
    with pytest.raises(ValueError, match="holds a run already"):
        classify.main(flags(tiles, out, "--no-resume"))
    assert bytes_of(out) == after


def test_synthetic_arms_can_follow(tiles, capsys):
    """A folder begun with a real arm takes S2 once there are synthetic tiles, and then no others."""
    out = tiles / "real_first"
    classify.main(["--data", str(tiles / "data"), "--out", str(out), *QUICK, "--experiments", "A1"])
    classify.main(flags(tiles, out, "--experiments", "S2"))
    assert (out / "S2" / "seed0" / "predictions.csv").is_file()
    seen = [row for row in files.read_manifest(tiles / "data") if row["split"] == "train"]
    write_synthetic(tiles / "others", 12, seen, seed=8)
    with pytest.raises(ValueError, match="runs with other synthetic tiles"):
        classify.main(flags(tiles, out, "--experiments", "S2", "--synthetic", str(tiles / "others")))


def test_arms_are_different_runs(sweep):
    """A1, S2 and O1 score the same tiles differently: each really learnt from its own set."""
    scores = [predictions.read_runs(sweep[0])[arm][0].scores for arm in ("A1", "S2", "O1")]
    assert not any(np.array_equal(scores[i], scores[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_cross_fitting(tiles, tmp_path):
    """Two folds: every tile of the set tested once, by folds, in one table."""
    out = tmp_path / "folds"
    classify.main(flags(tiles, out, "--experiments", "A1", "--folds", "2", "--epochs", "1"))
    run = predictions.read_runs(out)["A1"][0]
    assert len(run.ids) == 68
    assert sorted(path.name for path in (out / "A1/seed0").iterdir()) == ["fold0", "fold1", "predictions.csv"]


@pytest.mark.parametrize(("change", "words"), [
    (["--synthetic", "nowhere"], "no such folder"),
    (["--ratio", "3"], "holds 12 synthetic malignant tiles and 36 are needed"),
    (["--data", "nowhere"], "not a prepared data set"),
    (["--weights", "nowhere.pth"], "no such file"),
    (["--folds", "2", "--synthetic", "a", "b", "c"], "names 3 folders for 2 folds"),
])
def test_bad_flags(tiles, tmp_path, change, words):
    """No synthetic folder, too few synthetic tiles, no data, no weights: an error, and no run folder."""
    with pytest.raises(ValueError, match=words):
        classify.main(flags(tiles, tmp_path / "run", *change))
    assert not (tmp_path / "run").exists()


def test_s2_without_synthetic_folder(tiles, tmp_path):
    """S2 asked for without --synthetic: the error says which arms go without."""
    with pytest.raises(ValueError, match="--experiments B0 A1 W1 O1"):
        classify.main(["--data", str(tiles / "data"), "--out", str(tmp_path / "run"), *QUICK])
    assert not (tmp_path / "run").exists()


def test_leaks_and_bad_sets_are_refused(tiles, tmp_path, run_script):
    """A LoRA that saw a test tile; a patient on both sides; a class missing in a part; a doubled id: exit code 2, one
    line, nothing written."""
    rows = files.read_manifest(tiles / "data")
    write_synthetic(tmp_path / "leak", 12, rows)
    cases = {"held-out tiles": (rows, tmp_path / "leak")}
    clean = tiles / "synthetic"
    cases["are in both train and test"] = ([rows[0] | {"patient_id": rows[-1]["patient_id"]}, *rows[1:]], clean)
    cases["test part has no malignant"] = (rows[:-4], clean)
    cases["have the same id"] = ([rows[0] | {"isic_id": rows[1]["isic_id"]}, *rows[1:]], clean)
    for number, (words, (changed, synthetic)) in enumerate(cases.items()):
        folder = tmp_path / f"set{number}"
        folder.mkdir()
        (folder / "images").symlink_to(tiles / "data" / "images")
        files.write_manifest(folder, changed)
        arguments = ["--data", folder, "--synthetic", synthetic, "--out", tmp_path / "run", *QUICK]
        if number == 0:
            result = run_script("classify.py", *arguments)
            assert result.returncode == 2
            assert len(result.stderr.strip().splitlines()) == 1
            assert words in result.stderr
        else:
            with pytest.raises(ValueError, match=words):
                classify.main([str(argument) for argument in arguments])
        assert not (tmp_path / "run").exists()


def test_unreadable_tiles(tiles, tmp_path, capsys):
    """A torn training tile is left out, and said; a torn synthetic one is refused: there must be as many as asked."""
    data, synthetic = tmp_path / "data", tmp_path / "synthetic"
    rows = write_set(data, {"train": (16, 6), "val": (4, 4), "test": (4, 4)})
    (data / rows[0]["file_name"]).write_bytes(b"torn")
    write_synthetic(synthetic, 6, rows[:3])
    classify.main(["--data", str(data), "--out", str(tmp_path / "run"), *QUICK, "--experiments", "B0", "--epochs", "1"])
    assert "1 tiles of train cannot be read" in capsys.readouterr().out
    (synthetic / "00002.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"synthetic tiles .* cannot be read"):
        classify.main(["--data", str(data), "--synthetic", str(synthetic), "--out", str(tmp_path / "other"), *QUICK])


def test_shares_of_torchrun(tiles, tmp_path):
    """Two processes of torchrun share three runs and leave the same kind of folder as one."""
    arguments = flags(tiles, tmp_path / "run", "--experiments", "B0", "A1", "O1", "--epochs", "1")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(ROOT / "classify.py"), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    assert list(predictions.read_runs(tmp_path / "run")) == ["B0", "A1", "O1"]
    assert result.stdout.count("tested on") == 1


def test_help_is_quick(run_script):
    """--help imports no torch: it lists the arms in under half a second of processor time."""
    started = os.times()
    result = run_script("classify.py", "--help")
    used = os.times()
    assert "S2w = " in result.stdout
    assert used.children_user + used.children_system - started.children_user - started.children_system < 0.5
