"""The journal of answers: durable rows, bad lines reported and kept, threads and processes that never overwrite."""
import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from lesion.web import journal as journal_module
from lesion.web.journal import Journal, read_journal


def test_rows_come_back_in_order_after_reopening(tmp_path):
    """What was appended is what a second opening reads, text of any script included."""
    rows = [{"tile": "a", "answer": 1}, {"tile": "b", "note": "näevus \u2028 \n <b>"}, {"tile": "a", "answer": 6}]
    with Journal(tmp_path / "new" / "j.jsonl") as journal:
        for row in rows:
            journal.append(row)
    with Journal(tmp_path / "new" / "j.jsonl") as journal:
        assert journal.rows == rows
        assert journal.bad == []


def test_a_link_is_not_written_through(tmp_path):
    """What a link in somebody's folder leads to is not ours to write."""
    (tmp_path / "precious").write_text("", encoding="utf-8")
    (tmp_path / "j.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        Journal(tmp_path / "j.jsonl")


def test_a_row_is_synced_before_append_returns(tmp_path, monkeypatch):
    """fsync is called after the bytes are in the file and before the caller hears back."""
    seen = []
    real = os.fsync
    monkeypatch.setattr(journal_module.os, "fsync", lambda file: (seen.append(os.fstat(file).st_size), real(file)))
    with Journal(tmp_path / "j.jsonl") as journal:
        seen.clear()
        journal.append({"a": 1})
    assert seen == [len('{"a": 1}\n')]


def test_corrupt_lines_are_skipped_with_their_number_and_stay_in_the_file(tmp_path):
    """Hand edits, a list, bad UTF-8 and a cut line are reported by number; the other rows survive, no byte is lost."""
    path = tmp_path / "j.jsonl"
    good = [json.dumps({"n": i}).encode() for i in range(4)]
    path.write_bytes(b"\n".join([good[0], b'{"n": 1', good[1], b"[1, 2]", b"\xff\xfe", b"", good[2], good[3]]) + b"\n")
    before = path.read_bytes()
    with Journal(path) as journal:
        assert [row["n"] for row in journal.rows] == [0, 1, 2, 3]
        assert [number for number, _ in journal.bad] == [2, 4, 5]
        assert all("\n" not in reason for _, reason in journal.bad)
        journal.append({"n": 4})
    assert path.read_bytes() == before + b'{"n": 4}\n'


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_torn_last_line_costs_only_itself(tmp_path, cut):
    """A file cut at any byte of its last row keeps the earlier rows, and the next row starts on a line of its own."""
    path = tmp_path / "j.jsonl"
    path.write_bytes((b'{"a": 1}\n' + b'{"b": 2345}\n')[:9 + cut])
    with Journal(path) as journal:
        journal.append({"c": 3})
    rows, bad = read_journal(path)
    whole = cut == 11  # only the newline is gone: the row is complete
    assert rows == [{"a": 1}, *([{"b": 2345}] if whole else []), {"c": 3}]
    assert [number for number, _ in bad] == ([] if whole else [2])


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    """A write that stops half way raises, is taken back, and the next row is whole."""
    real = os.write

    def write_half(file, data):
        if len(data) > 10:
            return real(file, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(tmp_path / "j.jsonl") as journal:
        journal.append({"a": 1})
        monkeypatch.setattr(journal_module.os, "write", write_half)
        with pytest.raises(OSError, match="No space"):
            journal.append({"b": "x" * 8})
        monkeypatch.undo()
        journal.append({"c": 3})
        assert journal.rows == [{"a": 1}, {"c": 3}]
    assert read_journal(tmp_path / "j.jsonl") == ([{"a": 1}, {"c": 3}], [])


def test_nan_is_refused(tmp_path):
    """NaN is not JSON: ValueError, nothing written."""
    with Journal(tmp_path / "j.jsonl") as journal:
        with pytest.raises(ValueError):
            journal.append({"a": float("nan")})
        assert journal.rows == []
    assert (tmp_path / "j.jsonl").read_bytes() == b""


def test_threads_do_not_overwrite_each_other(tmp_path):
    """Eight threads of 25 rows each: 200 whole rows; a look-then-append under the lock lets only one of them win."""
    with Journal(tmp_path / "j.jsonl") as journal:
        def work(name):
            for number in range(25):
                journal.append({"by": name, "n": number})
            with journal.lock:
                if not any("winner" in row for row in journal.rows):
                    journal.append({"winner": name})
        threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    rows, bad = read_journal(tmp_path / "j.jsonl")
    assert not bad
    assert len(rows) == 201
    for name in range(8):
        assert [row["n"] for row in rows if row.get("by") == name] == list(range(25))


def test_a_second_process_is_refused_in_one_line(tmp_path):
    """A journal has one writer: another process gets a ValueError that says so until the first has closed."""
    path = tmp_path / "j.jsonl"
    code = f"from lesion.web.journal import Journal; Journal({str(path)!r}).append({{'x': 1}})"
    with Journal(path):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
        assert second.returncode == 1
        assert "is open in another process" in second.stderr.splitlines()[-1]
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert read_journal(path)[0] == [{"x": 1}]


def test_rows_that_make_no_sense_are_reported_like_corrupt_ones(tmp_path):
    """`check` names what is wrong with a hand-edited row; the row is skipped by number and stays in the file."""
    path = tmp_path / "j.jsonl"
    path.write_text('{"answer": 3}\n{"answer": 9}\n{"answer": 4}\n', encoding="utf-8")

    def check(row):
        if not 1 <= row["answer"] <= 6:
            raise ValueError(f"answer {row['answer']}: allowed are 1 to 6")

    with Journal(path, check) as journal:
        assert [row["answer"] for row in journal.rows] == [3, 4]
        assert journal.bad == [(2, "answer 9: allowed are 1 to 6")]
