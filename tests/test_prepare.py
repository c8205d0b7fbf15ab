"""prepare: splits that do not leak, samples fixed by the seed, a folder that is whole or absent, readable refusals."""
import io
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile

import layouts
import numpy as np
import pytest
from layouts import IDS, LABELS
from PIL import Image

from lesion import prepare
from lesion.run import files
from lesion.tiles import decode, split, tables


def run(source, out, *flags):
    prepare.main(["--source", str(source), "--out", str(out), "--prompts", "fixed", *map(str, flags)])
    return files.read_manifest(out)


def crowd(folder, patients=120, per_patient=8, malignant=40, seed=0):
    """A zip of many small tiles with patient ids: `malignant` malignant ones, some patients with several."""
    rng = np.random.default_rng(seed)
    ids = [f"ISIC_{k:07d}" for k in range(patients * per_patient)]
    owner = {i: f"IP_{k // per_patient:04d}" for k, i in enumerate(ids)}
    sick = set(rng.choice(ids[:len(ids) // 2], malignant, replace=False))
    data = [layouts.jpeg(k, side=24) for k in range(50)]
    with zipfile.ZipFile(folder / "ISIC_2024_Training_Input.zip", "w") as archive:
        for k, i in enumerate(ids):
            archive.writestr(f"ISIC_2024_Training_Input/{i}.jpg", data[k % 50] + k.to_bytes(4, "big"))
        archive.writestr("ISIC_2024_Training_Input/metadata.csv",
                         "isic_id,patient_id\n" + "".join(f"{i},{owner[i]}\n" for i in ids))
    layouts.write_csv(folder / "ISIC_2024_Training_GroundTruth.csv", ["isic_id", "malignant"],
                      [[i, int(i in sick)] for i in ids])
    return folder, owner, sick


def contents(folder):
    """Every byte of a folder, caches aside."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- split and sample ------------------------------------------------------------------------------------------------

def test_the_default_split_keeps_patients_apart_and_classes_in_proportion(tmp_path, capsys):
    """No patient in two parts; malignant tiles spread 72/8/20 within two patients' worth; benign tiles as asked."""
    source, owner, sick = crowd(tmp_path)
    rows = run(source, tmp_path / "out", "--benign-train", 300, "--benign-val", 30, "--benign-test", 100, "--seed", 3)
    parts = {part: [row for row in rows if row["split"] == part] for part in ("train", "val", "test")}
    people = {part: {owner[row["isic_id"]] for row in mine} for part, mine in parts.items()}
    assert not people["train"] & people["val"]
    assert not people["train"] & people["test"]
    assert not people["val"] & people["test"]
    assert {row["isic_id"] for row in rows if row["label"] == "malignant"} == sick
    positives = {part: sum(row["label"] == "malignant" for row in mine) for part, mine in parts.items()}
    assert abs(positives["test"] - 8) <= 3
    assert abs(positives["val"] - 3.2) <= 3
    assert {part: len(mine) - positives[part] for part, mine in parts.items()} == {"train": 300, "val": 30, "test": 100}
    record = json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))
    assert record["counts"]["test"] == {"benign": 100, "malignant": positives["test"], "patients": len(people["test"])}
    assert [both["patients"] for both in record["overlap"].values()] == [0, 0, 0]
    printed = capsys.readouterr().out
    assert "train and test" in printed
    assert "next: " in printed


def test_the_image_split_counts_its_leak(tmp_path, capsys):
    """--split image is 80/20 by tile, allowed to share patients; the printed leak is the brute-force count."""
    source, owner, _ = crowd(tmp_path)
    everything = ["--benign-train", "all", "--benign-val", "all", "--benign-test", "all"]
    rows = run(source, tmp_path / "out", "--split", "image", *everything)
    test = [row for row in rows if row["split"] == "test"]
    assert len(test) == 960 // 5
    positives = [row for row in test if row["label"] == "malignant"]
    assert len(positives) == 8
    leaked = sum(any(owner[row["isic_id"]] == owner[other["isic_id"]] and other["split"] != "test" for other in rows)
                 for row in positives)
    assert leaked > 0
    assert f"{leaked} of 8 malignant test tiles have a patient-mate in training" in capsys.readouterr().out
    overlap = json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))["overlap"]
    assert overlap["train and test"]["patients"] == \
        len({row["patient_id"] for row in rows if row["split"] == "train"} & {row["patient_id"] for row in test})


