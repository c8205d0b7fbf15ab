"""`python -m lesion crossfit`: stopped anywhere it goes on, what is done is verified, a leak stops it, every tile is tested once.

classify.py runs as it is; teaching and drawing, whose own tests are elsewhere, are stood in for by `scripts`.
"""
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_tiles import write_set, write_synthetic

import classify
from lesion.classify import crossfit, predictions
from lesion.report import verify
from lesion.run import files, sums
from lesion.tiles.seen import Parts

QUICK = "--arch resnet18 --weights none --image-size 32 --epochs 1 --batch-size 16 --device cpu"


@pytest.fixture
def data(tmp_path):
    write_set(tmp_path / "data", {"train": (24, 12), "val": (6, 4), "test": (6, 4)})
    return tmp_path / "data"


class Scripts:
    """Stands in for `execute`: what was called; `stop`: fail at that call; `leak`: a LoRA that saw every tile."""

    def __init__(self):
        self.calls, self.stop, self.leak = [], None, False

    def __call__(self, command):
        if self.stop == len(self.calls):
            return 1
        self.calls.append(command)
        flags = {name: value for name, value in zip(command, command[1:]) if name.startswith("--")}
        out = Path(flags["--out"])
        if command[0] == "classify.py":
            classify.main(command[1:])
        elif command[0] == "train_lora.py":
            files.write_json(out / "args.json", {"data": flags["--data"]})
            files.write_bytes(out / "lora.safetensors", b"weights")
            sums.write(out)
        else:
            rows = files.read_manifest(flags["--prompts-from"])
            write_synthetic(out, int(flags["--count"]), [row for row in rows if self.leak or row["split"] == "train"])
            sums.write(out)
        return 0


@pytest.fixture
def scripts(monkeypatch):
    stand_in = Scripts()
    monkeypatch.setattr(crossfit, "execute", stand_in)
    return stand_in


def run(data, *more):
    crossfit.main([str(data), "--out", str(data.parent / "run"), "--folds", "2", "--seeds", "1", "--keep-copies", "--classify", QUICK,
                   *map(str, more)])


def test_whole_experiment_stopped_and_resumed(data, scripts, capsys):
    """Failing at its third step and called again: nothing is done twice; sizes and ratios each have an answer in which every tile
    is tested once; A1, the same at every ratio, is trained once; the curve is written, the report named is
    that of the primary contrast; called again nothing runs."""
    scripts.stop = 2
    more = ("--sizes", "all", 6, "--ratios", 1, 2)
    with pytest.raises(ValueError, match="generate.py ended with exit code 1"):
        run(data, *more)
    scripts.stop = None
    run(data, *more)
    names = [command[0] for command in scripts.calls]
    assert [names.count(name) for name in ("train_lora.py", "generate.py", "classify.py")] == [8, 4, 8]
    ratios = [(command[command.index("--experiments") + 1:command.index("--seeds")], command[command.index("--ratio") + 1])
              for command in scripts.calls if command[0] == "classify.py"]
    assert ratios[:2] == [(["A1", "S2", "O1"], "1"), (["S2", "O1"], "2")]
    every = sorted(row["isic_id"] for row in files.read_manifest(data))
    out = data.parent / "run"
    for name in ("6-ratio-1", "6-ratio-2", "all-ratio-1", "all-ratio-2"):
        runs = predictions.read_runs(out / "answer" / name)
        assert {arm: runs[arm][0].ids.tolist() for arm in runs} == dict.fromkeys(("A1", "S2", "O1"), every)
        assert len(json.loads((out / "answer" / name / "args.json").read_text(encoding="utf-8"))["counts"]) == 2
    found = files.read_json(out / "curve.json")
    assert [(one["size"], one["ratio"]) for one in found["points"]] == [(6, 1.0), (6, 2.0), ("all", 1.0), ("all", 2.0)]
    assert (out / "curve.png").is_file()
    assert f"next: python evaluate.py --classify {out / 'answer' / 'all-ratio-1'} " in capsys.readouterr().out
    before = len(scripts.calls)
    run(data, *more)
    assert len(scripts.calls) == before


