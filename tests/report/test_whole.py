"""The whole report: in its place as a whole or not at all, everything it read and wrote by SHA-256, recomputed from its request."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import picture_tiles
import pytest
from made_runs import write_run

from lesion.report import whole
from lesion.report.request import Request
from lesion.run import files

ROOT = Path(__file__).resolve().parents[2]
ODD = "a$b{c}_^"  # a name that matplotlib reads as broken mathematics unless it is told not to


@pytest.fixture(scope="module")
def made(tmp_path_factory, run_script):
    """evaluate.py with arms and pictures, its opened files recorded: (process, folder, the opened files)."""
    root = tmp_path_factory.mktemp("whole")
    picture_tiles.write_data(root / "data")
    images = picture_tiles.blobs(np.random.default_rng(1), 20, True)
    picture_tiles.write_synthetic(root / ODD, images)
    rows = files.read_manifest(root / "data")
    write_run(root / "runs" / "arms", {"A1": 0.0, "W1": 0.0, "S2": 0.5}, seeds=2, data_rows=rows)
    hook = root / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import sys, os\n"
        "log = open(os.environ['OPENED'], 'a')\n"
        "def see(event, args):\n"
        "    if event == 'open' and isinstance(args[0], (str, bytes)) and args[1] in ('r', 'rb', None):\n"
        "        log.write(os.fsdecode(args[0]) + '\\n'); log.flush()\n"
        "sys.addaudithook(see)\n", encoding="utf-8")
    done = run_script("evaluate.py", "--classify", "runs/arms", "--data", "data", "--synthetic", ODD, "--out", "report",
                      "--drop-copies", "kept", cwd=root, timeout=900,
                      env={"OPENED": str(root / "opened.txt"), "PYTHONPATH": f"{hook}{os.pathsep}{ROOT}"})
    assert done.returncode == 0, done.stderr
    return done, root, (root / "opened.txt").read_text(encoding="utf-8").splitlines()


def test_every_file_read_and_written_is_in_the_manifest(made):
    """What the process opened among the inputs is what the manifest lists (caches, keyed by hashes of their own, aside), each
    with its SHA-256; every file of the report is listed as written, each with its own."""
    _, root, opened = made
    manifest = json.loads((root / "report" / "manifest.json").read_text(encoding="utf-8"))
    inputs = [root / "data", root / ODD, root / "runs"]
    seen = {(root / name).resolve() for name in opened}
    seen = {path.relative_to(root.resolve()).as_posix() for path in seen
            if any(path.is_relative_to(folder.resolve()) for folder in inputs) and ".cache" not in path.parts and path.is_file()}
    assert len(seen) > 300
    assert seen <= set(manifest["read"])
    assert manifest["read"]["data/metadata.jsonl"] == files.sha256_file(root / "data" / "metadata.jsonl")
    for name, sha256 in manifest["read"].items():
        assert files.sha256_file(root / name) == sha256
    on_disk = {path.relative_to(root / "report").as_posix() for path in (root / "report").rglob("*") if path.is_file()}
    assert on_disk - {"manifest.json"} == set(manifest["written"])
    for name, sha256 in manifest["written"].items():
        assert files.sha256_file(root / "report" / name) == sha256


def test_the_numbers_come_again_from_the_manifests_request(made, monkeypatch):
    """results.json, computed anew from the request that the manifest holds, is the same to the last digit."""
    _, root, _ = made
    monkeypatch.chdir(root)
    manifest = json.loads((root / "report" / "manifest.json").read_text(encoding="utf-8"))
    again = whole.compute(Request.from_json(manifest["request"]), Path(manifest["drop_copies"]))
    assert json.loads(json.dumps(again.results)) == json.loads((root / "report" / "results.json").read_text(encoding="utf-8"))


def test_an_odd_name_is_drawn_and_written(made):
    """A folder called a$b{c}_^ stands in page, Markdown and figures as it is called, and its copies are dropped there."""
    _, root, _ = made
    assert ODD in (root / "report" / "report.html").read_text(encoding="utf-8")
    assert "a\\$b{c}\\_^" in (root / "report" / "report.md").read_text(encoding="utf-8")
    assert (root / "kept" / ODD / files.MANIFEST).is_file()
    assert b"<svg" in (root / "report" / "figures" / "tsne-real.svg").read_bytes()


def test_it_ends_with_the_next_command(made):
    """The last line is what to type next: here readers are still missing."""
    done, *_ = made
    assert done.stdout.splitlines()[-1].startswith("next: python -m lesion study runs/study --real data --synthetic ")


def test_long_silences_show_progress(made):
    """Bootstrap, features, fidelity, copies, attributes and t-SNE each say how far they are."""
    done, *_ = made
    for words in ("bootstrap", "features", "fidelity", "copies", "attributes", "t-SNE"):
        assert words in done.stderr


def test_foreign_files_are_never_replaced(made, run_script):
    """--out with anything that is no report's: one line, exit code 2, before anything is computed; the files stay."""
    _, root, _ = made
    (root / "mine").mkdir()
    for name in ("notes.txt", "report.html"):
        (root / "mine" / name).write_text("mine", encoding="utf-8")
    done = run_script("evaluate.py", "--classify", "runs/arms", "--out", "mine", cwd=root)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "holds notes.txt" in done.stderr
    assert sorted(path.name for path in (root / "mine").iterdir()) == ["notes.txt", "report.html"]
    done = run_script("evaluate.py", "--classify", "runs/arms", "--out", "mine/notes.txt", cwd=root)
    assert "is a file" in done.stderr


def test_killed_while_it_is_written(made, tmp_path):
    """SIGKILL once the new report is being written: the old one is whole, and the next call leaves what an uninterrupted one
    does, with nothing beside it."""
    _, root, _ = made
    command = [sys.executable, str(ROOT / "evaluate.py"), "--classify", str(root / "runs" / "arms"), "--out", str(tmp_path / "r")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run(command, check=True, capture_output=True, env=env)

    def state():
        return {path.relative_to(tmp_path): path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    before = state()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    while not list(tmp_path.glob(".r.*.partial/figures/*.svg")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert {name: data for name, data in state().items() if name.parts[0] == "r"} == before
    assert len(list(tmp_path.glob(".r.*.partial"))) == 1
    subprocess.run(command, check=True, capture_output=True, env=env)
    assert state() == before
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_without_a_flag_the_newest_run_is_reported(made, run_script):
    """`python evaluate.py` after classify.py: it says which command that is, and makes that report."""
    _, root, _ = made
    done = run_script("evaluate.py", "--out", "newest", cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "the newest: python evaluate.py --classify runs/arms --out newest"
    assert done.stdout.splitlines()[-1] == "next: python generate.py"
    manifest = json.loads((root / "newest" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["request"]["classify"] == "runs/arms"
    assert set(json.loads((root / "newest" / "results.json").read_text(encoding="utf-8"))) == {"classification"}