def test_a_source_without_patients_asks_instead_of_guessing(tmp_path):
    """No patient ids: the run stops and names both ways out; each of them then works."""
    folder = layouts.class_folders(tmp_path / "in")
    with pytest.raises(ValueError, match=r"no patient ids: .*--split-file CSV .*--split image"):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(run(folder, tmp_path / "out", "--split-file", layouts.split_file(tmp_path))) == len(IDS)


def test_a_split_file_is_obeyed(tmp_path, capsys):
    """Listed tiles only, in the listed part, all of them unless a limit is given; unknown ids are counted."""
    path = layouts.write_csv(tmp_path / "s.csv", ["split", "isic_id"],
                             [["Train", i] for i in IDS[:12]] + [["validation", i] for i in IDS[12:20]]
                             + [["test", "ISIC_X"]])
    source = layouts.official_zip(tmp_path)
    rows = run(source, tmp_path / "out", "--split-file", path)
    assert {row["isic_id"]: row["split"] for row in rows} == \
        {**dict.fromkeys(IDS[:12], "train"), **dict.fromkeys(IDS[12:20], "val")}
    assert "s.csv places 20 of 24 tiles; 1 of its rows have no tile" in capsys.readouterr().out
    rows = run(source, tmp_path / "fewer", "--split-file", path, "--benign-train", 3)
    assert [row["label"] for row in rows if row["split"] == "train"].count("benign") == 3
    assert [row["label"] for row in rows if row["split"] == "train"].count("malignant") == 4


@pytest.mark.parametrize(("rows", "message"), [
    ([[IDS[0], "train"], [IDS[1], "test"]], "1 patients have tiles in both train and test .first: IP_0000000."),
    ([[IDS[0], "dev"]], f"s.csv, line 2, {IDS[0]}: split 'dev' is not allowed: use train, val or test"),
    ([[IDS[0], "train"], [IDS[0], "val"]], f"line 3: {IDS[0]} is listed twice"),
    ([["ISIC_X", "train"]], "lists none of the 24 tiles"),
])
def test_a_split_file_that_leaks_or_errs_is_refused(tmp_path, rows, message):
    """A patient in two parts, an unknown part, an id twice, no id of the source: refused before anything is written."""
    path = layouts.write_csv(tmp_path / "s.csv", ["isic_id", "split"], rows)
    with pytest.raises(ValueError, match=message):
        run(layouts.official_zip(tmp_path, metadata=True), tmp_path / "out", "--split-file", path)
    assert not (tmp_path / "out").exists()


def test_a_split_file_may_bring_the_patients(tmp_path):
    """Its patient_id column is used where the source has none: the leak is seen."""
    path = layouts.write_csv(tmp_path / "s.csv", ["isic_id", "split", "patient_id"],
                             [[IDS[0], "train", "a"], [IDS[1], "val", "a"]])
    with pytest.raises(ValueError, match="1 patients have tiles in both train and val"):
        run(layouts.class_folders(tmp_path / "in"), tmp_path / "out", "--split-file", path)


def test_too_few_to_split_says_so(tmp_path):
    """24 tiles cannot be cut 5 and 10 ways by patient with every class present."""
    with pytest.raises(ValueError, match="too few tiles to split: .* --split-file CSV"):
        run(layouts.official_zip(tmp_path, metadata=True), tmp_path / "out")


