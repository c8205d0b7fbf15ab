"""Files survive failures and kills in the middle of a write; journals and manifests name what is wrong with them."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lesion.run import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- atomic writes ---------------------------------------------------------------------------------------------------


def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path):
    """An exception while writing leaves the old bytes and no temporary file beside them."""
    path = tmp_path / "value.json"
    files.write_json(path, {"old": 1})
    temporaries = []

    def fail():
        with files.atomic_path(path) as temporary:
            temporary.write_bytes(b"half of the new")
            temporaries.append(temporary)
            raise RuntimeError("no more paper")

    with pytest.raises(RuntimeError, match="paper"):
        fail()
    assert temporaries[0].parent == path.parent  # rename is atomic only within a file system
    assert names(tmp_path) == ["value.json"]
    assert json.loads(path.read_text(encoding="utf-8")) == {"old": 1}


def test_a_failure_leaves_no_file_where_there_was_none(tmp_path):
    """Nor does a failed first write leave anything behind; a failed rename neither."""
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "new" / "value.json", {"unwritable": object()})
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        files.write_bytes(tmp_path / "taken", b"x")
    assert names(tmp_path) == ["taken"]
    assert names(tmp_path / "taken") == []


KILLED = """
import os, signal, sys
from lesion.run import files
with files.atomic_path(sys.argv[1]) as temporary:
    with open(temporary, "wb") as file:
        file.write(b"n" * 100_000)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""
ENV = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])}


def test_kill_in_mid_write_leaves_the_old_file(tmp_path):
    """kill -9 after half of the bytes: the old file is whole, and the next write succeeds beside the orphan."""
    path = tmp_path / "weights.bin"
    files.write_bytes(path, b"old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=ENV)
    assert killed.returncode == -9
    assert path.read_bytes() == b"old"
    files.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["weights.bin"]


def test_mode_follows_the_umask(tmp_path):
    """The file is as readable as an ordinary one: not the 0600 of the temporary file it was."""
    path = tmp_path / "shared.json"
    before = os.umask(0o027)
    try:
        files.write_json(path, [])
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_read_json(tmp_path):
    """A JSON object comes back; anything else is refused by the file's name."""
    path = tmp_path / "value.json"
    files.write_json(path, {"tone": "h\u00e9l\u00e4"})
    assert files.read_json(path) == {"tone": "h\u00e9l\u00e4"}
    for data in (b"", b'{"a": ', b"[1]", b'"\xff"'):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="value.json"):
            files.read_json(path)


# --- JSON lines ------------------------------------------------------------------------------------------------------


