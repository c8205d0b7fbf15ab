"""csv tables as people save them: encodings, separators, spellings and holes are read with the right value, or refused
by line."""
import codecs
import time

import pytest

from lesion.tiles import split, tables
from lesion.tiles.source import Source, metadata, read_groups, read_labels

IDS = ("ISIC_0000001", "ISIC_0000002", "ISIC_0000003")
ROWS = [("ISIC_0000001", "1", "IP_1"), ("ISIC_0000002", "0", "IP_1"), ("ISIC_0000003", "0", "IP_2")]


def text(header="isic_id,target,patient_id", rows=ROWS, sep=",", end="\n"):
    return end.join([header.replace(",", sep), *(sep.join(row) for row in rows)]) + end


def read(tmp_path, data, label_map=None, ids=IDS):
    """(labels, patients, notes) of a table's bytes."""
    path = tmp_path / "t.csv"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    table = tables.file_table(path)
    source = Source("test", dict.fromkeys(ids), None, None, None, tables=[table])
    read_labels(table, source, label_map)
    read_groups(table, source)
    return source.labels, source.patients, source.notes + table.notes


RIGHT = {IDS[0]: "malignant", IDS[1]: "benign", IDS[2]: "benign"}, {IDS[0]: "IP_1", IDS[1]: "IP_1", IDS[2]: "IP_2"}


@pytest.mark.parametrize(("data", "said"), [
    (text(), None), (text(end="\r\n"), None), (text(end="\r"), None), (codecs.BOM_UTF8 + text().encode(), None),
    (text(sep=";"), "separated by semicolons"), (text(sep="\t"), "separated by tabs"), (text(sep="|"), "separated by "
                                                                                                       "bars"),
    ("sep=;\n" + text(sep=";"), "separated by semicolons"), (text().encode("utf-16"), "UTF-16"),
    (text().encode("utf-16-le"), "UTF-16"), (text().encode("utf-16-be"), "UTF-16"),
    (codecs.BOM_UTF16_BE + text(sep="\t").encode("utf-16-be"), "separated by tabs"),
    (text("isic_id,target,patient_id,place", [(*row, "Hôpital") for row in ROWS]).encode("latin-1"), "Latin-1"),
    (text("isic_id,target,patient_id,place", [(*row, "“Hôpital”") for row in ROWS]).encode("cp1252"), "Latin-1"),
    (text("ISIC_ID,Target,Patient_ID"), None), (text(" isic_id , target , patient_id "), None),
    (text("image_name,target,patient_id"), None), (text("image,target,patient_id"), None), (text("image_id,label,patient_id"), None),
    (text(rows=[(i + ".jpg", y, p) for i, y, p in ROWS]), None), (text(rows=[(f" {i}.JPEG ", y, p) for i, y, p in ROWS]), None),
    (text(rows=[(i, {"1": "True", "0": "False"}[y], p) for i, y, p in ROWS]), None),
    (text(rows=[(i, y + ".00", p) for i, y, p in ROWS]), None), (text(rows=[(i, f"{float(y):.6e}", p) for i, y, p in ROWS]), None),
    (text("isic_id,benign_malignant,patient_id", [(i, {"1": "Malignant", "0": "benign"}[y], p) for i, y, p in ROWS]), None),
    (text("isic_id,diagnosis_1,patient_id", [(i, {"1": "Malignant", "0": "Benign"}[y], p) for i, y, p in ROWS]), None),
    (text("isic_id,dx,patient_id", [(i, {"1": "bcc", "0": "nv"}[y], p) for i, y, p in ROWS]), "malignant are MEL, BCC, "
                                                                                              "SCC, AKIEC"),
    (text("isic_id,target,patient_id,dx,diagnosis_1", [(*row, "nv", "Malignant" if row[1] == "1" else "") for row in ROWS]), None),
    (text("image,MEL,NV,BCC,patient_id", [(i, "0.0", str(1 - int(y)), y, p) for i, y, p in ROWS]), "malignant are MEL, "
                                                                                                   "BCC; benign are "
                                                                                                   "NV"),
    (text(",isic_id,target,patient_id", [(str(k), *row) for k, row in enumerate(ROWS)]), None),
    (text("isic_id,target,patient_id,,", [(*row, "", "") for row in ROWS]), None),
    (text(rows=[*ROWS, ROWS[0]]), None), (text() + "\r\n,,\r\n", None), (text(rows=[(*row, "") for row in ROWS]), None),
    (text("isic_id,target,patient_id,note"), "fewer cells than its header"),
    (text(rows=[(f'"{i}"', y, f'"{p}"') for i, y, p in ROWS]), None)])