def spoil(path):
    """Change one byte of a file."""
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_every_file_has_its_hash(data, scripts):
    """When all folds are done every file of RUN stands in a SHA256SUMS, the tiles that a fold links to too: verify names a changed
    answer, deal and tile, and the experiment does not go on from them. Ratios of arms that add nothing are one."""
    sums.write(data)
    more = ("--experiments", "A1", "--ratios", 1, 2)
    out = data.parent / "run"
    run(data, *more, "--only-fold", 0)
    assert not (out / sums.NAME).exists()
    run(data, *more)
    assert set(sums.read(out)) == {"args.json", "curve.json", "curve.png", "folds.json",
                                   "fold0/all/seconds.jsonl", "fold1/all/seconds.jsonl"}
    assert [problem for _, problem in verify.verify(out) if problem] == []
    tile = files.read_manifest(out / "fold0" / "all" / "data")[0]["file_name"]
    for path in (out / "curve.json", out / "folds.json", data / tile):
        spoil(path)
    found = {what for what, problem in verify.verify(out) if problem}
    assert {out / "curve.json", out / "folds.json", out / "fold0" / "all" / "data" / tile} <= set(map(Path, found))
    with pytest.raises(ValueError, match=f"{tile} is not what was written"):
        run(data, *more)
    (data / sums.NAME).unlink()  # a set that is not ours: the folds know its tiles
    with pytest.raises(ValueError, match="folds.json is not what was written"):
        run(data, *more)
    (out / sums.NAME).unlink()
    (out / "folds.json").unlink()
    with pytest.raises(ValueError, match=f"{tile} is not what was written"):
        run(data, *more)


@pytest.fixture
def plan(data):
    return crossfit.Plan(str(data), "0", "base", 2, (None,), (1.0,), ("A1",), 1, 0, 0.2, True, "", "", "")