def test_the_seed_decides_every_byte(tmp_path):
    """Same source, flags and seed: the same folder byte for byte; tiles in another order: the same sample."""
    source, _, _ = crowd(tmp_path)
    flags = ["--benign-train", 60, "--benign-val", 10, "--benign-test", 20, "--color-norm", "skin-locus"]
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        run(source, tmp_path / name, *flags, "--seed", seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a").keys() != contents(tmp_path / "c").keys()
    shuffled = list(LABELS)
    np.random.default_rng(1).shuffle(shuffled)
    assert split.sample(dict.fromkeys(shuffled, "train"), LABELS, {"train": 5}, 4) == \
        split.sample(dict.fromkeys(sorted(LABELS), "train"), LABELS, {"train": 5}, 4)


# --- copies ----------------------------------------------------------------------------------------------------------

def test_planted_copies_across_the_split_are_found(tmp_path):
    """An identical file, a re-encoded, a shrunken, a flipped, a brightened copy in val are named; nothing else is."""
    folder = tmp_path / "in"
    ids = [f"ISIC_{k:07d}" for k in range(60)]
    for k, i in enumerate(ids):
        place = folder / ("malignant" if k % 2 else "benign")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.jpg").write_bytes(layouts.jpeg(k, side=96))

    def plant(name, change):
        picture = change(Image.open(io.BytesIO(layouts.jpeg(int(name[-1]), side=96))))
        picture.save(folder / "benign" / f"{name}.jpg", quality=70)

    (folder / "benign" / "COPY_0.jpg").write_bytes(layouts.jpeg(0, side=96))
    plant("COPY_1", lambda p: p)
    plant("COPY_2", lambda p: p.resize((75, 75)))
    plant("COPY_3", lambda p: p.transpose(Image.FLIP_LEFT_RIGHT).rotate(90))
    plant("COPY_4", lambda p: p.point(lambda v: v * 1.06 + 3))
    rows = [[i, "train" if k < 50 else "val"] for k, i in enumerate(ids)] + [[f"COPY_{k}", "val"] for k in range(5)]
    run(folder, tmp_path / "out", "--split-file", layouts.write_csv(tmp_path / "s.csv", ["isic_id", "split"], rows))
    overlap = json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))["overlap"]["train and val"]
    assert (overlap["exact"], overlap["near"]) == (1, 4)
    assert {(a, b) for a, b, _ in overlap["pairs"]} == {(ids[k], f"COPY_{k}") for k in range(5)}


def test_copies_without_number_are_counted_and_twenty_are_named(monkeypatch):
    """700 times 900 copies of one tile, of which 3 times 2 are one file, beside others: counted pair by pair, the likest
    20 kept, the same whatever the block, and the pairs never stand in memory at once."""
    rng, parts, prints = np.random.default_rng(0), {}, {}
    copy = split.fingerprint(plain_noise(rng))
    for part, count, same in (("train", 700, 3), ("val", 900, 2)):
        for k in range(count):
            parts[f"{part}{k:03}"] = part
            prints[f"{part}{k:03}"] = ("one" if k < same else f"{part}{k}", copy if k % 2 else copy * np.float16(0.99))
        parts[f"{part}x"], prints[f"{part}x"] = part, (part, split.fingerprint(plain_noise(rng)))
    tables = []
    for block in (2000, 128):
        monkeypatch.setattr(split, "BLOCK", block)
        tracemalloc.start()
        tables.append(split.overlap(parts, {}, {}, prints)["train and val"])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert tables[0] == tables[1]
    assert (tables[0]["exact"], tables[0]["near"], len(tables[0]["pairs"])) == (6, 700 * 900 - 6, 20)
    assert tables[0]["pairs"][0] == ["train001", "val001", 1.0]
    assert peak < 20 << 20


def plain_noise(rng):
    """A tile without a pattern."""
    return rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)


def test_real_tiles_hold_no_copies_and_planted_ones_stand_out(shared):
    """Among 560 real tiles no two different ones reach the threshold; every one of 40 re-encoded copies does."""
    with zipfile.ZipFile(shared / "isic2024" / "ISIC_2024_Permissive_Training_Input.zip") as archive:
        images = [decode.decode(archive.read(name)) for name in archive.namelist()[::16][:560]]
    prints = np.stack([split.fingerprint(image) for image in images])
    assert list(split.near_copies(prints[:280], prints[280:])) == []
    copies = []
    for image in images[:40]:
        stream = io.BytesIO()
        Image.fromarray(image).resize((100, 100), Image.BICUBIC).rotate(180).save(stream, "JPEG", quality=70)
        copies.append(split.fingerprint(decode.decode(stream.getvalue())))
    assert [(i, j) for i, j, _ in split.near_copies(prints[:280], np.stack(copies))] == [(k, k) for k in range(40)]


