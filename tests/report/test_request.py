"""lesion.report.request: what belongs to a report without a flag, and every file it rests on."""
import json
import os

import pytest

from lesion.report import request
from lesion.report.request import Request
from lesion.run import files


def run_of(root, name, val_loss=True):
    """A finished run of train_lora.py."""
    files.write_json(root / "runs" / name / "args.json", {"data": "data/mine"})
    files.write_jsonl(root / "runs" / name / "metrics.jsonl", [{"step": 1, **({"val_loss": 1.0} if val_loss else {"loss": 1.0})}])
    files.write_bytes(root / "runs" / name / "lora.safetensors", name.encode())


def tiles_of(root, name, run, gif=False):
    """A folder of generate.py, drawn with the LoRA of `run`."""
    lora = f"runs/{run}/lora.safetensors"
    files.write_bytes(root / "samples" / name / "0.png", b"tile")
    files.write_manifest(root / "samples" / name, [{"file_name": "0.png"}])
    files.write_json(root / "samples" / name / "provenance.json", {
        "base_sha256": "b", "loras": [{"file": lora, "sha256": files.sha256_file(root / lora), "weight": 1.0}]})
    if gif:
        files.write_bytes(root / "samples" / name / "denoising.gif", name.encode())


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two runs, tiles of each, a classifier run, a study with answers and an empty one; the oldest first."""
    monkeypatch.chdir(tmp_path)
    files.write_manifest(tmp_path / "data" / "mine", [{"file_name": "images/a.jpg"}])
    for name in ("old", "new"):
        run_of(tmp_path, name)
        tiles_of(tmp_path, name, name)
    for name in ("classify-old", "classify"):
        files.write_bytes(tmp_path / "runs" / name / "S2" / "seed0" / "predictions.csv", b"id")
    files.write_json(tmp_path / "runs" / "study" / "study.json", {})
    files.write_bytes(tmp_path / "runs" / "study" / "answers" / "reader-1.jsonl", b"{}")
    for place, path in enumerate(sorted((path for path in tmp_path.rglob("*") if path.is_file()), key=lambda path: (
            "new" in str(path.relative_to(tmp_path)), path.parts[-4] == "classify"))):
        os.utime(path, (1000 + place, 1000 + place))
    return tmp_path


def test_the_newest_of_each_is_found(world):
    """Without a flag: the newest tiles, the run whose LoRA drew them and its data, the newest classifier run and study;
    --data wins over what the run names; a study nobody has answered is none."""
    found = request.newest()
    assert [str(one) for one in (found.classify, found.data, *found.synthetic, *found.runs, found.study)] == [
        "runs/classify", "data/mine", "samples/new", "runs/new", "runs/study"]
    assert str(request.newest(world / "other").data) == str(world / "other")
    (world / "runs" / "study" / "answers" / "reader-1.jsonl").unlink()
    assert request.newest().study is None


def test_a_run_is_only_named_if_its_lora_drew_the_tiles(world):
    """A run that has been trained anew, or that has no validation loss to draw, is left out; without data, the tiles are."""
    files.write_bytes(world / "runs" / "new" / "lora.safetensors", b"another")
    assert request.newest().runs == ()
    run_of(world, "new", val_loss=False)
    assert request.newest().runs == ()
    (world / "data" / "mine" / files.MANIFEST).unlink()
    assert request.newest().synthetic == ()


def test_the_denoising_gif_is_found_beside_the_folder(world):
    """In the folder itself; else in one beside it that the same LoRA drew; never in one of another LoRA."""
    tiles_of(world, "films-old", "old", gif=True)
    here = world / "samples"
    assert request.denoising(here / "new") is None
    assert request.denoising(here / "old") == here / "films-old" / "denoising.gif"
    tiles_of(world, "films-new", "new", gif=True)
    assert request.denoising(here / "new") == here / "films-new" / "denoising.gif"
    files.write_bytes(here / "new" / "denoising.gif", b"own")
    assert request.denoising(here / "new") == here / "new" / "denoising.gif"


def test_a_request_survives_json(world):
    """Written into the manifest and read again it is the same; a damaged one is one line."""
    asked = request.newest()
    assert Request.from_json(json.loads(json.dumps(asked.to_json()))) == asked
    for spoilt in ({}, {**asked.to_json(), "synthetic": None}):
        with pytest.raises(ValueError, match="is damaged"):
            Request.from_json(spoilt)


def test_files_read_are_listed(world):
    """Manifests, tiles, predictions, answers, metrics: each file that the report rests on, and no cache."""
    files.write_bytes(world / "data" / "mine" / ".cache" / "x.npy", b"cache")
    files.write_bytes(world / "data" / "mine" / "images" / "a.jpg", b"tile")
    names = [path.as_posix() for path in request.newest().files_read()]
    assert names == sorted([
        "data/mine/images/a.jpg", "data/mine/metadata.jsonl", "runs/classify/S2/seed0/predictions.csv", "runs/new/metrics.jsonl",
        "runs/study/answers/reader-1.jsonl", "runs/study/study.json", "samples/new/0.png", "samples/new/metadata.jsonl",
        "samples/new/provenance.json"])