def test_append_after_a_torn_line(tmp_path):
    """A crash in mid-append costs the torn row only: reading drops it, appending replaces it, wherever it was torn."""
    path = tmp_path / "log.jsonl"
    files.append_jsonl(path, {"step": 1}, {"step": 2, "text": "naevus \u00e9\u2028 \n"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        read = files.read_jsonl(path)
        files.append_jsonl(path, {"step": 9})
        assert files.read_jsonl(path) == [*read, {"step": 9}]
        assert read == [{"step": 1}, {"step": 2, "text": "naevus \u00e9\u2028 \n"}][: len(read)]
        assert len(read) >= whole[:length].count(b"\n")


def test_rows_are_not_appended_through_a_link(tmp_path):
    """What a link in somebody's folder leads to is not ours to write."""
    (tmp_path / "precious").write_text("mine\n", encoding="utf-8")
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        files.append_jsonl(tmp_path / "rows.jsonl", {"a": 1})
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "mine\n"


def test_a_last_line_without_newline_is_kept(tmp_path):
    """An edited file whose last row is whole but unterminated loses nothing to reading or appending."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}', encoding="utf-8")
    files.append_jsonl(path, {"a": 3})
    assert files.read_jsonl(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"a": 1}\n{"a": \n{"a": 3}\n', "line 2"),
        ('{"a": 1}\n\n[1, 2]\n', "line 3: expected a JSON object, got list"),
        ('{"a": 1}\rnonsense\n{"a": 2}\n', "line 1"),
        ('{"a": 1}\nnonsense\n', "line 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, line):
    """A bad line that no crash explains is an error with file and line number, never skipped, nor what follows it."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(text.encode())
    with pytest.raises(ValueError, match=line) as error:
        files.read_jsonl(path)
    assert str(path) in str(error.value)


def test_line_endings_and_bytes(tmp_path):
    """Windows line ends and a byte-order mark are read; bytes that are not UTF-8 are named with their line."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert files.read_jsonl(path) == [{"a": 1}, {"a": 2}]
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2"):
        files.read_jsonl(path)


# --- manifest --------------------------------------------------------------------------------------------------------


def test_manifest_round_trip(tmp_path):
    """Rows come back as written, unknown keys and non-ASCII text included."""
    rows = [
        {
            "file_name": "images/ISIC_1.jpg",
            "text": "naïve \U0001f642",
            "attributes": {"size": "small"},
            "extra": [1, None],
        },
        {"file_name": "..hidden/a..b.png"},
    ]
    files.write_manifest(tmp_path, rows)
    assert files.read_manifest(tmp_path) == rows


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "is empty"),
        ([{"text": "x"}], "row 1: no `file_name`"),
        ([{"file_name": "a"}, {"file_name": 3}], "row 2: no `file_name`"),
        ([{"file_name": ""}], "no `file_name`"),
        ([{"file_name": "a"}, {"file_name": "a"}], "row 2: 'a' is listed twice"),
        ([{"file_name": "../a.png"}], "leads out"),
        ([{"file_name": "b/../../a.png"}], "leads out"),
        ([{"file_name": "/etc/passwd"}], "leads out"),
        ([{"file_name": "\\server\\a.png"}], "leads out"),
        ([{"file_name": "a", "suggested": "x"}], "row 1, a: suggested is of type str, expected an object"),
        ([{"file_name": "a", "suggested": {"attributes": "red"}}], "suggested: attributes is of type str"),
        ([{"file_name": "a", "suggested": {"text": 3}}], "suggested: text is of type int"),
    ],
)
def test_manifest_rules(tmp_path, rows, problem):
    """Each rule of the manifest is refused by file and row."""
    files.write_manifest(tmp_path, rows)
    with pytest.raises(ValueError, match=problem) as error:
        files.read_manifest(tmp_path)
    assert str(tmp_path / "metadata.jsonl") in str(error.value)


@pytest.mark.parametrize("missing", [None, float("nan"), "", "  ", "nan", "NaN", "NA", "None", "null"])
def test_what_is_missing_is_none(tmp_path, missing):
    """A hole in a known column is None however pandas wrote it; NaN, which is no JSON, in any column."""
    files.write_manifest(tmp_path, [{"file_name": "a", "text": missing, "patient_id": missing, "split": missing, "label": missing,
                                     "age": float("nan"), "site": "", "metadata": {"a": 1, "b": float("nan")}}])
    assert files.read_manifest(tmp_path) == [{"file_name": "a", "text": None, "patient_id": None, "split": None, "label": None,
                                              "age": None, "site": "", "metadata": {"a": 1}}]


def test_known_columns_have_their_types(tmp_path):
    """Ids are text, 7 and 7.0 one; paths have forward slashes and no ./; one file named in two ways is listed twice."""
    files.write_manifest(tmp_path, [{"file_name": "./t/a.jpg", "patient_id": 7}, {"file_name": "t\\b.jpg", "patient_id": 7.0}])
    assert files.read_manifest(tmp_path) == [{"file_name": "t/a.jpg", "patient_id": "7"}, {"file_name": "t/b.jpg", "patient_id": "7"}]
    files.write_manifest(tmp_path, [{"file_name": "./a"}, {"file_name": "a"}])
    with pytest.raises(ValueError, match="row 2: 'a' is listed twice"):
        files.read_manifest(tmp_path)


def test_a_manifest_cut_at_its_end_is_refused(tmp_path):
    """A log may lose the line of a crash; a manifest is written as a whole, and a torn row is a lost tile."""
    files.write_manifest(tmp_path, [{"file_name": "a"}, {"file_name": "b"}])
    path = tmp_path / "metadata.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    assert files.read_jsonl(path) == [{"file_name": "a"}]
    with pytest.raises(ValueError, match="metadata.jsonl, line 2: not JSON"):
        files.read_manifest(tmp_path)


def test_folder_without_manifest(tmp_path):
    """A folder that was never prepared is told how to be."""
    with pytest.raises(ValueError, match="python -m lesion prepare"):
        files.read_manifest(tmp_path)


# --- hashes ----------------------------------------------------------------------------------------------------------


def test_hashes(tmp_path):
    """Published SHA-256 values; JSON hashes see values and types, not the order of keys."""
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "abc") == files.sha256_bytes(b"abc") == abc
    assert files.sha256_json({"a": 1, "b": [2]}) == files.sha256_json({"b": [2], "a": 1})
    assert files.sha256_json({"a": 1}) != files.sha256_json({"a": "1"})