def test_shared_groups_by_hand():
    """Patients in two parts, by a case small enough to count by hand."""
    parts = {"a": "train", "b": "train", "c": "val", "d": "test", "e": "test"}
    owner = {"a": "1", "b": "2", "c": "1", "d": "2", "e": "3"}
    assert split.shared(parts, owner) == {("train", "val"): {"1"}, ("train", "test"): {"2"}, ("val", "test"): set()}
    assert split.leaked_positives(parts, {"d": "malignant", "e": "malignant"}, owner) == (1, 2)


# --- the output folder -----------------------------------------------------------------------------------------------

def test_another_set_is_refused_the_same_is_kept(tmp_path, capsys):
    """Same command again: nothing touched. Other flags: refused, or --overwrite; labels are never lost."""
    source, csv = layouts.official_zip(tmp_path), layouts.split_file(tmp_path)
    out = tmp_path / "out"
    run(source, out, "--split-file", csv)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    run(source, out, "--split-file", csv)
    assert "already holds this data set; nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    other = ["--split-file", csv, "--benign-train", 2]
    with pytest.raises(ValueError, match="holds another data set: choose another folder, or --overwrite"):
        run(source, out, *other)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert len(run(source, out, *other, "--overwrite")) < len(IDS)
    (out / "labels.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds what prepare did not write \(labels.jsonl\): move it away first"):
        run(source, out, "--split-file", csv, "--overwrite")
    assert (out / "labels.jsonl").exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".out")) == []