@pytest.mark.parametrize("name", ["write", "update"])
def test_killed_before_the_hashes(data, plan, monkeypatch, name):
    """A fold's data set that has its manifest but not all its hashes gets them when the command is called again."""
    rows, out = files.read_manifest(data), data.parent / "run"

    def killed(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(sums, name, killed)
        with pytest.raises(KeyboardInterrupt):
            crossfit.prepare(plan, rows, out)
    assert (out / "fold0" / "all" / "data" / files.MANIFEST).is_file()
    crossfit.prepare(plan, rows, out)
    for fold in range(2):
        folder = out / f"fold{fold}" / "all" / "data"
        assert set(sums.read(folder)) == {files.MANIFEST, "dataset.json", *(row["file_name"] for row in files.read_manifest(folder))}


def test_odd_names_and_damaged_records(data, plan):
    """An id that splits lines elsewhere comes back from the joined table; a deal, a table and a record that are damaged end in one line,
    and a step whose command is not known is not taken for done."""
    rows, out = files.read_manifest(data), data.parent / "run"
    places = crossfit.prepare(plan, rows, out)
    runs = [place.folder / "ratio-1" for place in places]
    scores, count = np.array([0.1, 0.9]), {"added": 0, **{part: {"benign": 1, "malignant": 1} for part in ("train", "val", "test")}}
    for fold, folder in enumerate(runs):
        held = [{"file_name": f"{fold}{label}.png", "isic_id": f"{fold}\u2028{label}", "label": label} for label in ("benign", "malignant")]
        predictions.write(folder / "A1" / "seed0" / "predictions.csv", Parts([], held, held, False), scores, scores)
        files.write_json(folder / "args.json", {"notes": [], "counts": [count], "checked": None})
    crossfit.join(plan, places, 1.0, out / "answer" / "x")
    assert predictions.read_runs(out / "answer" / "x")["A1"][0].ids.tolist() == [
        f"{fold}\u2028{label}" for fold in range(2) for label in ("benign", "malignant")]
    for record in ({}, {"notes": [], "counts": 5, "checked": None}):
        files.write_json(runs[1] / "args.json", record)
        with pytest.raises(ValueError, match=r"fold1/all/ratio-1/args.json is (missing or )?damaged"):
            crossfit.join(plan, places, 1.0, out / "answer" / "x")
    files.write_json(runs[1] / "args.json", files.read_json(runs[0] / "args.json"))
    (runs[0] / "A1" / "seed0" / "predictions.csv").write_bytes(b"")
    with pytest.raises(ValueError, match=r"fold0/all/ratio-1/A1/seed0/predictions.csv has no column 'id'"):
        crossfit.join(plan, places, 1.0, out / "answer" / "x")
    deal = files.read_json(out / "folds.json")
    for damage in ({}, {"units": deal["units"]}, {"units": deal["units"][1:], "parts": deal["parts"]}, {**deal, "parts": 5},
                   {**deal, "parts": deal["parts"][:1]}, *({**deal, "parts": [[part] * len(rows)] * 2} for part in (1, "x"))):
        files.write_json(out / "folds.json", damage)
        with pytest.raises(ValueError, match=r"folds.json is damaged: it does not deal 56 tiles to 2 folds"):
            crossfit.prepare(plan, rows, out)


def test_a_step_without_its_command_is_not_done(plan, scripts, tmp_path):
    """A record that does not say the command: the step is run again."""
    place = crossfit.Place(0, None, tmp_path)
    files.write_json(tmp_path / ".drawn.command.json", {})
    files.write_bytes(tmp_path / "drawn" / "x", b"x")
    sums.write(tmp_path / "drawn")
    scripts.stop = 0
    with pytest.raises(ValueError, match="generate.py ended with exit code 1"):
        crossfit.run_step(place, tmp_path / "drawn", ["generate.py"])


def test_a_larger_ratio_draws_more(data, scripts):
    """The tiles are drawn again, copies are looked for again, and arms that learned from the fewer tiles are refused, not taken as
    done; removed, they are trained on what a first call with both ratios trains them on."""
    run(data, "--experiments", "S2", "--ratios", 1)
    arm = data.parent / "run" / "fold0" / "all" / "ratio-1"
    with pytest.raises(ValueError, match=f"{arm} learned from other tiles"):
        run(data, "--experiments", "S2", "--ratios", 1, 2)
    assert scripts.calls[-1][0] == "generate.py"
    for fold in ("fold0", "fold1"):
        shutil.rmtree(data.parent / "run" / fold / "all" / "ratio-1")
    run(data, "--experiments", "S2", "--ratios", 1, 2)
    grown = predictions.read_runs(arm)["S2"][0].scores
    shutil.rmtree(data.parent / "run")
    run(data, "--experiments", "S2", "--ratios", 1, 2)
    assert np.array_equal(grown, predictions.read_runs(arm)["S2"][0].scores)


def test_an_input_drawn_again_makes_its_step_run_again(scripts, tmp_path, monkeypatch):
    """The same command over other tiles is not done: the search for copies runs again."""
    command = ["evaluate.py", "--synthetic", str(tmp_path / "drawn"), "--out", str(tmp_path / "kept")]
    calls = []
    monkeypatch.setattr(crossfit, "execute", lambda command: scripts.calls.append(command) or (tmp_path / "kept").mkdir(exist_ok=True))
    for text in (b"x", b"x", b"y"):
        files.write_bytes(tmp_path / "drawn" / "x", text)
        sums.write(tmp_path / "drawn")
        crossfit.run_step(crossfit.Place(0, None, tmp_path), tmp_path / "kept", command)
        calls.append(len(scripts.calls))
    assert calls == [1, 1, 2]


def test_a_fold_learns_from_its_own_training_tiles(data, scripts):
    """Each LoRA, and the tiles drawn with it, belong to the fold's data set; the second phase goes on from the first."""
    run(data)
    for command in scripts.calls:
        flags = {name: value for name, value in zip(command, command[1:]) if name.startswith("--")}
        fold = flags["--out"].split("/")[-3]
        assert fold in ("fold0", "fold1")
        assert all(fold in value for name, value in flags.items() if name in ("--data", "--prompts-from", "--lora", "--synthetic"))
        if command[:3] == ["train_lora.py", "--phase", "2"]:
            assert flags["--init-lora"].endswith(f"{fold}/all/phase1/lora.safetensors")


def test_changed_artefacts_and_leaks_stop_it(data, scripts):
    """A LoRA file that is not as it was written; a generator that saw the test part; another recipe: one line each."""
    scripts.leak = True
    with pytest.raises(ValueError, match=r"has seen \d+ held-out tiles"):
        run(data)
    assert not [command for command in scripts.calls if command[0] == "classify.py"]
    with pytest.raises(ValueError, match="folds was 2, now 3"):
        run(data, "--folds", 3)
    (data.parent / "run" / "fold0" / "all" / "phase1" / "lora.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match="is not what was written"):
        run(data)


def test_one_machine_a_fold(data, scripts, capsys):
    """--only-fold does that fold and says what is missing; with the other done elsewhere the answer is made."""
    run(data, "--only-fold", 1)
    assert "not all folds are done yet" in capsys.readouterr().out
    assert {shlex.join(command).count("fold1") > 0 for command in scripts.calls} == {True}
    run(data, "--only-fold", 0)
    assert (data.parent / "run" / "curve.json").is_file()


def test_the_commands_of_a_fold():
    """Copies are dropped from what was drawn, and the classifiers learn from what is left; seeds, class, number and every further
    flag reach the script that they are for."""
    plan = crossfit.Plan("data", "sha", "base", 2, (None,), (1.0, 2.0), ("A1", "O1", "S2"), 3, 7, 0.2, True, "--rank 4", "--steps 9",
                         "--lr 1")
    folder = Path("run/fold1/all")
    steps = crossfit.steps_of(plan, crossfit.Place(1, None, folder), 12)
    flags = [{name: value for name, value in zip(command, command[1:]) if name.startswith("--")} for _, command in steps]
    assert [command[0] for _, command in steps] == ["train_lora.py"] * 2 + ["generate.py", "evaluate.py", "classify.py", "classify.py"]
    assert {one["--seed"] for one in flags if "--seed" in one} == {"7"}
    assert [("--seed" in one) for one in flags] == [True] * 3 + [False] + [True] * 2
    assert [one.get("--rank") for one in flags[:2]] == ["4", "4"]
    assert (flags[2]["--label"], flags[2]["--count"], flags[2]["--steps"]) == ("malignant", "30", "9")  # 1.25 x 2 x 12
    assert flags[3]["--synthetic"] == flags[2]["--out"] == str(folder / "drawn")
    assert steps[3][0] == Path(flags[3]["--drop-copies"]) / "drawn"
    assert {one["--synthetic"] for one in flags[4:]} == {str(steps[3][0])}
    assert {(one["--seeds"], one["--lr"]) for one in flags[4:]} == {("3", "1")}


def test_the_answer_holds_each_folds_own_scores(data, scripts):
    """Every score in the answer is that of the fold which tested the tile, at the ratio of the folder (A1: at the first), with its
    fold beside it; a fold's training tiles are their mean, and the curve's points are the joined runs'."""
    run(data, "--ratios", 1, 2)
    out = data.parent / "run"
    folds = {row["isic_id"]: str(fold) for fold in range(2) for row in files.read_manifest(out / f"fold{fold}" / "all" / "data")
             if row["split"] == "test"}
    points = files.read_json(out / "curve.json")["points"]
    for point in points:
        for arm in ("A1", "S2", "O1"):
            at = "ratio-1" if arm == "A1" else f"ratio-{point['ratio']:g}"
            parts = [predictions.read_runs(out / f"fold{fold}" / "all" / at)[arm][0] for fold in range(2)]
            own = {name: score for part in parts for name, score in zip(part.ids, part.scores)}
            joined = predictions.read_runs(out / "answer" / f"all-ratio-{point['ratio']:g}")[arm][0]
            assert dict(zip(joined.ids, joined.scores)) == own
            assert dict(zip(joined.ids, joined.folds)) == folds
            assert point["arms"][arm]["auroc"] == pytest.approx(crossfit_auroc(parts))
        trained = [sum(row["split"] == "train" and row["label"] == "malignant" for row in
                       files.read_manifest(out / f"fold{fold}" / "all" / "data")) for fold in range(2)]
        assert point["real"] == pytest.approx(sum(trained) / 2)
    assert any("built-in base was taught with benign tiles" in note
               for note in files.read_json(out / "answer" / "all-ratio-1" / "args.json")["notes"])


def crossfit_auroc(parts):
    """Mean of the folds' AUROCs, by malignant tiles."""
    from sklearn.metrics import roc_auc_score
    return sum(part.labels.sum() * roc_auc_score(part.labels, part.scores) for part in parts) / sum(part.labels.sum() for part in parts)


def test_share_and_seed_reach_the_folds(data, scripts, monkeypatch):
    """--validation-share and --seed are those that the folds are dealt by, and every size is chosen by the one seed."""
    from lesion.classify import folds
    seen, split, limit = [], folds.split, folds.limit
    monkeypatch.setattr(folds, "split", lambda rows, units, *rest: seen.append(rest) or split(rows, units, *rest))
    monkeypatch.setattr(folds, "limit", lambda rows, parts, *rest: seen.append(rest) or limit(rows, parts, *rest))
    run(data, "--validation-share", 0.4, "--seed", 5, "--sizes", 4)
    assert seen == [(2, 0.4, 5), (4, 5), (4, 5)]
