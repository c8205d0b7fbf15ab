"""The study folder: a fair choice of tiles, an encoding that tells nothing, and bad input named in one line."""
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from study_sets import real_set, synthetic_set

from lesion.run import files
from lesion.web import study_folder, study_tiles
from lesion.web.journal import Journal


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    base = tmp_path_factory.mktemp("sets")
    return {"real": real_set(base / "real", 16), "synthetic": synthetic_set(base / "synthetic", 12)}


@pytest.fixture
def folder(sets, tmp_path):
    study_folder.create(tmp_path / "study", **sets, count=8, seed=5, readers=2)
    return tmp_path / "study"


def test_a_new_study_holds_what_was_asked(sets, tmp_path):
    """Eight tiles of each class, distinct patients first, source hashes, a link a reader; no original names."""
    study = study_folder.create(tmp_path / "study", **sets, count=8, seed=5, readers=2)
    assert {**study_folder.load(tmp_path / "study"), "seal": None} == {**study, "seal": None}
    assert [tile["class"] for tile in study["tiles"]] == ["real"] * 8 + ["synthetic"] * 8
    names = [tile["file_name"] for tile in study["tiles"][:8]]
    patients = {row["file_name"]: row["patient_id"] for row in files.read_manifest(sets["real"])}
    assert len({patients[name] for name in names}) == 8
    for tile in study["tiles"]:
        source = sets[tile["class"]] / tile["file_name"]
        assert tile["source_sha256"] == files.sha256_file(source)
    assert len({reader["link"] for reader in study["readers"]}) == 2
    assert all(len(reader["link"]) >= 22 for reader in study["readers"])
    assert all(re.fullmatch("[0-9a-f]{16}[.]png", path.name) for path in (tmp_path / "study" / "tiles").iterdir())
    assert (tmp_path / "study" / "study.json").stat().st_mode & 0o077 == 0


def test_seed_decides_tiles_and_orders_but_not_ids(sets, tmp_path):
    """The same seed gives the same tiles and orders; ids, links and tokens are secrets of their own each time."""
    one, two, other = (study_folder.create(tmp_path / name, **sets, count=8, seed=seed)
                       for name, seed in (("a", 5), ("b", 5), ("c", 6)))
    sources = [[tile["source_sha256"] for tile in study["tiles"]] for study in (one, two, other)]
    assert sources[0] == sources[1] != sources[2]
    where = [{tile["id"]: number for number, tile in enumerate(study["tiles"])} for study in (one, two)]
    orders = [[place[identity] for identity in study_folder.order_of(study, 0)]
              for place, study in zip(where, (one, two), strict=True)]
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == list(range(16))
    assert study_folder.order_of(one, 0) != study_folder.order_of(one, 1)
    assert not {tile["id"] for tile in one["tiles"]} & {tile["id"] for tile in two["tiles"]}
    assert one["readers"][0]["link"] != two["readers"][0]["link"]


def encoding_features(path):
    """All a file says besides its pixels: length, every chunk's type, length and, but for the pixels, its bytes."""
    data = path.read_bytes()
    features, at = [len(data), data[:8]], 8
    while at < len(data):
        length = int.from_bytes(data[at:at + 4], "big")
        kind = data[at + 4:at + 8]
        features.append((kind, length, data[at + 8:at + 8 + length] if kind != b"IDAT" else data[at + 8:at + 10]))
        at += 12 + length
    return features


def test_encoding_tells_nothing(sets, tmp_path):
    """Every served file has the same length, chunks, header and zlib prefix, so no classifier on them can beat chance;
    the sources differ in all of these. There is no metadata and no quantisation table."""
    study = study_folder.create(tmp_path / "s", **sets, count=8, seed=1)
    seen = [encoding_features(tmp_path / "s" / "tiles" / f"{tile['id']}.png") for tile in study["tiles"]]
    assert all(features == seen[0] for features in seen)
    assert {chunk[0] for chunk in seen[0][2:]} == {b"IHDR", b"IDAT", b"IEND"}
    sizes = [(sets[tile["class"]] / tile["file_name"]).stat().st_size for tile in study["tiles"]]
    assert roc_auc_score([tile["class"] == "real" for tile in study["tiles"]], sizes) in (0.0, 1.0)