def test_a_folder_of_other_things_is_refused(tmp_path):
    """--out holding someone's files, or being a file, is refused and left alone; an empty folder is used."""
    source, csv = layouts.official_zip(tmp_path), layouts.split_file(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="holds another data set"):
        run(source, tmp_path / "mine", "--split-file", csv)
    with pytest.raises(ValueError, match="is a file: give a folder"):
        run(source, tmp_path / "mine" / "thesis.txt", "--split-file", csv)
    (tmp_path / "empty").mkdir()
    assert run(source, tmp_path / "empty", "--split-file", csv)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, error):
    """Ctrl-C, or a full disk, half way through the tiles: no --out, no leftovers; an old set stays whole."""
    source, csv = layouts.official_zip(tmp_path), layouts.split_file(tmp_path)
    run(source, tmp_path / "old", "--split-file", csv)
    before, real, count = contents(tmp_path / "old"), decode.decode, []

    def breaking(*args, **settings):
        count.append(1)
        if len(count) % 10 == 0:
            raise error
        return real(*args, **settings)

    monkeypatch.setattr(decode, "decode", breaking)
    for out, flags in (("new", []), ("old", ["--overwrite", "--seed", 1])):
        with pytest.raises((KeyboardInterrupt, OSError)):
            run(source, tmp_path / out, "--split-file", csv, *flags)
    assert not (tmp_path / "new").exists()
    assert contents(tmp_path / "old") == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_kill_9_leaves_no_half_set(tmp_path, shared):
    """Killed in mid-copy, --out is absent; the next run cleans up and finishes."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lesion", "prepare", "--source", shared / "isic2024", "--prompts", "fixed",
               "--out", out, "--split-file", shared / "isic2024" / "patient_split.csv"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    images = tmp_path / ".out.partial" / "images"
    deadline = time.monotonic() + 60
    while not (images.is_dir() and len(os.listdir(images)) > 100) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(os.listdir(images)) > 100
    assert not out.exists()
    csv = layouts.split_file(tmp_path)
    assert len(run(layouts.official_zip(tmp_path), out, "--split-file", csv)) == len(IDS)
    assert len(os.listdir(out / "images")) == len(IDS)
    assert not images.exists()


def test_a_killed_overwrite_is_put_right(tmp_path):
    """Killed between the two renames of --overwrite: the next run finds the old set in its place."""
    source, csv = layouts.official_zip(tmp_path), layouts.split_file(tmp_path)
    run(source, tmp_path / "out", "--split-file", csv)
    os.rename(tmp_path / "out", tmp_path / ".out.old")
    with pytest.raises(ValueError, match="holds another data set"):
        run(source, tmp_path / "out", "--split-file", csv, "--seed", 5)
    assert len(files.read_manifest(tmp_path / "out")) == len(IDS)


# --- rows ------------------------------------------------------------------------------------------------------------

def test_unreadable_and_oblong_tiles_are_named(tmp_path, capsys):
    """A truncated JPEG and a text file are left out and named; an oblong picture is kept and named; all bad: error."""
    folder = layouts.class_folders(tmp_path / "in")
    paths = sorted(folder.rglob("*.jpg"))
    paths[0].write_bytes(paths[0].read_bytes()[:400])
    paths[1].write_text("no picture", encoding="utf-8")
    Image.new("RGB", (60, 40), (200, 150, 120)).save(paths[2])
    csv = layouts.split_file(tmp_path)
    rows = run(folder, tmp_path / "out", "--split-file", csv)
    printed = capsys.readouterr().out
    assert len(rows) == len(IDS) - 2
    assert "2 tiles are unreadable and left out" in printed
    assert f"{paths[0].stem}: " in printed
    assert f"1 tiles are not square: their centre is used: {paths[2].stem}: 60x40" in printed
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 24 tiles is readable"):
        run(folder, tmp_path / "none", "--split-file", csv)


def test_structured_prompts_carry_what_was_measured(tmp_path):
    """Rows get attributes, their confidence and measures, and the sentence of the vocabulary."""
    from lesion.describe import prompts
    source, csv = layouts.official_zip(tmp_path), layouts.split_file(tmp_path)
    prepare.main(["--source", str(source), "--out", str(tmp_path / "out"), "--split-file", str(csv), "--workers", "1"])
    for row in files.read_manifest(tmp_path / "out"):
        assert prompts.from_sentence(row["text"]) == (row["label"], row["attributes"])
        assert row["attributes"].keys() == row["confidence"].keys()
        assert row["measured"]["ita"]
    with Image.open(tmp_path / "out" / "attributes.png") as sheet:  # 24 tiles, eight a row
        assert sheet.height * 7 < sheet.width * 3 < sheet.height * 9


def test_metadata_goes_before_pixels(tmp_path):
    """A diameter and a skin tone in the release's table decide the sentence; what it does not say is measured."""
    source, csv = layouts.official_zip(tmp_path), layouts.split_file(tmp_path)
    with zipfile.ZipFile(source, "a") as archive:
        text = "".join(f"{i},{7.5 if k % 2 else ''},20,25\n" for k, i in enumerate(layouts.IDS))
        archive.writestr("ISIC_2024_Permissive_Training_Input/metadata.csv",
                         "isic_id,clin_size_long_diam_mm,tbp_lv_Lext,tbp_lv_Bext\n" + text)
    prepare.main(["--source", str(source), "--out", str(tmp_path / "out"), "--split-file", str(csv), "--workers", "1"])
    rows = {row["isic_id"]: row for row in files.read_manifest(tmp_path / "out")}
    assert {row["attributes"]["skin_tone"] for row in rows.values()} == {"dark"}
    sized = [rows[i]["attributes"]["size"] for i in layouts.IDS[1::2]]
    assert sized == ["6 to 9 mm"] * 12
    assert {rows[i]["attributes"].get("size") for i in layouts.IDS[::2]} != {"6 to 9 mm"}


def test_a_link_is_followed_and_stays(tmp_path):
    """--out is a link to a folder on another disk: the set is written there, again and again, and the link stays a link.
    What an older version left (.out.old, a link) is in nobody's way."""
    source, csv = layouts.official_zip(tmp_path), layouts.split_file(tmp_path)
    (tmp_path / "big" / "set").mkdir(parents=True)
    (tmp_path / "out").symlink_to("big/set")
    for name in (".out.old", "big/.set.old"):
        (tmp_path / name).symlink_to(tmp_path / "big")
    for seed in range(3):
        assert len(run(source, tmp_path / "out", "--split-file", csv, "--seed", seed, "--overwrite")) == len(IDS)
        assert (tmp_path / "out").is_symlink()
        assert [path.name for path in (tmp_path / "big").iterdir()] == ["set"]
    with pytest.raises(ValueError, match="holds another data set"):
        run(source, tmp_path / "out", "--split-file", csv, "--seed", 7)


