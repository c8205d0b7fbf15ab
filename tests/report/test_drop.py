"""lesion.report.drop: a synthetic folder without its copies."""
import pytest

from lesion.report import drop
from lesion.run import files


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
    for names, said in (([], "not empty"), (["9.png"], "no tile"), ([r["file_name"] for r in rows], "nothing would")):
        with pytest.raises(ValueError, match=said):
            drop.drop_copies(tmp_path / "old", names, tmp_path / ("new" if not names else "third"))
