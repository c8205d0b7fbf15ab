"""Readers: every published layout gives the same prepared set; what is wrong with a source is said in one line."""
import zipfile

import layouts
import numpy as np
import pytest
import requests
from layouts import IDS, LABELS, PATIENTS, TILES

from lesion import prepare
from lesion.run import files
from lesion.tiles import isic, remote
from lesion.tiles.source import metadata


def prepared(source, out, *flags):
    prepare.main(["--source", str(source), "--out", str(out), "--prompts", "fixed", *map(str, flags)])
    return {row["isic_id"]: row for row in files.read_manifest(out)}


def essence(out):
    """What every layout must agree on: names, labels, splits, texts, bytes."""
    rows = files.read_manifest(out)
    return [(*(row[name] for name in ("file_name", "label", "split", "text", "sha256")),
             (out / row["file_name"]).read_bytes()) for row in rows]


def test_every_layout_gives_the_same_prepared_set(tmp_path, shared):
    """The official zip, its folder (also doubly nested), Kaggle's folder and hdf5, class folders, imagefolders, kohya
    captions, a URL and a prepared set itself: same rows, same bytes, in the same order."""
    make = {
        "zip": layouts.official_zip, "zip_metadata": lambda d: layouts.official_zip(d, metadata=True),
        "zips_folder": lambda d: layouts.official_zip(d).parent, "folder": layouts.unzipped,
        "nested": lambda d: layouts.unzipped(d, nested=2), "kaggle": lambda d: layouts.kaggle(d, shared, hdf5=False),
        "kaggle_hdf5": lambda d: layouts.kaggle(d, shared, hdf5=True),
        "hdf5_file": lambda d: layouts.kaggle(d, shared, hdf5=True) / "train-image.hdf5",
        "csv": lambda d: layouts.ground_truth(layouts.unzipped(d)), "classes": layouts.class_folders,
        "imagefolder": layouts.imagefolder, "imagefolder_csv": lambda d: layouts.imagefolder(d, "metadata.csv"),
        "kohya": lambda d: layouts.class_folders(d, "10_", ".txt"),
        "kohya_caption": lambda d: layouts.class_folders(d, "4_", ".caption"),
    }
    split = layouts.split_file(tmp_path)
    found = {}
    for name, build in make.items():
        (tmp_path / name).mkdir()
        prepared(build(tmp_path / name), tmp_path / f"{name}_out", "--split-file", split)
        found[name] = essence(tmp_path / f"{name}_out")
    with layouts.serve(tmp_path / "zip") as server:
        prepared(f"{server.url}/ISIC_2024_Permissive_Training_Input.zip", tmp_path / "url_out", "--split-file", split)
    prepared(tmp_path / "zip_out", tmp_path / "again_out")
    found["url"], found["prepared"] = essence(tmp_path / "url_out"), essence(tmp_path / "again_out")
    expected = [(f"images/{i}.jpg", LABELS[i], layouts.SPLIT[i], layouts.FIXED.format(LABELS[i]), TILES[i])
                for i in sorted(IDS)]
    for name, rows in found.items():
        assert [row[:4] + row[5:] for row in rows] == expected, name
        assert rows == found["zip"], name


def test_the_real_archive(shared):
    """The real zip and csv: 8,980 tiles, 265 malignant, CC-BY, no patient ids."""
    source = isic.open_source(shared / "isic2024")
    assert len(source.where) == 8980
    assert sum(label == "malignant" for label in source.labels.values()) == 265
    assert source.origin("ISIC_0073467") == ("ISIC 2024 Permissive", "CC-BY")
    assert not source.patients
    assert not source.notes