@pytest.mark.parametrize("out", [".", "..", "below/.."])
def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch, out):
    """--out . would take the folder away under the shell, and fail at the last step: refused before the first tile."""
    source, csv = layouts.official_zip(tmp_path), layouts.split_file(tmp_path)
    (tmp_path / "a" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / ("below" if out == ".." else "."))
    (tmp_path / "a" / "below").rmdir() if out == "." else None
    monkeypatch.setattr(prepare, "build", None)
    with pytest.raises(ValueError, match="is the current folder or holds it|holds another data set"):
        run(source, out, "--split-file", csv)
    with pytest.raises(ValueError, match="is the current folder or holds it|holds what prepare did not write"):
        run(source, out, "--split-file", csv, "--overwrite")


def test_a_mount_is_not_replaced(tmp_path, monkeypatch):
    """Where a file system is mounted no rename goes: refused before the first tile."""
    source, csv = layouts.official_zip(tmp_path), layouts.split_file(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    monkeypatch.setattr(prepare, "build", None)
    with pytest.raises(ValueError, match=r"is where a file system is mounted, .* such as --out .*out/isic2024$"):
        run(source, tmp_path / "out", "--split-file", csv)


@pytest.mark.parametrize("name", ["a.\x1b]0;x\x07", "a.\x9b2j"])
def test_names_of_a_source_do_nothing_to_a_terminal(tmp_path, capsys, name):
    """What a file's name holds is printed, escaped, on its line."""
    folder = layouts.class_folders(tmp_path / "in")
    (folder / name).write_text("x", encoding="utf-8")
    run(folder, tmp_path / "out", "--split-file", layouts.split_file(tmp_path))
    printed = capsys.readouterr().out
    assert all(sign.isprintable() or sign == "\n" for sign in printed)
    assert repr(name)[2:-1] in printed


@pytest.mark.parametrize(("flags", "message"), [
    (["--color-norm", "gray"], "'gray' is unknown: allowed are none, grey-world, shades-of-gray, max-rgb, skin-locus"),
    (["--split-file", "absent.csv"], "--split-file absent.csv does not exist"),
    (["--ground-truth", "absent.csv"], "--ground-truth absent.csv does not exist"),
])
def test_wrong_flags_end_in_one_line(tmp_path, flags, message):
    """Unknown normalisation, absent tables."""
    with pytest.raises(ValueError, match=message):
        run(layouts.official_zip(tmp_path), tmp_path / "out", *flags)


def test_overwrite_knows_its_own_outline_sheet(tmp_path):
    """A set with attributes.png, which prepare wrote, can be written over."""
    source, csv = layouts.official_zip(tmp_path), layouts.split_file(tmp_path)
    flags = ["--source", str(source), "--out", str(tmp_path / "out"), "--split-file", str(csv), "--workers", "1"]
    prepare.main(flags)
    assert (tmp_path / "out" / "attributes.png").is_file()
    prepare.main([*flags, "--seed", "4", "--overwrite"])
    assert json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))["seed"] == 4


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_finished_set_is_looked_at_before_it_is_called_finished(tmp_path, damage):
    """The same command on a set of which one tile was changed or lost names the tile; --overwrite makes it whole."""
    source, csv = layouts.official_zip(tmp_path), layouts.split_file(tmp_path)
    rows = run(source, tmp_path / "out", "--split-file", csv)
    tile = tmp_path / "out" / rows[3]["file_name"]
    before = tile.read_bytes()
    tile.unlink()
    if damage == "change":
        tile.write_bytes(before[:-1] + b"x")
    with pytest.raises(ValueError, match=f"holds this data set, but {rows[3]['file_name']} is gone or changed: .* "
                                         f"--overwrite"):
        run(source, tmp_path / "out", "--split-file", csv)


def test_overwrite_makes_a_damaged_set_whole(tmp_path):
    """--overwrite with the same flags rebuilds a damaged set."""
    source, csv = layouts.official_zip(tmp_path), layouts.split_file(tmp_path)
    rows = run(source, tmp_path / "out", "--split-file", csv)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / rows[0]["file_name"]).unlink()
    run(source, tmp_path / "out", "--split-file", csv, "--overwrite")
    assert contents(tmp_path / "out") == before


