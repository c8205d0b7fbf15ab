"""`python -m lesion verify`: folders as written pass; a changed byte, row, answer or number is named, however well the change is hidden."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report.test_evaluate_script import write_run
from study_sets import real_set, synthetic_set

import evaluate
from lesion.report import verify
from lesion.run import files, sums
from lesion.web import study_folder

ROOT = Path(__file__).resolve().parents[2]


def wrong(folder, **how):
    """{what: problem} of everything that is not as written."""
    return {what: problem for what, problem in verify.verify(folder, **how) if problem}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a classifier run and the report of it, made by evaluate.py."""
    place = tmp_path_factory.mktemp("made")
    write_run(place / "arms", {"O1": 0.0, "S2": 0.5}, malignant=20, benign=60)
    sums.write(place / "arms")
    before = os.getcwd()
    os.chdir(place)
    try:
        evaluate.main(["--classify", "arms", "--out", "report"])
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def report(made, tmp_path, monkeypatch):
    """A copy of it, the working directory inside."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return Path("report")


def forge(report, name):
    """Enter a changed file's hash in the report's manifest, as a careful forger would."""
    manifest = files.read_json(report / "manifest.json")
    manifest["written"][name] = files.sha256_file(report / name)
    files.write_json(report / "manifest.json", manifest)


def test_as_written(report):
    """The untouched report and run pass, everything checked."""
    results = list(verify.verify(report))
    assert not [problem for _, problem in results if problem]
    assert {f"report/{name} computed anew" for name in ("results.json", "report.md", "report.html")} <= {what for what, _ in results}
    assert len(results) > 10
    assert wrong(Path("arms")) == {}


@pytest.mark.parametrize("hidden", [False, True])
def test_a_changed_number(report, hidden):
    """One number of results.json raised by a thousandth is named with its place and both values, its hash forged or not."""
    results = files.read_json(report / "results.json")
    row = results["classification"]["contrasts"][0]["metrics"]["auroc"]
    row["difference"] += 0.001
    files.write_json(report / "results.json", results)
    if hidden:
        forge(report, "results.json")
    found = " ".join(problem for _, problem in verify.verify(report) if problem)
    assert "classification.contrasts[0].metrics.auroc.difference is " in found
    assert "computed anew it is" in found
    assert ("is not what was written" in found) != hidden


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_a_changed_word(report, name):
    """A digit of the page changed, its hash forged: the line is named."""
    text = (report / name).read_text(encoding="utf-8")
    start = text.index("0.", text.index("AUROC"))
    changed = text[:start + 2] + ("1" if text[start + 2] != "1" else "2") + text[start + 3:]
    (report / name).write_text(changed, encoding="utf-8")
    forge(report, name)
    found = wrong(report)
    assert list(found) == [f"report/{name}"]
    assert "computed anew it says" in found[f"report/{name}"]


def test_a_changed_prediction(report):
    """One score of predictions.csv changed: named by the run's hashes, by the report's, and by the numbers that no longer follow."""
    path = Path("arms/S2/seed0/predictions.csv")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    cells = lines[-1].split(",")
    cells[2] = "0.999" if float(cells[2]) < 0.5 else "0.001"
    path.write_text("".join([*lines[:-1], ",".join(cells)]), encoding="utf-8")
    assert list(wrong(Path("arms"))) == [str(path)]
    found = wrong(report)
    assert found[str(path)] == "is not the file of which report was made"
    assert "computed anew" in found["report/results.json"]


def test_a_changed_figure_and_a_lost_manifest(report):
    """A figure is named by its hash; without manifest.json nothing is believed."""
    figure = next((report / "figures").glob("*.svg"))
    figure.write_bytes(figure.read_bytes() + b" ")
    assert list(wrong(report, recompute=False)) == [str(figure)]
    (report / "manifest.json").unlink()
    assert "is missing" in wrong(report)[str(report / "manifest.json")]


def test_a_list_that_was_emptied(report):
    """Nothing passes by being unlisted: a report's figure replaced and its lists emptied, a run's SHA256SUMS emptied or one line of it
    taken out, a file added."""
    manifest = files.read_json(report / "manifest.json")
    figure = next((report / "figures").glob("*.png"))
    figure.write_bytes(b"x")
    files.write_json(report / "manifest.json", manifest | {"written": {}, "read": {}})
    found = wrong(report, recompute=False)
    assert "is not listed in manifest.json" in found[str(figure)]
    assert found.keys() == {str(report / name) for name in manifest["written"]} | manifest["read"].keys()
    run, table = Path("arms"), Path("arms/O1/seed0/predictions.csv")
    lines = (run / sums.NAME).read_text(encoding="utf-8").splitlines(keepends=True)
    (run / sums.NAME).write_text("".join(line for line in lines if "O1/seed0" not in line), encoding="utf-8")
    (run / "new.csv").write_text("x", encoding="utf-8")
    assert set(wrong(run)) == {str(table), str(run / "new.csv")}
    (run / sums.NAME).write_text("", encoding="utf-8")
    assert wrong(run)[str(run / sums.NAME)] == "lists no file"


def test_what_need_not_be_listed(tmp_path):
    """Times, people's labels, hidden files, and what a folder inside lists itself."""
    for name in ("a", "timing.jsonl", "labels/first.jsonl", ".cache/x", "inner/b", "report/c"):
        files.write_bytes(tmp_path / name, b"x")
    sums.write(tmp_path / "inner")
    files.write_json(tmp_path / "report" / "manifest.json", {})
    sums.write(tmp_path, but=("timing.jsonl", "labels/first.jsonl", "inner/b", "report/c", "report/manifest.json"))
    assert wrong(tmp_path) == {}
    (tmp_path / "inner" / sums.NAME).unlink()
    assert list(wrong(tmp_path)) == [str(tmp_path / "inner" / "b")]