def test_kaggle_metadata_is_joined_and_kept_out_of_the_inputs(tmp_path, shared):
    """All 55 columns: numbers as numbers, empty ones absent, licence and attribution (quoted, with commas) as credit,
    the label and ids in their own places, diagnosis and lighting kept under `metadata` and out of the text."""
    source, split = layouts.kaggle(tmp_path, shared, hdf5=True), layouts.split_file(tmp_path)
    rows = prepared(source, tmp_path / "out", "--split-file", split)
    row = rows[IDS[1]]
    assert row["patient_id"] == PATIENTS[IDS[1]]
    assert row["lesion_id"] == "IL_0000001"
    assert (row["license"], row["attribution"]) == ("CC-BY", layouts.ATTRIBUTION)
    assert row["metadata"]["tbp_tile_type"] == "3D: XP"
    assert row["metadata"]["clin_size_long_diam_mm"] == 2.52
    assert row["metadata"]["age_approx"] == 35
    assert row["metadata"]["iddx_full"] == "Benign"
    assert not {"target", "malignant", "patient_id", "isic_id", "mel_thick_mm", "attribution"} & set(row["metadata"])
    assert row["source"] == "ISIC 2024"
    assert row["text"] == "a clinical photograph of a benign skin lesion"


def test_metadata_inside_the_zip_and_a_supplement_beside_it(tmp_path):
    """metadata.csv in the zip gives patients; the Supplement adds lesions and diagnosis; columns may be missing."""
    path = layouts.official_zip(tmp_path, metadata=True)
    layouts.write_csv(tmp_path / "ISIC_2024_Permissive_Training_Supplement.csv", ["isic_id", "lesion_id", "iddx_full"],
                      [[i, f"IL_{k}", "NA"] for k, i in enumerate(IDS)])
    source = isic.open_source(path)
    assert source.patients == PATIENTS
    assert source.lesions[IDS[3]] == "IL_3"
    details = metadata(source, IDS[:2])
    assert details[IDS[0]] == {"malignant": 1, "patient_id": PATIENTS[IDS[0]], "lesion_id": "IL_0",
                               "tbp_tile_type": "3D: XP", "attribution": layouts.ATTRIBUTION,
                               "copyright_license": "CC-BY"}
    assert details[IDS[1]]["age_approx"] == 45


def test_licence_by_release(tmp_path):
    """Permissive is CC-BY, the full release CC-BY-NC, a stranger's folder unknown; of both, permissive wins."""
    for release in ("ISIC_2024_Permissive", "ISIC_2024"):
        layouts.official_zip(tmp_path, release)
    assert isic.open_source(tmp_path / "ISIC_2024_Training_Input.zip").origin(IDS[0]) == ("ISIC 2024", "CC-BY-NC")
    assert isic.open_source(tmp_path).origin(IDS[0]) == ("ISIC 2024 Permissive", "CC-BY")
    assert len(isic.open_source(tmp_path).where) == len(IDS)
    assert isic.open_source(layouts.class_folders(tmp_path / "mine")).origin(IDS[0])[1] is None


