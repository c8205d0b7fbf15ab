"""`python -m lesion crossfit`: stopped anywhere it goes on, what is done is verified, a leak stops it, every tile is tested once.

classify.py runs as it is; teaching and drawing, whose own tests are elsewhere, are stood in for by `scripts`.
"""
import json
import shlex
from pathlib import Path

import pytest
from tiny_tiles import write_set, write_synthetic

import classify
from lesion.classify import crossfit, predictions
from lesion.run import files, sums

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
    is tested once; A1, the same at every ratio, is trained once; the curve is written; called again nothing runs."""
    scripts.stop = 2
    more = ("--sizes", 6, "all", "--ratios", 1, 2)
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
    assert "next: python evaluate.py" in capsys.readouterr().out
    before = len(scripts.calls)
    run(data, *more)
    assert len(scripts.calls) == before


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