def test_names_and_orders_tell_nothing(sets, tmp_path):
    """Over 12 studies neither a tile's id nor its place in a reader's order separates the classes (AUC .5 +- 4 sd)."""
    names, places, classes = [], [], []
    for seed in range(12):
        study = study_folder.create(tmp_path / str(seed), **sets, count=8, seed=seed, readers=1, resolution=16)
        order = study_folder.order_of(study, 0)
        for tile in study["tiles"]:
            names.append(int(tile["id"], 16))
            places.append(order.index(tile["id"]))
            classes.append(tile["class"] == "real")
    spread = np.sqrt(1 / 12 * (1 / sum(classes) + 1 / sum(classes)))  # of the Mann-Whitney area, n large
    assert abs(roc_auc_score(classes, names) - 0.5) < 4 * spread
    assert abs(roc_auc_score(classes, places) - 0.5) < 4 * spread


def history_features(image):
    """What JPEG leaves in pixels: block edges by phase, how often each DCT coefficient is zero, per colour plane."""
    planes = np.asarray(Image.fromarray(image).convert("YCbCr")).astype(float)
    found = []
    for plane in planes.transpose(2, 0, 1):
        steps = np.abs(np.diff(plane, axis=1)).mean(0)
        found += [steps[np.arange(len(steps)) % 8 == k].mean() / (steps.mean() + 1e-6) for k in range(8)]
        side = len(plane)
        blocks = plane.reshape(side // 8, 8, side // 8, 8).transpose(0, 2, 1, 3) - 128
        found += list((np.abs(dctn(blocks, axes=(2, 3), norm="ortho")) < 0.5).mean((0, 1)).ravel())
    return found


def test_jpeg_history_is_hidden(shared):
    """Real tiles once were JPEG, synthetic ones never: on pixels alike but for that, a detector of JPEG traces is right
    nearly always before our encoding, and at chance after it. (Same grid and size: the case resizing does not blur.)"""
    with zipfile.ZipFile(shared / "isic2024" / "ISIC_2024_Permissive_Training_Input.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")][:700]
        pictures = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]
    pictures = [picture.resize((64, 64), Image.BICUBIC) for picture in pictures if picture.size[0] >= 130]
    was_jpeg = np.arange(len(pictures)) % 2 == 0
    before, after = [], []
    for picture, once in zip(pictures, was_jpeg, strict=True):
        if once:
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=75, subsampling=2)
            picture = Image.open(buffer).convert("RGB")
        image = np.asarray(picture)
        before.append(history_features(image))
        with Image.open(io.BytesIO(study_tiles.encode(image))) as served:
            after.append(history_features(np.asarray(served)))
    detector = make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=500))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    areas = [roc_auc_score(was_jpeg, cross_val_predict(detector, np.array(features), was_jpeg, cv=folds,
                                                       method="decision_function")) for features in (before, after)]
    assert areas[0] > 0.97
    assert areas[1] < 0.5 + 4 * np.sqrt(1 / 6 / (len(pictures) / 2))


@pytest.mark.parametrize(("settings", "words"), [
    ({"count": 13}, "has 12 malignant tiles, not the 13 asked for"),
    ({"count": 17}, "has 16 malignant tiles in --split held-out, not the 17 asked for (there are: test 16)"),
    ({"split": "train"}, "has 0 malignant tiles in --split train"),
    ({"label": "benign"}, "has 0 benign tiles")])