def test_leftovers_of_macos_are_no_tiles(tmp_path):
    """__MACOSX/._ISIC_....jpg twins are passed over."""
    path = layouts.official_zip(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        for name in (f"{IDS[0]}.jpg", "metadata.csv", "ISIC_2024_Permissive_Training_Supplement.csv"):
            archive.writestr(f"__MACOSX/ISIC_2024_Permissive_Training_Input/._{name}", b"\0\5\x16\7")
    source = isic.open_source(path)
    assert len(source.where) == len(IDS)
    assert not source.notes
    assert [table.name for table in source.tables] == ["ISIC_2024_Permissive_Training_GroundTruth.csv"]


def edit(path, old, new):
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(("old", "new", "message"), [
    ("isic_id,malignant", "isic_id,harm", "has no column malignant or target"),
    ("isic_id,malignant", "img,malignant", "has no column isic_id"),
    (f"{IDS[0]},1.0", f"{IDS[0]},2", f"line 2, {IDS[0]}: label '2' is not allowed: use 0 or benign, 1 or malignant"),
    (f"{IDS[0]},1.0", f"{IDS[0]},", "label None is not allowed"),
    (f"{IDS[0]},1.0", f"{IDS[0]},indeterminate", "label 'indeterminate' is not allowed: .* or say what it means with --label-map"),
    (IDS[1], IDS[0], f"line 3: {IDS[0]} is listed twice"),
    (f"{IDS[0]},1.0", f"{IDS[0]},1.0,7", "line 2: 3 columns, the header has 2"),
])
def test_a_wrong_label_table_is_named_with_its_line(tmp_path, old, new, message):
    """Missing column, label out of range, empty label, a third class, duplicate id, ragged row: one line each."""
    edit(layouts.ground_truth(layouts.unzipped(tmp_path)), old, new)
    with pytest.raises(ValueError, match=message) as caught:
        isic.open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_labels_without_tiles_and_tiles_without_labels_are_counted(tmp_path):
    """A partial download works: what does not match is left out, counted and named; nothing matching is an error."""
    folder = layouts.unzipped(tmp_path)
    next(folder.rglob(f"{IDS[0]}.jpg")).unlink()
    truth = tmp_path / "ISIC_2024_Permissive_Training_GroundTruth.csv"
    edit(truth, f"{IDS[1]},0.0\n", "")
    edit(truth, f"{IDS[1]},0.0\r\n", "")
    source = isic.open_source(folder)
    assert source.notes == [f"1 tiles have no label and are left out (first: {IDS[1]})",
                            f"1 labels have no tile and are left out (first: {IDS[0]})"]
    assert list(source.where) == sorted(set(IDS[2:]))
    truth.write_text("isic_id,malignant\nISIC_0000000,0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="none of the 23 tiles has a label"):
        isic.open_source(folder)


@pytest.mark.parametrize(("make", "message"), [
    (lambda d: d / "absent", "does not exist"),
    (lambda d: d, "no labels found"),
    (lambda d: (d / "x.zip", (d / "x.zip").write_bytes(b"no zip"))[0], "not a readable zip file"),
    (lambda d: (d / "x.hdf5", (d / "x.hdf5").write_bytes(b"no hdf5"))[0], "not a readable hdf5 file"),
    (lambda d: (d / "x.tar", (d / "x.tar").write_bytes(b""))[0], "is not a folder, .zip, .hdf5 or .csv file"),
    (lambda d: (d, (d / "a_GroundTruth.csv").write_text("isic_id,malignant\na,0\n", encoding="utf-8"))[0], "no tiles"),
    (lambda d: (d, (d / "a_GroundTruth.csv").write_bytes(b"isic_id,malignant\n\xff\xfe\0,0\n"))[0],
     "line 2: the id .* is not allowed"),
    (lambda d: (layouts.imagefolder(d), edit(d / "metadata.jsonl", '"label": 1', '"label": 3'))[0],
     "row 1: label 3 is not"),
    (lambda d: (layouts.imagefolder(d), edit(d / "metadata.jsonl", '"text"', '"split": "holdout", "text"'))[0],
     "row 1: split 'holdout' is not allowed: use train, val or test"),
    (lambda d: (layouts.unzipped(d), layouts.class_folders(d / "twice"))[0], "is there twice"),
])
def test_a_source_that_cannot_be_read_says_why(tmp_path, make, message):
    """Absent, empty, damaged or foreign sources: one line."""
    with pytest.raises(ValueError, match=message):
        isic.open_source(make(tmp_path))


def test_a_damaged_member_is_unreadable_not_fatal(tmp_path):
    """A flipped byte inside the zip fails the CRC of one tile; the others are read."""
    path = layouts.official_zip(tmp_path)
    data = bytearray(path.read_bytes())
    data[data.index(TILES[IDS[0]]) + 200] ^= 255
    path.write_bytes(data)
    source = isic.open_source(path)
    got = dict(source.read(IDS))
    assert isinstance(got[IDS[0]], ValueError)
    assert [got[i] for i in IDS[1:]] == [TILES[i] for i in IDS[1:]]


# --- URL -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def quick(monkeypatch):
    """No waiting between tries."""
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)


def test_a_url_that_drops_connections_gives_every_byte(tmp_path, quick):
    """Four answers in ten break off in the middle; the set is the one of the local zip all the same."""
    folder, split = tmp_path / "web", layouts.split_file(tmp_path)
    folder.mkdir()
    path = layouts.official_zip(folder, metadata=True)
    prepared(path, tmp_path / "local", "--split-file", split)
    with layouts.serve(folder, drop=0.4) as server:
        prepared(f"{server.url}/{path.name}", tmp_path / "far", "--split-file", split)
        assert server.dropped > 5
    assert essence(tmp_path / "far") == essence(tmp_path / "local")
    assert (tmp_path / "far" / files.MANIFEST).read_bytes() == (tmp_path / "local" / files.MANIFEST).read_bytes()


def test_a_broken_range_goes_on_where_it_broke(tmp_path, quick):
    """A range of 300,000 bytes, broken three times, comes back whole and is not fetched from its start again."""
    data = np.random.default_rng(0).bytes(400_000)
    (tmp_path / "x.bin").write_bytes(data)
    with layouts.serve(tmp_path, drop=1.0) as server:
        far = remote.Remote(f"{server.url}/x.bin")
        assert far.read(50_000, 349_999) == data[50_000:350_000]
        assert server.dropped >= 3
        assert server.sent < 320_000


def test_a_url_costs_the_directory_and_the_sample_only(tmp_path):
    """Of a zip with 4 MB of other members, six benign and the malignant tiles are fetched, not the rest."""
    path = layouts.official_zip(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(40):
            archive.writestr(f"more/ISIC_99999{number:02d}.jpg", layouts.jpeg(number) + bytes(100_000))
    with layouts.serve(tmp_path) as server:
        rows = prepared(f"{server.url}/{path.name}", tmp_path / "out", "--split-file", layouts.split_file(tmp_path),
                        "--benign-train", 2, "--benign-val", 2, "--benign-test", 2)
        assert len(rows) == 6 + sum(label == "malignant" for label in LABELS.values())
        assert server.sent < 300_000 < path.stat().st_size / 10


def test_an_interrupted_download_goes_on(tmp_path, quick, monkeypatch, capsys):
    """The network dies for good in mid-run: no data set, tiles kept; the same command fetches the rest."""
    path, split = layouts.official_zip(tmp_path), layouts.split_file(tmp_path)
    out, real = tmp_path / "out", remote.member_bytes
    monkeypatch.setattr(remote, "ThreadPoolExecutor", lambda workers: _Serial())
    count = []

    def dying(raw, member):
        count.append(member)
        if len(count) == 10:
            raise requests.ConnectionError("cable cut")
        return real(raw, member)

    with layouts.serve(tmp_path) as server:
        url = f"{server.url}/{path.name}"
        monkeypatch.setattr(remote, "member_bytes", dying)
        with pytest.raises(requests.ConnectionError):
            prepared(url, out, "--split-file", split)
        assert not out.exists()
        assert "the same command goes on from there" in capsys.readouterr().out
        assert len(list((tmp_path / ".out.partial" / "images").iterdir())) == 9
        (tmp_path / ".out.partial" / "images" / f"{sorted(IDS)[0]}.jpg").write_bytes(b"torn")
        prepared(url, out, "--split-file", split)
    assert len(count) == 10 + len(IDS) - 8
    assert not (tmp_path / ".out.partial").exists()
    assert [(out / row[0]).read_bytes() for row in essence(out)] == [TILES[i] for i in sorted(IDS)]


class _Serial:
    def map(self, function, items):
        return map(function, items)

    def shutdown(self, cancel_futures):
        pass


def test_a_wrong_address_says_so(tmp_path, quick):
    """Not a zip, not found, no range support, a dead server: one line each, no endless wait."""
    path = layouts.official_zip(tmp_path)
    (tmp_path / "bad.zip").write_bytes(b"no zip" * 1000)
    with layouts.serve(tmp_path) as server, layouts.serve(tmp_path, ranges=False) as plain:
        for address, message in ((f"{server.url}/index.html", "the URL of a .zip is expected"),
                                 (f"{server.url}/absent.zip", "HTTP 404"),
                                 (f"{server.url}/bad.zip", "not a readable zip"),
                                 (f"{plain.url}/{path.name}", "does not serve ranges")):
            with pytest.raises(ValueError, match=message):
                isic.open_source(address)
        (tmp_path / "ISIC_2024_Permissive_Training_GroundTruth.csv").unlink()
        with pytest.raises(ValueError, match="GroundTruth.csv: HTTP 404"):
            isic.open_source(f"{server.url}/{path.name}")
        address = server.url
    with pytest.raises(ValueError, match="no answer after 8 tries"):
        isic.open_source(f"{address}/x.zip")


def test_member_bytes_checks_what_it_got(tmp_path):
    """Deflated and stored members come back; a flipped bit or a missing header is an error, not a picture."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("stored.txt", b"abc" * 50)
        archive.writestr("deflated.txt", b"abc" * 50, zipfile.ZIP_DEFLATED)
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            assert remote.member_bytes(raw[member.header_offset:], member) == b"abc" * 50
            broken = bytearray(raw[member.header_offset:])
            broken[45] ^= 1
            with pytest.raises(ValueError, match=member.filename):
                remote.member_bytes(bytes(broken), member)
        with pytest.raises(ValueError, match="no local header"):
            remote.member_bytes(raw[1:], member)


@pytest.mark.parametrize(("columns", "found"), [
    ({"malignant": [0, 1], "label": ["malignant", "benign"]}, "row 1: malignant says benign but label says malignant: correct one"),
    ({"target": [0, 1], "benign_malignant": ["benign", "benign"]}, "row 2: target says malignant but benign_malignant says benign"),
    ({"malignant": [0, 1], "label": ["benign", "malignant"], "target": [0.0, None]}, ["benign", "malignant"]),
    ({"malignant": [0, 1], "label": [7, "nv"], "dx": ["nv", "bcc"]}, ["benign", "malignant"]),
    ({"label": ["rare", "1"]}, "row 1: label 'rare' is not allowed")])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_two_columns_of_labels_agree_or_are_refused(tmp_path, columns, found, kind):
    """What is prepared is the label that every column says; a diagnosis beside it is kept; a contradiction is one line."""
    rows = [{"file_name": f"{k}.jpg", "split": "train", **{name: values[k] for name, values in columns.items()}} for k in range(2)]
    for row in rows:
        (tmp_path / row["file_name"]).write_bytes(layouts.jpeg(1, 20))
    if kind == "jsonl":
        files.write_manifest(tmp_path, rows)
    else:
        layouts.write_csv(tmp_path / "metadata.csv", list(rows[0]), [list(row.values()) for row in rows])
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            isic.open_source(tmp_path)
        return
    made = list(prepared(tmp_path, tmp_path / "out").values())
    assert [row["label"] for row in made] == found
    assert all(row.get("dx") == columns.get("dx", [None] * 2)[k] for k, row in enumerate(made))
    assert not {"malignant", "target"} & made[0].keys()


def test_prepared_rows_keep_what_they_had(tmp_path):
    """Preparing a prepared set again keeps text, attributes and extra keys of its rows."""
    source, split = layouts.imagefolder(tmp_path / "in"), layouts.split_file(tmp_path)
    rows = prepared(source, tmp_path / "one", "--split-file", split)
    rows = [{**row, "attributes": {"color": "red"}, "text": "mine", "note": 5} for row in rows.values()]
    files.write_manifest(tmp_path / "one", rows)
    again = prepared(tmp_path / "one", tmp_path / "two")
    assert list(again.values()) == rows
