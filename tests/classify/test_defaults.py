"""What classify.py takes without flags: the newest run's data and tiles, and the recipe of its base."""
import os
from pathlib import Path

import pytest
from tiny_tiles import write_set, write_synthetic

import classify
from lesion.classify import defaults
from lesion.run import files, folders


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with the demo set's place taken by a tiny set."""
    monkeypatch.chdir(tmp_path)
    write_set(folders.DEMO, {"train": (32, 12), "val": (8, 4), "test": (8, 4)})
    return tmp_path


def lora_run(name, data, age):
    """A finished run of train_lora.py as far as the defaults look."""
    folder = Path("runs") / name
    files.write_json(folder / "args.json", {"data": str(data), "label": "malignant", "base": str(folders.MINI)})
    files.write_bytes(folder / "lora.safetensors", b"")
    os.utime(folder / "lora.safetensors", (age, age))
    return folder


def drawn(name, run, count, age, base=folders.MINI):
    """A folder of generate.py, drawn with a run's LoRA."""
    folder = Path("samples") / name
    write_synthetic(folder, count, None)
    files.write_json(folder / "provenance.json", {"base": str(base), "loras": [{"file": str(run / "lora.safetensors"), "train_files": []}]})
    os.utime(folder / "provenance.json", (age, age))


def test_newest_run_decides(here):
    """Of two runs on two sets the newest gives the data; of that set's folders of tiles the newest is taken, not the newest of all."""
    write_set(Path("data/mine"), {"train": (32, 12), "val": (8, 4), "test": (8, 4)})
    old, new = lora_run("old", folders.DEMO, 100), lora_run("new", "data/mine", 200)
    drawn("a", new, 12, 300)
    drawn("b", new, 12, 400)
    drawn("c", old, 12, 500)
    args = classify.parse([])
    lines = defaults.fill(args)
    assert (args.data, args.synthetic) == (Path("data/mine"), [Path("samples/b")])
    assert "data: data/mine, which runs/new learnt from" in lines
    args = classify.parse(["--data", str(folders.DEMO)])
    defaults.fill(args)
    assert args.synthetic == [Path("samples/c")]


def test_recipe_follows_the_base(here):
    """Tiles of mini, or the demo set: the small network. Tiles of another base: the study's ResNet-50. A flag stands."""
    small = classify.parse(["--epochs", "9"])
    defaults.fill(small)
    assert (small.arch, small.weights, small.image_size, small.epochs, small.seeds) == ("resnet18", "none", 64, 9, 1)
    run = lora_run("real", "data/mine", 100)
    write_set(Path("data/mine"), {"train": (32, 12), "val": (8, 4), "test": (8, 4)})
    drawn("a", run, 12, 300, base=folders.SD15)
    study = classify.parse([])
    defaults.fill(study)
    assert (study.arch, study.weights, study.image_size, study.epochs, study.seeds) == ("resnet50", "imagenet", 128, 12, 5)
    assert study.ratio == 1.0


def test_too_few_tiles(here):
    """5 tiles for 12 real ones: on mini the ratio that fits is taken and said; on SD 1.5, and where it was asked for, 1 stays."""
    run = lora_run("run", folders.DEMO, 100)
    drawn("a", run, 5, 300)
    args = classify.parse([])
    assert any("--ratio 0.41" in line for line in defaults.fill(args))
    assert args.ratio == 0.41
    asked = classify.parse(["--ratio", "1"])
    defaults.fill(asked)
    assert asked.ratio == 1.0


def test_without_a_flag(here, capsys):
    """After a run and some tiles `python classify.py` trains every arm, and ends with the next command."""
    rows = files.read_manifest(folders.DEMO)
    run = lora_run("run", folders.DEMO, 100)
    write_synthetic(Path("samples/a"), 12, [row for row in rows if row["split"] == "train"])
    known = files.read_json(Path("samples/a/provenance.json"))
    known["loras"][0]["file"] = str(run / "lora.safetensors")
    files.write_json(Path("samples/a/provenance.json"), known | {"base": str(folders.MINI)})
    classify.main(["--epochs", "1", "--seeds", "1", "--image-size", "32", "--batch-size", "16"])
    out = capsys.readouterr().out
    assert out.strip().splitlines()[-1] == "next: python evaluate.py --classify runs/classify --data data/demo --synthetic samples/a"
    assert (Path("runs/classify/S2w/seed0/predictions.csv")).is_file()