def test_too_few_tiles_is_one_line(sets, tmp_path, settings, words):
    """Fewer tiles than asked for: what was asked, what is there, what to do; no folder is left behind."""
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        study_folder.create(tmp_path / "s", **({**sets, "count": 8} | settings))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("kill_at", range(1, 10))
def test_a_creation_killed_at_any_rename_starts_again(sets, tmp_path, kill_at):
    """Killed before its nth rename (study.json's is the ninth and last), the same command makes the study: its own tiles
    only, and nothing left over."""
    code = f"""
import os, sys
from pathlib import Path
from lesion.web import study_folder, study_tiles
real, count = os.replace, 0
def replace(*paths):
    global count
    count += 1
    if count == {kill_at}:
        os._exit(9)
    real(*paths)
os.replace = replace
study_folder.create(Path({str(tmp_path / "s")!r}), Path({str(sets["real"])!r}), Path({str(sets["synthetic"])!r}), count=4, seed=3)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    study = study_folder.create(tmp_path / "s", **sets, count=4, seed=3)
    assert sorted(path.name for path in (tmp_path / "s").rglob("*") if path.is_file()) == sorted(
        ["study.json", *(f"{tile['id']}.png" for tile in study["tiles"])])
    study_folder.load(tmp_path / "s")


def test_what_is_not_a_studys_is_never_swept(sets, tmp_path):
    """Somebody's own folder named `tiles`, or another file: refused, and left as it is."""
    for name in ("tiles/mine.png", "notes.txt"):
        folder = tmp_path / name.replace("/", "_")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine", encoding="utf-8")
        with pytest.raises(ValueError, match="give a new folder"):
            study_folder.create(folder, **sets, count=4)
        assert (folder / name).read_text(encoding="utf-8") == "mine"


def test_a_picture_that_leads_out_of_its_source_is_refused(sets, tmp_path):
    """A link in the source to a file elsewhere is named and not shown to readers."""
    real = tmp_path / "real"
    shutil.copytree(sets["real"], real)
    first = real / files.read_manifest(real)[0]["file_name"]
    first.rename(tmp_path / "secret.jpg")
    first.symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(ValueError, match="leads out of"):
        study_folder.create(tmp_path / "s", real, sets["synthetic"], count=4)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("change", [
    lambda s: s["tiles"][0].update(id="../../secret"), lambda s: s["readers"][0].update(name="../../eve"),
    lambda s: s["readers"][0].update(link="x/../y")])
def test_ids_of_a_forged_study_are_never_paths(sets, tmp_path, change):
    """A study.json whose seal was made anew, with an id, name or link that is a path: refused."""
    study = study_folder.create(tmp_path / "s", **sets, count=4)
    change(study)
    study_folder._write(tmp_path / "s", study)
    with pytest.raises(ValueError, match="ids are not those of a study"):
        study_folder.load(tmp_path / "s")


def test_answers_csv_has_no_formula(sets, tmp_path):
    """A file name that a spreadsheet would run is disarmed in answers.csv."""
    real = tmp_path / "real"
    shutil.copytree(sets["real"], real)
    rows = files.read_manifest(real)
    for row in rows:
        name = "=" + Path(row["file_name"]).name
        (real / row["file_name"]).rename(real / name)
        row["file_name"] = name
    files.write_manifest(real, rows)
    study = study_folder.create(tmp_path / "s", real, sets["synthetic"], count=4, readers=1)
    with Journal(study_folder.journal_path(tmp_path / "s", study["readers"][0])) as journal:
        for position in range(8):
            journal.append(answer(study, 0, position, 3))
    cells = [row["file_name"] for row in csv.DictReader(study_folder.answers_csv(tmp_path / "s").splitlines())]
    assert sum(cell.startswith("'=") for cell in cells) == 4
    assert not any(cell.startswith("=") for cell in cells)