def test_tiles_of_a_set_within(tmp_path):
    """A folder that holds a set somewhere below: its tiles are checked against their rows too."""
    files.write_bytes(tmp_path / "fold0" / "drawn" / "0.png", b"tile")
    files.write_manifest(tmp_path / "fold0" / "drawn", [{"file_name": "0.png", "sha256": files.sha256_bytes(b"other")}])
    sums.write(tmp_path / "fold0" / "drawn")
    assert "is not the picture of its row" in wrong(tmp_path)[str(tmp_path / "fold0" / "drawn" / "0.png")]



def test_differences():
    """Places of lists and objects, missing and added entries, types; the last digit of a float does not count."""
    one = {"a": [1, 2.0], "b": {"c": None}, "same": [0.1]}
    assert verify.differences(one, json.loads(json.dumps(one))) == []
    assert verify.differences({"x": 0.1 + 0.2}, {"x": 0.3}) == []
    found = verify.differences({"a": [1, 3.0], "d": 1, "same": [1]}, one)
    assert [line.split(" is ")[0] for line in found] == ["a[1]", "b", "same[0]", "d"]
    assert len(verify.differences({"x": [1]}, {"x": [1, 2]})) == 1


# --- tiles and studies -------------------------------------------------------------------------------------------------


def test_tiles(tmp_path):
    """A picture that is not its row's, a row that is not its picture's, a missing picture."""
    rows = []
    for i in range(3):
        row = {"file_name": f"{i}.png", "source": "synthetic", "prompt": "p", "seed": i}
        from lesion.run import sheets
        sheets.save_png(tmp_path / f"{i}.png", np.full((8, 8, 3), i, np.uint8), {"lesion": json.dumps(row)})
        rows.append(row | {"sha256": files.sha256_file(tmp_path / f"{i}.png")})
    files.write_manifest(tmp_path, rows)
    sums.write(tmp_path)
    assert wrong(tmp_path) == {}
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    files.write_manifest(tmp_path, [rows[0], rows[1] | {"seed": 7}, rows[2]])
    (tmp_path / "2.png").unlink()
    sums.write(tmp_path)  # forged
    found = wrong(tmp_path)
    assert "is not the picture of its row" in found[str(tmp_path / "0.png")]
    assert "was drawn with another seed" in found[str(tmp_path / "1.png")]
    assert found[str(tmp_path / "2.png")] == "is missing"


def test_a_study(tmp_path):
    """An answer changed in answers.csv, a tile replaced, a key edited."""
    study = study_folder.create(tmp_path / "study", real_set(tmp_path / "real", 4), synthetic_set(tmp_path / "drawn", 4), 3, seed=1,
                                readers=1)
    order = study_folder.order_of(study, 0)
    rows = [{"event": "consent"}, *({"event": "answer", "tile": tile, "rating": 1 + n, "malignant": None, "client_s": 2.0, "server_s": 2.1}
                                    for n, tile in enumerate(order))]
    files.append_jsonl(study_folder.journal_path(tmp_path / "study", study["readers"][0]), *rows)
    study_folder.export(tmp_path / "study")
    assert wrong(tmp_path / "study") == {}
    table = tmp_path / "study" / "answers.csv"
    table.write_text(table.read_text(encoding="utf-8").replace(",real,", ",synthetic,", 1), encoding="utf-8")
    assert "does not follow from the readers' journals: line " in wrong(tmp_path / "study")[str(table)]
    tile = next((tmp_path / "study" / "tiles").glob("*.png"))
    tile.write_bytes(tile.read_bytes()[:-1] + b"\0")
    assert tile.name in wrong(tmp_path / "study")[str(tmp_path / "study" / "study.json")]


# --- the command -------------------------------------------------------------------------------------------------------


def test_the_command(made, tmp_path):
    """Exit code 0 and a count; 1 and the file's name; 2 for no folder; a folder without hashes is not called good."""
    def call(*folders):
        return subprocess.run([sys.executable, "-m", "lesion", "verify", *map(str, folders)], cwd=made,
                              capture_output=True, encoding="utf-8",
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    shutil.copytree(made / "arms", tmp_path / "arms")
    (tmp_path / "arms" / "O1" / "seed0" / "predictions.csv").write_text("id\n", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    good, bad = call("arms"), call("arms", tmp_path / "arms", tmp_path / "empty")
    assert good.returncode == 0, good.stderr
    assert "all as written" in good.stdout
    assert bad.returncode == 1
    assert "predictions.csv: its SHA-256 differs from SHA256SUMS" in bad.stdout
    assert "has no SHA256SUMS" in bad.stdout
    assert call("nowhere").returncode == 2


def test_a_list_is_read_once(tmp_path, monkeypatch):
    """A folder's list is parsed once, not once a file: the time grows with the number of tiles, not with its square."""
    for number in range(30):
        files.write_bytes(tmp_path / f"{number}.txt", b"x")
    sums.write(tmp_path)
    read, count = sums.read, []
    monkeypatch.setattr(sums, "read", lambda folder: count.append(folder) or read(folder))
    assert wrong(tmp_path) == {}
    assert len(count) <= 2
