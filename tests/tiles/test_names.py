"""What file names say, in a folder and in a zip alike: ids, classes, splits, captions, and a count of what is passed over."""
import zipfile

import layouts
import pytest

from lesion.tiles import isic
from lesion.tiles.source import tile_id

TILES = {f"{label}/{number}.jpg": layouts.jpeg(number + 10 * (label == "malignant"), 20)
         for label in ("benign", "malignant") for number in range(1, 4)}
TWIN = bytes([0, 5, 22, 7]) + b"Mac OS X" + bytes(40)


def as_folder(path, contents):
    for name, data in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def as_zip(path, contents):
    with zipfile.ZipFile(path / "set.zip", "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path / "set.zip"


def as_windows_zip(path, contents):
    """Older Windows tools write backslashes; zipfile would put slashes right when it writes."""
    found = as_zip(path, contents)
    data = found.read_bytes()
    for name in contents:
        data = data.replace(name.encode(), name.replace("/", "\\").encode())
    found.write_bytes(data)
    return found


KINDS = pytest.mark.parametrize("make", [as_folder, as_zip, as_windows_zip])


@KINDS
def test_numbered_files_of_each_class_are_different_tiles(tmp_path, make):
    """1.jpg of benign/ and 1.jpg of malignant/, also under train/ and test/: ids of folder and name, no tile lost, said."""
    contents = {f"{split}/{name}": data + split.encode() for split in ("train", "test") for name, data in TILES.items()}
    source = isic.open_source(make(tmp_path, contents))
    assert len(source.where) == 12
    assert source.labels["train_malignant_1"] == "malignant"
    assert source.given["test_benign_3"]["split"] == "test"
    assert dict(source.read(["test_benign_3"]))["test_benign_3"] == contents["test/benign/3.jpg"]
    assert source.notes == ["file names repeat between folders: an id is folder and name (such as test_benign_1)"]


@KINDS
def test_a_mac_leaves_twins_and_they_are_counted(tmp_path, make):
    """._ twins, __MACOSX and .DS_Store are no tiles, captions or tables, and the account says how many there were."""
    contents = {**TILES, **{f"{label}/._{number}.jpg": TWIN for label in ("benign", "malignant") for number in range(9)},
                "__MACOSX/benign/._1.jpg": TWIN, ".DS_Store": TWIN, "benign/._1.txt": TWIN, "._labels_GroundTruth.csv": TWIN,
                "Thumbs.db": TWIN}
    contents = {name.replace("/1.jpg", "/a1.jpg").replace("benign/", "benign/b") if name in TILES else name: data
                for name, data in contents.items()}
    source = isic.open_source(make(tmp_path, contents))
    assert len(source.where) == 6
    assert source.account() == "6 tiles to read; passed over: 23 files of the system (._*, __MACOSX, .DS_Store ...)"


@KINDS
@pytest.mark.parametrize("folder", ["Malignant", "malign", "MALIGNANT", "1_malignant", "10_malignant lesion", "malignant_images",
                                    "malignant-train", "malignant (1)", "Malign cases"])
def test_spellings_of_a_class_folder(tmp_path, make, folder):
    """Folders that begin with the class, numbered or not, are read."""
    contents = {f"{folder}/m{k}.jpg": layouts.jpeg(k, 20) for k in range(2)} | {"benign_x/b.jpg": layouts.jpeg(9, 20)}
    source = isic.open_source(make(tmp_path, contents))
    assert source.labels == {"m0": "malignant", "m1": "malignant", "b": "benign"}


@KINDS
@pytest.mark.parametrize("folder", ["melanoma", "malignancy", "non-malignant", "not_benign", "benign_and_malignant"])
def test_another_class_folder_is_asked_about(tmp_path, make, folder):
    """A folder that names no class stops the run with the flag that maps it; mapped, its tiles are read, or left out and counted."""
    contents = {f"{folder}/m{k}.jpg": layouts.jpeg(k, 20) for k in range(2)} | {"benign/b.jpg": layouts.jpeg(9, 20)}
    source = make(tmp_path, contents)
    with pytest.raises(ValueError, match=rf"the folder '{folder}' \(2 pictures\) is neither .* --label-map {folder}=malignant \(or"):
        isic.open_source(source)
    assert isic.open_source(source, label_map={folder: "malignant"}).labels["m0"] == "malignant"
    left = isic.open_source(source, label_map={folder: "skip"})
    assert list(left.where) == ["b"]
    assert "2 tiles in folders mapped to skip" in left.account()


@KINDS
def test_folders_of_diagnoses_only(tmp_path, make):
    """Where no folder says benign or malignant, all may be mapped: the refusal shows how, two words do it."""
    source = make(tmp_path, {"mel/a.jpg": layouts.jpeg(1, 20), "10_nevus nevus/b.jpg": layouts.jpeg(2, 20)})
    with pytest.raises(ValueError, match="no labels found: .* --label-map, such as .*mel=malignant"):
        isic.open_source(source)
    assert isic.open_source(source, label_map={"mel": "malignant", "nevus": "benign"}).labels == {"a": "malignant", "b": "benign"}


@KINDS
@pytest.mark.parametrize("endings", [(".jpg", ".txt"), (".JPG", ".TXT"), (".png", ".caption"), (".jpeg", ".Txt"), (".bmp", ".jpg.txt")])
def test_captions_in_any_case_are_used(tmp_path, make, endings):
    """A caption beside a tile is its text whatever the case of the endings."""
    picture, caption = endings
    contents = {f"benign/x{picture}": TILES["benign/1.jpg"],
                f"benign/x{caption.replace('.jpg.txt', picture + '.txt')}": "un lunar café\n".encode()}
    assert isic.open_source(make(tmp_path, contents)).given["x"] == {"text": "un lunar café"}


@KINDS
@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_say_their_encoding(tmp_path, make, coding):
    """UTF-8 with or without a mark, and UTF-16 with one."""
    contents = {"benign/x.jpg": TILES["benign/1.jpg"], "benign/x.txt": "黒色の病変".encode(coding)}
    assert isic.open_source(make(tmp_path, contents)).given["x"] == {"text": "黒色の病変"}


@KINDS
@pytest.mark.parametrize(("name", "data", "message"), [
    ("benign/x.txt", "lesión".encode("cp1252"), r"benign/x.txt is not UTF-8 text .*: save the caption as UTF-8"),
    ("benign/x.txt", "黒色の病変".encode("shift_jis"), "benign/x.txt is not UTF-8 text"),
    ("benign/x.txt", b"a" * 70_000, "benign/x.txt: a caption of 70,000 bytes"),
    ("benign/y.txt", b"a mole", r"1 captions belong to no tile \(first: .*benign/y.txt\)"),
    ("captions/x.txt", b"a mole", "1 captions belong to no tile"), ("benign/x.txt", "é mole".encode("utf-16-le"), "benign/x.txt"),
    ("benign/x.txt", "mole".encode("utf-16-le"), "benign/x.txt holds zero bytes"),
    ("benign/x.caption", b"another", "has 2 different captions")])
def test_a_caption_that_cannot_be_used_stops_the_run(tmp_path, make, name, data, message):
    """Another encoding, a book, a caption of no tile, two of one: refused with the file's name, never passed over."""
    contents = {"benign/x.jpg": TILES["benign/1.jpg"], "benign/x.txt": b"a mole"} | {name: data}
    with pytest.raises(ValueError, match=message):
        isic.open_source(make(tmp_path, contents))


@KINDS
def test_what_is_not_read_is_counted_by_kind(tmp_path, make):
    """webp and bmp are read; tif, gif and heic are counted with what to do, a pdf counted, a readme is no caption."""
    contents = {"benign/a.webp": b"x", "benign/b.bmp": b"x", "benign/c.tif": b"x", "benign/d.TIF": b"x", "benign/e.heic": b"x",
                "benign/f.jpg": b"x", "paper.pdf": b"x", "README.txt": b"x"}
    source = isic.open_source(make(tmp_path, contents))
    assert list(source.where) == ["a", "b", "f"]
    assert source.account() == ("3 tiles to read; passed over: 1 .heic (not read: save them as JPEG or PNG); 1 .pdf; "
                                "2 .tif (not read: save them as JPEG or PNG); 1 .txt about the set")


@KINDS
def test_captions_in_a_folder_of_their_own_stop_the_run(tmp_path, make):
    """Captions kept apart from their tiles would all be lost: an error; two lists in a set without captions are only counted."""
    pictures = {f"benign/{k}.jpg": b"x" for k in range(6)}
    with pytest.raises(ValueError, match="6 captions belong to no tile"):
        isic.open_source(make(tmp_path, pictures | {f"captions/{k}.txt": b"a mole" for k in range(6)}))
    lists = {"benign/train.txt": b"1\n2\n", "benign/test.txt": b"3\n"}
    (tmp_path / "lists").mkdir()
    assert "2 .txt about the set" in isic.open_source(make(tmp_path / "lists", pictures | lists)).account()


def test_only_pictures_that_are_not_read(tmp_path):
    """A set of nothing but tif says so, and what to do."""
    with pytest.raises(ValueError, match=r"no tiles .* it holds 2 other files, passed over: 2 .tif \(not read: save them as JPEG or PNG\)"):
        isic.open_source(as_folder(tmp_path, {"benign/a.tif": b"x", "benign/b.tif": b"x", "a_GroundTruth.csv": b"isic_id,target\n"}))


def test_kaggles_competition_zip(tmp_path):
    """Table and pictures in one zip, beside a test table and a sample submission: labels, patients, licence."""
    rows = "".join(f"{i},{int(layouts.LABELS[i] == 'malignant')},{layouts.PATIENTS[i]}\n" for i in layouts.IDS)
    contents = {"train-metadata.csv": f"isic_id,target,patient_id\n{rows}".encode(),
                **{f"train-image/image/{i}.jpg": data for i, data in layouts.TILES.items()},
                "test-metadata.csv": b"isic_id,patient_id\nISIC_0015657,IP_1\n", "train-image.hdf5": b"x", "test-image.hdf5": b"x",
                "sample_submission.csv": b"isic_id,target\nISIC_0015657,0.3\n"}
    path = as_zip(tmp_path, contents).rename(tmp_path / "isic-2024-challenge.zip")
    for place in (path, tmp_path):
        source = isic.open_source(place)
        assert source.labels == layouts.LABELS
        assert source.patients == layouts.PATIENTS
        assert source.origin(layouts.IDS[0]) == ("ISIC 2024", "CC-BY-NC")
        assert source.account() == "24 tiles to read; passed over: 2 .hdf5"


@pytest.mark.parametrize(("name", "table"), [
    ("metadata.csv", "isic_id,diagnosis_1,patient_id\nISIC_1,Malignant,a\nISIC_2,Benign,b\n"),            # isic-cli
    ("metadata.csv", "isic_id,benign_malignant,patient_id\nISIC_1,malignant,a\nISIC_2,benign,b\n"),       # isic-cli, earlier
    ("train.csv", "image_name,patient_id,diagnosis,benign_malignant,target\nISIC_1,a,melanoma,malignant,1\nISIC_2,b,nevus,benign,0\n"),
    ("ISIC_2019_Training_GroundTruth.csv", "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\n"
     "ISIC_1,1.0,0.0,0,0,0,0,0,0,0\nISIC_2,0,1,0,0,0,0,0,0,0\n"),
    ("HAM10000_metadata.csv", "lesion_id,image_id,dx,dx_type\nHAM_1,ISIC_1,mel,histo\nHAM_2,ISIC_2,nv,histo\n")])
def test_other_isic_tables_are_found_by_their_columns(tmp_path, name, table):
    """isic-cli's export, ISIC 2019, ISIC 2020 and HAM10000 beside their pictures."""
    (tmp_path / name).write_text(table, encoding="utf-8")
    (tmp_path / "sample_submission.csv").write_text("isic_id,target\nISIC_1,0.3\n", encoding="utf-8")
    source = isic.open_source(as_folder(tmp_path, {"pictures/ISIC_1.jpg": b"x", "pictures/ISIC_2.JPG": b"x"}))
    assert source.labels == {"ISIC_1": "malignant", "ISIC_2": "benign"}


def test_a_table_of_file_names_under_another_name(tmp_path):
    """labels.csv with file_name and label is a listing; one with paths as ids, or with filename, is a table of labels."""
    as_folder(tmp_path / "a", {"t/x.jpg": b"x", "t/y.jfif": b"x"})
    (tmp_path / "a" / "labels.csv").write_text("file_name,label,caption\nt/x.jpg,1,a mole\nt\\y.jfif,0,\n", encoding="utf-8")
    source = isic.open_source(tmp_path / "a")
    assert source.labels == {"x": "malignant", "y": "benign"}
    assert source.given == {"x": {"text": "a mole"}, "y": {}}
    for name, header in (("b", "image,label"), ("c", "filename,target")):
        as_folder(tmp_path / name, {"t/x.jpg": b"x", "t/y.jpg": b"x"})
        (tmp_path / name / "labels.csv").write_text(f"{header}\nt/x.jpg,1\nt/y.jpg,0\n", encoding="utf-8")
        assert isic.open_source(tmp_path / name).labels == {"x": "malignant", "y": "benign"}


def test_pictures_beside_a_zip_or_a_listing_are_counted(tmp_path):
    """A zip is read and what lies loose beside it counted; so is a tile that an imagefolder's listing leaves out."""
    layouts.official_zip(tmp_path)
    as_folder(tmp_path, {"more/x.jpg": b"x", "more/y.png": b"x"})
    assert "2 loose tiles beside the zip" in isic.open_source(tmp_path).account()
    folder = layouts.imagefolder(tmp_path / "listed")
    (folder / "tiles" / "extra.jpg").write_bytes(b"x")
    assert isic.open_source(folder).account() == "24 tiles to read; passed over: 1 tiles that are not listed"


def test_captions_beside_a_listing_without_texts_stop_the_run(tmp_path):
    """Captions that exist and would not be used are an error, in an imagefolder too."""
    folder = layouts.imagefolder(tmp_path)
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"text"', '"words"'), encoding="utf-8")
    (folder / "tiles" / f"{layouts.IDS[0]}.txt").write_text("a mole", encoding="utf-8")
    with pytest.raises(ValueError, match=f"tiles/{layouts.IDS[0]}.txt is a caption that the listing does not have"):
        isic.open_source(folder)


def test_an_id_is_a_name():
    """Composed, stripped, numbers as text; anything that could be a path, hide, or not be a file's name is refused with its place."""
    assert [tile_id(v, "x") for v in (" ISIC_1 ", 7, 7.0, "e\u0301", "two.dots", "späce nämé #1%20", "-1", "a..b")] == \
        ["ISIC_1", "7", "7", "\u00e9", "two.dots", "späce nämé #1%20", "-1", "a..b"]
    for value in ("../x", "/etc/passwd", "a/b", "a\\b", "..", ".", ".hidden", "C:x", "a\0b", "a\nb", "x" * 201, "é" * 101, "\ud800"):
        with pytest.raises(ValueError, match="row 3"):
            tile_id(value, "row 3")
    for value in (None, "", "nan", float("nan")):
        with pytest.raises(ValueError, match="row 3: no isic_id"):
            tile_id(value, "row 3")