def test_synthetic_tiles_of_unequal_sizes_are_refused(sets, tmp_path):
    """Mixed or oblong sizes would need unequal resizing: refused, unless a resolution is asked for."""
    mixed = synthetic_set(tmp_path / "mixed", 6)
    Image.open(mixed / "00000.png").resize((96, 96)).save(mixed / "00000.png")
    with pytest.raises(ValueError, match=r"are 64x64, 96x96 pixels, not all of one square size: give --resolution"):
        study_folder.create(tmp_path / "s", sets["real"], mixed, count=6)
    study = study_folder.create(tmp_path / "s", sets["real"], mixed, count=6, resolution=48)
    assert study["settings"]["resolution"] == 48
    assert {Image.open(path).size for path in (tmp_path / "s" / "tiles").iterdir()} == {(48, 48)}


def test_unreadable_tiles_are_passed_over_and_named(sets, tmp_path):
    """A broken file costs its place to the next one and is named; too many broken is a one-line refusal."""
    broken = synthetic_set(tmp_path / "broken", 8)
    for number in range(3):
        (broken / f"{number:05d}.png").write_bytes(b"not a picture")
    study = study_folder.create(tmp_path / "s", sets["real"], broken, count=5)
    assert sum(tile["class"] == "synthetic" for tile in study["tiles"]) == 5
    assert not {tile["file_name"] for tile in study["tiles"]} & {"00000.png", "00001.png", "00002.png"}
    with pytest.raises(ValueError, match="only 5 of the 6 malignant tiles asked for are readable"):
        study_folder.create(tmp_path / "t", sets["real"], broken, count=6)


def edit_json(change):
    def edit(folder):
        study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        change(study)
        (folder / "study.json").write_text(json.dumps(study), encoding="utf-8")
    return edit


def first_tile(folder):
    return sorted((folder / "tiles").iterdir())[0]


@pytest.mark.parametrize(("edit", "words"), [
    (lambda f: (f / "study.json").write_text((f / "study.json").read_text(encoding="utf-8")[:500], encoding="utf-8"), "was cut or edited"),
    (lambda f: (f / "study.json").write_bytes(b"\xff\xfe\x00"), "was cut or edited"),
    (lambda f: (f / "study.json").write_text("[]", encoding="utf-8"), "was cut or edited"),
    (lambda f: (f / "study.json").unlink(), "no study.json"),
    (edit_json(lambda s: s.update(format=2)), "has format 2"),
    (edit_json(lambda s: s["tiles"][0].update({"class": "synthetic"})), "study.json was edited"),
    (edit_json(lambda s: s["settings"].update(count=7)), "study.json was edited"),
    (edit_json(lambda s: s["settings"].update(seed="x")), "study.json was edited"),
    (edit_json(lambda s: s["readers"].pop()), "study.json was edited"),
    (edit_json(lambda s: s.pop("tiles")), "study.json was edited"),
    (lambda f: first_tile(f).unlink(), "is missing"),
    (lambda f: first_tile(f).write_bytes(b""), "is not a picture any more"),
    (lambda f: Image.new("RGB", (80, 64)).save(first_tile(f)), "is 80x64 pixels, the other tiles 64x64"),
    (lambda f: Image.new("RGB", (64, 64)).save(first_tile(f)), "its hash differs")])
def test_a_folder_edited_by_hand_is_one_line(folder, edit, words):
    """Whatever was changed, cut, removed or resized is named in one line, with what to do."""
    study_folder.load(folder)
    edit(folder)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        study_folder.load(folder)
    assert "\n" not in str(error.value)


def test_other_folders_are_left_alone(sets, tmp_path):
    """A folder with other things in it is refused, and they stay."""
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="holds other things"):
        study_folder.create(tmp_path, **sets, count=2)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def answer(study, reader, position, rating, **more):
    tile = study_folder.order_of(study, reader)[position]
    return {"event": "answer", "time": "2024-01-01T00:00:00", "position": position + 1, "tile": tile, "rating": rating,
            "malignant": None, "client_s": 2.5, "server_s": 3.0, "by": "key"} | more


