"""lesion.report.drop: a synthetic folder without its copies."""
import pytest

from lesion.report import drop
from lesion.run import files, sums


def test_drop_copies_leaves_a_set_without_them(tmp_path):
    """The filtered folder has every other tile, byte for byte, with its whole row; the old folder is as it was."""
    rows = [{"file_name": f"{i}.png", "label": "malignant", "seed": i, "extra": {"kept": True}} for i in range(4)]
    for row in rows:
        files.write_bytes(tmp_path / "old" / row["file_name"], b"tile" + row["file_name"].encode())
    files.write_manifest(tmp_path / "old", rows)
    assert drop.drop_copies(tmp_path / "old", ["1.png", "3.png"], tmp_path / "new") == 2
    assert files.read_manifest(tmp_path / "new") == [rows[0], rows[2]]
    assert sorted(p.name for p in (tmp_path / "new").glob("*.png")) == ["0.png", "2.png"]
    assert (tmp_path / "new" / "2.png").read_bytes() == b"tile2.png"
    assert files.read_json(tmp_path / "new" / "dropped.json")["copies"] == ["1.png", "3.png"]
    assert files.read_manifest(tmp_path / "old") == rows
    for names, said in ((["9.png"], "no tile"), ([r["file_name"] for r in rows], "nothing would")):
        with pytest.raises(ValueError, match=said):
            drop.drop_copies(tmp_path / "old", names, tmp_path / "third")


def test_dropping_again_replaces_only_its_own_work(tmp_path):
    """The same call works as often as it is given, other copies replace the earlier folder whole; a folder made from other
    tiles, or by anybody else, is refused and stays."""
    rows = [{"file_name": f"{i}.png"} for i in range(4)]
    for name in ("old", "other"):
        for row in rows:
            files.write_bytes(tmp_path / name / row["file_name"], b"tile")
        files.write_manifest(tmp_path / name, rows)
    for names in (["1.png"], ["1.png"], ["2.png", "3.png"]):
        drop.drop_copies(tmp_path / "old", names, tmp_path / "new")
        left = sorted(path.name for path in (tmp_path / "new").glob("*.png"))
        assert left == [row["file_name"] for row in rows if row["file_name"] not in names]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    for folder, out in (("other", "new"), ("old", "mine")):
        with pytest.raises(ValueError, match="was not made from"):
            drop.drop_copies(tmp_path / folder, [], tmp_path / out)
    assert sorted(path.name for path in (tmp_path / "new").glob("*.png")) == ["0.png", "1.png"]
    assert (tmp_path / "mine" / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert not list(tmp_path.glob(".*"))


def test_what_is_left_is_hashed(tmp_path):
    """SHA256SUMS lists every file of the new folder: a picture changed there is named to the next command."""
    rows = [{"file_name": f"{i}.png"} for i in range(3)]
    for row in rows:
        files.write_bytes(tmp_path / "old" / row["file_name"], b"tile")
    files.write_manifest(tmp_path / "old", rows)
    drop.drop_copies(tmp_path / "old", ["1.png"], tmp_path / "new")
    assert sorted(sums.read(tmp_path / "new")) == ["0.png", "2.png", "dropped.json", "metadata.jsonl"]
    files.write_bytes(tmp_path / "new" / "2.png", b"other")
    with pytest.raises(ValueError, match="2.png is not what was written"):
        sums.require(tmp_path / "new")