def test_reasons_stand_before_the_refusal(tmp_path, capsys):
    """What was read, passed over and left out is printed before "too few tiles" ends the run."""
    folder = layouts.class_folders(tmp_path / "in")
    (folder / "malignant" / "x.tif").write_bytes(b"x")
    for path in sorted((folder / "malignant").glob("*.jpg"))[1:]:
        path.rename(path.with_suffix(".tiff"))
    with pytest.raises(ValueError, match="too few tiles to split"):
        run(folder, tmp_path / "out", "--split", "image")
    printed = capsys.readouterr().out
    assert "17 tiles to read; passed over: 1 .tif (not read: save them as JPEG or PNG); 7 .tiff (not read" in printed
    path = layouts.official_zip(tmp_path, metadata=True)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("ISIC_2024_Permissive_Training_Input/ISIC_9.jpg", layouts.jpeg(9))
    with pytest.raises(ValueError, match="too few tiles to split"):
        run(path, tmp_path / "out")
    assert "1 tiles have no label and are left out (first: ISIC_9)" in capsys.readouterr().out


def test_label_map_on_the_command_line(tmp_path, run_script):
    """melanoma=malignant reads the folder melanoma and is recorded; what is no NAME=LABEL is refused in one line."""
    folder = layouts.class_folders(tmp_path / "in")
    (folder / "malignant").rename(folder / "melanoma")
    flags = ["-m lesion", "prepare", "--source", folder, "--split-file", layouts.split_file(tmp_path), "--prompts", "fixed",
             "--out", tmp_path / "out"]
    bad = run_script(*flags)
    assert bad.returncode == 2
    assert "--label-map melanoma=malignant" in bad.stderr
    done = run_script(*flags, "--label-map", "Melanoma=malignant", "x=skip")
    assert done.returncode == 0, done.stderr
    assert {row["isic_id"]: row["label"] for row in files.read_manifest(tmp_path / "out")} == LABELS
    assert "melanoma" in json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))["arguments"]["label_map"]
    bad = run_script(*flags, "--label-map", "melanoma=bad")
    assert bad.returncode == 2
    assert "'melanoma=bad' is not NAME=benign, NAME=malignant or NAME=skip" in bad.stderr


def test_odd_pictures_are_named(tmp_path, capsys):
    """One pixel, five pixels and a strip are too small; four inks are kept and remarked on; 16 bits, frames, text are
    unreadable."""
    folder = layouts.class_folders(tmp_path / "in")
    paths = sorted(folder.rglob("*.jpg"))
    for path, size in zip(paths, ((1, 1), (5, 5), (400, 3))):
        Image.new("RGB", size, (200, 150, 120)).save(path, "PNG")
    Image.new("CMYK", (40, 40), (20, 90, 90, 10)).save(paths[3], "JPEG")
    paths[4].write_bytes(b"<html>404</html>")
    rows = run(folder, tmp_path / "out", "--split-file", layouts.split_file(tmp_path))
    printed = capsys.readouterr().out
    assert {paths[k].stem for k in (0, 1, 2, 4)} == set(IDS) - {row["isic_id"] for row in rows}
    record = json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))
    assert f"{paths[0].stem}: 1x1 pixels, expected at least 16 a side" in record["unreadable"]
    assert f"{paths[2].stem}: 400x3 pixels, expected at least 16 a side" in record["unreadable"]
    assert record["notes"][-1] == f"1 tiles are in four inks (CMYK): turned to RGB without a profile (first: {paths[3].stem})"
    assert "4 tiles are unreadable and left out" in printed
    assert record["notes"][-1] in printed


@pytest.mark.parametrize(("row", "message"), [
    ({"attributes": {"color": "violet"}}, f"images/{IDS[0]}.jpg: attribute 'color' has no value 'violet'"),
    ({"attributes": {"colour": "red"}}, "no attribute 'colour'"), ({"text": 4}, "text is of type int, expected text")])