def test_one_table_in_every_dress(tmp_path, data, said):
    """The same labels and patients from each; what is unusual is said, what is not is not."""
    labels, patients, notes = read(tmp_path, data)
    assert (labels, patients) == RIGHT
    assert (said is None and notes == []) or any(said in note for note in notes)


@pytest.mark.parametrize("missing", ["", " ", "NA", "nan", "NaN", "None", "NULL", "n/a", "<NA>"])
def test_a_missing_patient_is_missing(tmp_path, missing):
    """However the hole is written, the tile has no patient, and no patient of that name appears."""
    _, patients, _ = read(tmp_path, text(rows=[ROWS[0], (IDS[1], "0", missing), (IDS[2], "0", missing)]))
    assert patients == {IDS[0]: "IP_1"}


def test_ids_written_as_numbers_are_the_same_ids(tmp_path):
    """A column with a hole turns 7 into 7.0: both are patient 7; 007 is another."""
    _, patients, _ = read(tmp_path, text(rows=[(IDS[0], "1", "7"), (IDS[1], "0", "7.0"), (IDS[2], "0", "007")]))
    assert patients == {IDS[0]: "7", IDS[1]: "7", IDS[2]: "007"}


def test_accents_composed_or_not_are_one_id(tmp_path):
    """macOS writes e and its accent apart in file names; the table's composed id is the same tile."""
    labels, _, _ = read(tmp_path, text(rows=[("e\u0301.jpg", "1", "a")]), ids=["\u00e9"])
    assert labels == {"\u00e9": "malignant"}


@pytest.mark.parametrize(("data", "message"), [
    (text(rows=[(IDS[0], "2", "a")]), "t.csv, line 2, ISIC_0000001: label '2' is not allowed: use 0 or benign, 1 or "
                                      "malignant$"),
    (text(rows=[(IDS[0], "melanoma", "a")]), "label 'melanoma' is not allowed: .* --label-map melanoma=malignant$"),
    (text(rows=[(IDS[0], "", "a")]), "label None is not allowed"), (text(rows=[("", "1", "a")]), "line 2: no isic_id"),
    (text(rows=[ROWS[0], (IDS[0], "0", "IP_1")]), "line 3: ISIC_0000001 is listed twice, as malignant and as benign"),
    (text("isic_id,target,benign_malignant", [(IDS[0], "1", "benign")]), "line 2, ISIC_0000001: target says malignant but "
                                                                         "benign_malignant says benign: correct one"),
    (text(rows=[(*ROWS[0], "x")]), "line 2: 4 columns, the header has 3"),
    (text("image,MEL,NV,BCC", [(IDS[0], "1", "1", "0")]), "line 2, ISIC_0000001: 2 of the columns MEL, NV, BCC are 1, "
                                                          "expected one"),
    (text("image,MEL,NV,BCC", [(IDS[0], "x", "1", "0")]), "line 2: 'x' is not a number"),
    (b"PK\3\4" + bytes(100), "is a spreadsheet, not a csv file: save it as CSV"),
    (b"isic_id,target\n" + b"x" * (1 << 20) + b"\n", "a line of over 1,048,576 characters"),
    (b'isic_id,target\n"' + b"x,\n" * 100_000, "field larger than field limit"), (b"", "no column isic_id: it has no "
                                                                                       "columns"),
    (text().encode("utf-16")[:-1], "not a readable csv file"),
    (("isic_id,target" + ",x" * 9_999 + "\n").encode(), "t.csv has 10,001 columns: a table of tiles has at most 10,000")])