def test_a_cut_or_edited_journal_keeps_every_other_answer(folder):
    """Lines cut in the middle, of other studies or out of range are named by number; the rest is exported in order."""
    study = study_folder.load(folder)
    rows = [{"event": "consent"}, *(answer(study, 0, k, 1 + k % 6) for k in range(6)), answer(study, 0, 2, 6)]
    lines = [json.dumps(row) for row in rows]
    lines[2] = lines[2][:40]
    lines.insert(4, json.dumps(answer(study, 0, 7, 7)))
    lines.insert(5, json.dumps(answer(study, 0, 7, 3, tile="elsewhere")))
    lines.insert(6, json.dumps(answer(study, 0, 7, 3, tile=["x"], client_s=-1)))
    path = study_folder.journal_path(folder, study["readers"][0])
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines)[:-1], encoding="utf-8")  # and the last line torn
    _, table, problems = study_folder.read_answers(folder)
    assert [(row["position"], row["rating"], row["changes"]) for row in table] == \
        [(1, 1, 0), (3, 3, 0), (4, 4, 0), (5, 5, 0), (6, 6, 0)]
    assert [int(re.search(r"line (\d+)", line)[1]) for line in problems] == [3, 5, 6, 7, 11]
    assert all("\n" not in line for line in problems)


def test_answers_reach_the_analysis_unmixed(folder):
    """Journals -> CSV and arrays: reader, tile and class meet the right rating; a change counts once, the last wins."""
    study = study_folder.load(folder)
    for reader in range(2):
        with Journal(study_folder.journal_path(folder, study["readers"][reader])) as journal:
            journal.append({"event": "consent"})
            for position in range(16 if reader == 0 else 4):
                journal.append(answer(study, reader, position, 1))
                journal.append(answer(study, reader, position, 1 + (position + reader) % 6, client_s=None))
    study_folder.export(folder)
    with open(folder / "answers.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 20
    assert {row["changes"] for row in table} == {"1"}
    arrays = study_folder.as_arrays(*study_folder.read_answers(folder)[:2])
    assert arrays["is_real"].sum() == 8
    assert arrays["malignant"] is None
    assert (arrays["ratings"] > 0).sum(1).tolist() == [16, 4]
    for row in table:
        reader, tile = arrays["names"].index(row["reader"]), [t["id"] for t in study["tiles"]].index(row["tile"])
        assert arrays["ratings"][reader, tile] == int(row["rating"]) == 1 + (int(row["position"]) - 1 + reader) % 6
        assert arrays["is_real"][tile] == (row["class"] == "real")
        assert arrays["seconds"][reader, tile] == 3.0


def test_readers_can_be_added(folder):
    """More readers get links of their own; those there keep link and order."""
    before = study_folder.load(folder)
    orders = [study_folder.order_of(before, k) for k in range(2)]
    study_folder.add_readers(folder, study_folder.load(folder), 4)
    after = study_folder.load(folder)
    assert after["readers"][:2] == before["readers"]
    assert len({reader["link"] for reader in after["readers"]}) == 4
    assert [study_folder.order_of(after, k) for k in range(2)] == orders


@pytest.mark.parametrize("name", ["created", "organiser_token", "provenance", "skipped"])
def test_the_seal_covers_everything(tmp_path, name):
    """A changed date, token, origin or list of skipped tiles is seen; a study of before that is still opened."""
    folder = tmp_path / "study"
    study = study_folder.create(folder, real_set(tmp_path / "real", 4), synthetic_set(tmp_path / "drawn", 4), 2, seed=1)
    old = study | {"seal": study_folder._first_seal(study)}
    files.write_json(folder / "study.json", old)
    assert study_folder.load(folder)["settings"] == study["settings"]
    files.write_json(folder / "study.json", study | {"seal": study_folder._seal(study)} | {name: "changed"})
    with pytest.raises(ValueError, match="study.json was edited"):
        study_folder.load(folder)
