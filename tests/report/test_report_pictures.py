"""The pictures section through evaluate.py: complete, honest in words, one line for bad input, copies dropped."""
import json
from types import SimpleNamespace

import numpy as np
import picture_tiles
import pytest

from lesion.report import pictures
from lesion.run import files
from lesion.stats import memorisation


@pytest.fixture(scope="module")
def made(tmp_path_factory, run_script):
    """evaluate.py run on a small set with five planted copies among 25 tiles: (its process, the folder)."""
    root = tmp_path_factory.mktemp("report")
    training = picture_tiles.write_data(root / "data")
    copies = np.rot90(training["malignant"][:5], 1, (1, 2))
    images = np.concatenate([picture_tiles.blobs(np.random.default_rng(1), 20, True), copies])
    picture_tiles.write_synthetic(root / "phase-1", images)
    done = run_script("evaluate.py", "--data", root / "data", "--synthetic", root / "phase-1", "--out", root / "report",
                      "--drop-copies", root / "kept", timeout=900)
    return done, root


def test_the_report_is_whole(made):
    """Every figure is embedded, every table is there, the numbers are in results.json, the finding is printed."""
    done, root = made
    assert done.returncode == 0, done.stderr
    page = (root / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml") == 2 * 3  # two maps and attributes, each for wide and for narrow screens
    assert page.count("data:image/png") == 2 * (10 + 10) + 10 + 20 + 2 * 20  # tiles twice, a row of 10 on the first page; pairs
    for words in ("KID", "FID at n = 20", "untrained wavelet scattering", "three-sample", "Skin tone", "one distribution",
                  "asked for no attributes", "mix in a t-SNE map prove nothing"):
        assert words in page
    results = json.loads((root / "report" / "results.json").read_text(encoding="utf-8"))["pictures"]
    assert results["copies"]["sets"][0]["copies"] >= 5
    assert results["fidelity"]["sets"][0]["name"] == "phase-1"
    assert "phase-1: the 25 tiles" in done.stdout
    assert "called copies of a training tile" in done.stdout


def test_dropped_copies_make_a_new_set(made):
    """DIR/phase-1 lacks the five copies and has the provenance that classify.py asks for; the old set is untouched."""
    _, root = made
    rows = files.read_manifest(root / "kept" / "phase-1")
    assert not {f"{i:05d}.png" for i in range(20, 25)} & {row["file_name"] for row in rows}
    assert len(rows) >= 18
    assert (root / "kept" / "phase-1" / "provenance.json").is_file()
    assert len(files.read_manifest(root / "phase-1")) == 25


def test_the_same_command_works_again(made, run_script):
    """README's own command, twice: the second call replaces report and DIR/phase-1 with the same; a folder of somebody
    else's under --drop-copies is refused before anything is computed, and stays."""
    _, root = made
    flags = ["--data", root / "data", "--synthetic", root / "phase-1", "--out", root / "report", "--drop-copies"]
    before = {path: path.read_bytes() for path in (root / "kept").rglob("*.*")}
    assert run_script("evaluate.py", *flags, root / "kept", timeout=900).returncode == 0
    assert {path: path.read_bytes() for path in (root / "kept").rglob("*.*")} == before
    (root / "mine" / "phase-1").mkdir(parents=True)
    (root / "mine" / "phase-1" / "notes.txt").write_text("mine", encoding="utf-8")
    done = run_script("evaluate.py", *flags, root / "mine")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "was not made from" in done.stderr
    assert [path.name for path in (root / "mine").rglob("*.*")] == ["notes.txt"]


def test_features_of_other_images_change_nothing(made, run_script):
    """A feature cache put in another's place: it is made anew, and the report's numbers are the same."""
    _, root = made
    cached = sorted((root / "data" / ".cache").glob("features-*.npz"))
    kept = [path.read_bytes() for path in cached]
    before = json.loads((root / "report" / "results.json").read_text(encoding="utf-8"))["pictures"]
    cached[0].write_bytes(kept[1])
    done = run_script("evaluate.py", "--data", root / "data", "--synthetic", root / "phase-1", "--out", root / "again", timeout=900)
    assert done.returncode == 0, done.stderr
    assert [path.read_bytes() for path in cached] == kept
    after = json.loads((root / "again" / "results.json").read_text(encoding="utf-8"))["pictures"]
    assert {key: value for key, value in before.items() if key != "dropped"} == after


@pytest.mark.parametrize(("flags", "said"), [
    (["--synthetic", "nowhere"], "give --data"),
    (["--study", "x", "--drop-copies", "y"], "give --synthetic"),
    (["--synthetic", "nowhere", "--data", "nowhere"], "not a prepared data set"),
    (["--runs", "nowhere"], "nothing to report"),
])
def test_bad_flags_end_in_one_line(run_script, flags, said):
    """Exit code 2 and one line that says what is missing."""
    done = run_script("evaluate.py", *flags)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def row(name, auc, p, ceiling=False):
    return {"name": name, "n": 50, "ceiling": ceiling, "against_real": {"auc": auc, "low": auc - 0.05, "high": auc + 0.05, "p": p}}


def test_the_finding_says_no_more_than_the_numbers():
    """Told apart only where p says so; copies beside the 1 % of real tiles; no copies claimed where none were
    sought; a synthetic set that is called held-out is still a synthetic set."""
    results = {"fidelity": {"sets": [row("a", 0.9, 0.002), row("b", 0.52, 0.3), row("held-out drawn", 0.8, 0.002),
                                     row("held-out real malignant", 0.5, 0.5, True)]},
               "copies": {"sets": [{"name": "a", "copies": 3, "mean": 0.06, "low": 0.01, "high": 0.17}]}}
    text = "\n".join(pictures.findings(results)).replace("\u00a0", " ")
    assert "a: the 50 tiles are told from real ones (two-sample AUC 0.90 [0.85, 0.95], p .002); 3 are called copies" in text
    assert "b: the 50 tiles are not told from real ones here" in text
    assert "held-out drawn: the 50 tiles are told from real ones (two-sample AUC 0.80" in text
    assert text.count("copies") == 1
    assert "Held-out real tiles against the same training tiles: AUC 0.50" in text
    assert "copies" not in "".join(pictures.findings(results | {"copies": None}))


def test_every_cell_stands_under_its_header():
    """Fidelity and copies: numbers that all differ, each in the column that names it."""
    def test(auc):
        return {"auc": auc, "low": auc - 0.05, "high": auc + 0.05, "p": 0.01}
    one = {"name": "a", "n": 50, "kid": 0.5, "kid_se": 0.011, "fid": 12.0, "density": 0.81, "coverage": 0.62, "expected_coverage": 0.93,
           "distance": 3.0, "vendi": 17.0, "against_real": test(0.71), "against_other": test(0.98)}
    floor = {"n": 20, "distance": 4.0, "vendi": 19.0, "kid": 0.1, "kid_sd": 0.022, "fid": 9.0, "fid_sd": 1.1}
    table, = pictures._fidelity({"floor": floor, "sets": [one], "real": 40}, "malignant")
    cells = dict(zip(table["header"], table["rows"][0]))
    assert [cells[name] for name in ("density", "coverage [one distribution]", "diversity", "Vendi at n = 20")] == [
        "0.81", "0.62 [0.93]", "0.75", "17.0"]
    assert cells["AUC against real"].startswith("0.71")
    assert cells["AUC against the other class"].startswith("0.98")
    assert dict(zip(table["header"], table["rows"][1]))["KID ± s.e."] == "0.100 ± 0.022 (s.d.)"
    found = {"name": "a", "n": 50, "copies": 9, "mean": 0.18, "low": 0.1, "high": 0.3, "by_pixels": 7, "by_features": 4, "median": 0.6,
             "held_out": 12, "three_sample": {"z": -1.5, "p": 0.067, "c_t": -2.5, "c_t_p": 0.006}}
    table, _ = pictures._copies({"sets": [found], "limits": {"pixels": 0.31, "features": 0.42}, "training": 100, "calibration": 202,
                                 "features": "scattering"})
    assert table["header"][4:6] == ["by pixels", "by features"]
    assert table["rows"][0][4:6] == ["7", "4"]
    assert table["rows"][0][7:] == ["−1.5", ".067", "−2.5", ".006"]
    assert "under 0.31 by pixels or 0.42 by features" in table["caption"]
    assert pictures._tone([12, 36], 0) == "12 (25%)"


def test_the_nearest_pairs_come_first_in_one_view():
    """Worst pairs: the relatively nearest first, the synthetic tile turned to the view in which its training tile shows."""
    rng = np.random.default_rng(0)
    training = rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    images = np.stack([rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), np.rot90(training[2], 1)])
    near = memorisation.nearest_pixels(images, memorisation.pixel_vectors(training))
    part = SimpleNamespace(images=images, rows=[{"file_name": "far.png"}, {"file_name": "copy.png"}])
    ours, theirs, captions, copies = pictures._worst(part, SimpleNamespace(images=training),
                                                     SimpleNamespace(pixels=near, is_copy=np.array([False, True])))
    assert captions[0].startswith("copy ")
    assert copies.tolist() == [True, False]
    assert np.array_equal(ours[0], theirs[0])


def test_maps_are_of_the_sets_they_name():
    """Each cloud of a map has its own tiles' number and place, under the AUC against the kind of tiles that is drawn."""
    rng = np.random.default_rng(1)
    real, other, made = (SimpleNamespace(name=name, features=rng.normal(at, 0.1, (count, 4))) for name, at, count in (
        ("real malignant", 0, 12), ("real, other class", 5, 15), ("made", 9, 20)))
    row = {f"against_{kind}": {"auc": auc, "low": auc, "high": auc, "p": 0.1} for kind, auc in (("real", 0.61), ("other", 0.97))}
    found = pictures._maps(SimpleNamespace(real=real, other=other, synthetic=[made]), {"sets": [row]}, None)
    for stem, auc, count in (("tsne-real", "0.61", 12), ("tsne-other", "0.97", 15)):
        axis = found[stem].axes[0]
        assert auc in axis.get_title()
        assert [len(cloud.get_offsets()) for cloud in axis.collections] == [count, 20]