def test_words_that_cannot_be_used_name_their_tile(tmp_path, row, message):
    """Attributes outside the vocabulary and captions of the wrong type are refused with the tile's name."""
    source = layouts.imagefolder(tmp_path / "in")
    lines = (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), **row})
    (source / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out", "--split-file", layouts.split_file(tmp_path))


def test_the_command_line(tmp_path, run_script):
    """As a user runs it: exit 0 and the table; exit 2 and one line for a bad number and for a bad source."""
    source, csv = layouts.official_zip(tmp_path), layouts.split_file(tmp_path)
    done = run_script("-m lesion", "prepare", "--source", source, "--split-file", csv, "--out", tmp_path / "out",
                      "--prompts", "fixed")
    assert done.returncode == 0, done.stderr
    assert "24 tiles, CC-BY" in done.stdout
    for flags in (["--source", source, "--benign-train", "-3"], ["--source", tmp_path / "absent"],
                  ["--source", source, "--split-file", csv, "--seed", 10 ** 310]):
        bad = run_script("-m lesion", "prepare", *flags, "--out", tmp_path / "bad")
        assert bad.returncode == 2
        assert len(bad.stderr.strip().splitlines()) == 1


def test_tables_read_labels_and_splits_in_every_spelling():
    """0, 0.0, 1, "1.0", True and the words; train in three spellings; anything else names its place."""
    for value in (0, 0.0, "0", "0.0", "benign", "Benign ", False):
        assert tables.label_of(value, "x") == "benign"
    for value in (1, 1.0, "1", "1.0", "malignant", True):
        assert tables.label_of(value, "x") == "malignant"
    assert [tables.split_of(s, "x") for s in ("training", "Valid", "TEST")] == ["train", "val", "test"]
    for value in (2, 0.5, None, "", "nan"):
        with pytest.raises(ValueError, match="row 9: label"):
            tables.label_of(value, "row 9")


@pytest.mark.skipif(not os.environ.get("LESION_BIG"), reason="set LESION_BIG=1: writes and reads 400,000 tiles")
def test_four_hundred_thousand_tiles(tmp_path):
    """A csv of 400,000 rows, 55 columns of metadata in the zip, 400,000 members: under 2 minutes and 1.5 GB.

    CPU time is judged, that a busy machine does not fail it; the work is one process's, so an idle one takes as long.
    """
    header = ["isic_id", "patient_id", *(f"tbp_lv_{k}" for k in range(53))]
    data = [layouts.jpeg(k, side=16) for k in range(20)]
    with zipfile.ZipFile(tmp_path / "ISIC_2024_Training_Input.zip", "w") as archive:
        for k in range(400_000):
            archive.writestr(f"ISIC_2024_Training_Input/ISIC_{k:07d}.jpg", data[k % 20])
        with archive.open("ISIC_2024_Training_Input/metadata.csv", "w") as file:
            file.write((",".join(header) + "\n").encode())
            for k in range(400_000):
                values = ",".join(f"{k * 0.37 + c:.5f}" for c in range(53))
                file.write(f"ISIC_{k:07d},IP_{k // 400:04d},{values}\n".encode())
    layouts.write_csv(tmp_path / "ISIC_2024_Training_GroundTruth.csv", ["isic_id", "malignant"],
                      [[f"ISIC_{k:07d}", float(k % 1000 == 7)] for k in range(400_000)])
    code = ("import resource, sys, time; from lesion import prepare; prepare.main(sys.argv[1:]); "
            "print('USED', time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    start = time.monotonic()
    command = [sys.executable, "-c", code, "--source", tmp_path, "--out", tmp_path / "out", "--prompts", "fixed"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
    seconds, peak = map(float, done.stdout.rpartition("USED")[2].split())
    print(done.stdout, f"{seconds:.1f} s of CPU, {time.monotonic() - start:.1f} s in all, "
          f"peak {peak * 1024 / 1e9:.2f} GB")
    assert seconds < 120
    assert peak * 1024 < 1.5e9


def test_the_leak_and_the_sample_by_hand():
    """A malignant test tile whose patient has a val tile only has leaked too; another seed keeps other benign tiles."""
    from lesion.tiles import split
    parts, patients = {"a": "val", "b": "test", "c": "test"}, {"a": "P", "b": "P", "c": "Q"}
    assert split.leaked_positives(parts, dict.fromkeys("abc", "malignant"), patients) == (1, 2)
    parts, labels = {f"{i:02d}": "train" for i in range(40)}, {f"{i:02d}": "benign" for i in range(40)}
    assert split.sample(parts, labels, {"train": 10}, 0) != split.sample(parts, labels, {"train": 10}, 1)