def test_what_is_wrong_is_named(tmp_path, data, message):
    """One line with the file, the line and what to do; never a traceback or a guess."""
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, data)
    assert "\n" not in str(caught.value)


def test_a_label_map_speaks_first(tmp_path):
    """Words, diagnoses and one-hot columns mean what --label-map says, skip leaves a tile out."""
    rows = [(IDS[0], "melanoma", "a"), (IDS[1], "naevus", "a"), (IDS[2], "indeterminate", "b")]
    words = {"melanoma": "malignant", "naevus": "benign", "indeterminate": "skip"}
    assert read(tmp_path, text(rows=rows), words)[0] == {IDS[0]: "malignant", IDS[1]: "benign"}
    hot = text("image,MEL,AK,NV", [(IDS[0], "0", "1", "0"), (IDS[1], "0", "0", "1")])
    assert read(tmp_path, hot)[0][IDS[0]] == "benign"
    assert read(tmp_path, hot, {"ak": "malignant"})[0][IDS[0]] == "malignant"
    empty = text("isic_id,benign_malignant", [(IDS[0], "malignant"), (IDS[1], "")])
    assert read(tmp_path, empty)[0] == {IDS[0]: "malignant"}  # isic-cli's, of pictures without a diagnosis


def test_decimal_commas_are_numbers(tmp_path):
    """Excel's German csv: 2,7 between semicolons is 2.7; between commas nothing changes."""
    path = tmp_path / "t.csv"
    path.write_text(f"isic_id;target;clin_size_long_diam_mm\n{IDS[0]};1,0;2,7\n", encoding="utf-8")
    source = Source("test", {IDS[0]: 0}, None, None, None, tables=[tables.file_table(path)])
    assert metadata(source, [IDS[0]])[IDS[0]] == {"target": 1, "clin_size_long_diam_mm": 2.7}


def test_columns_are_found_in_one_look(tmp_path):
    """All of 8,000 columns are read: looking for each through all, for every table, took a second and grew by the square;
    of a name that stands twice the first is taken."""
    path, names = tmp_path / "t.csv", [f"c{k}" for k in range(8_000)]
    path.write_text(",".join(["isic_id", "c5", *names]) + f"\n{IDS[0]}" + ",7" + ",1" * 8_000 + "\n", encoding="utf-8")
    table = tables.file_table(path)
    start = time.process_time()
    (_, values), = tables.columns(table, ["isic_id", *names])
    assert time.process_time() - start < 0.2
    assert values[:8] == [IDS[0], "1", "1", "1", "1", "1", "7", "1"]


def test_captions_in_a_table_are_used(tmp_path):
    """A column text, caption or prompt beside the labels becomes the tile's text."""
    for name in ("text", "caption", "prompt"):
        path = tmp_path / f"{name}.csv"
        path.write_text(f"isic_id,target,{name}\n{IDS[0]},1,a mole\n", encoding="utf-8")
        source = Source("test", {IDS[0]: 0}, None, None, None)
        read_groups(tables.file_table(path), source)
        assert source.given == {IDS[0]: {"text": "a mole"}}


def test_a_split_file_in_another_dress(tmp_path):
    """A split with semicolons, ids with endings, and a row twice; two different places for one tile are refused."""
    path = tmp_path / "s.csv"
    path.write_text(f"image;split\n{IDS[0]}.jpg;train\n{IDS[0]};Training\n{IDS[1]};val\n", encoding="utf-8")
    assert split.by_file(tables.file_table(path))[0] == {IDS[0]: "train", IDS[1]: "val"}
    path.write_text(f"isic_id,split,patient_id\n{IDS[0]},train,a\n{IDS[0]},train,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 3: ISIC_0000001 is listed twice, with patients a and b"):
        split.by_file(tables.file_table(path))
