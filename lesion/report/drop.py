"""A synthetic set without the tiles that are copies of training tiles, as a folder that classify.py reads.

Which tiles those are lesion.stats.memorisation says. Proven by tests/report/test_drop.py.
"""
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from lesion.run import files, folders, sums


def drop_copies(folder: Path, names: Iterable[str], out: Path) -> int:
    """Make `out`, the synthetic folder without the tiles named (`file_name`): their rows of the manifest go and are
    listed in `dropped.json`, the other pictures are hard-linked (copied where links are impossible), all hashes are in
    SHA256SUMS. Returns how many are left.

    An `out` that was made from the same folder before is replaced as a whole. ValueError if `out` holds anything else, a
    name is not in the manifest, or nothing would be left.
    """
    folder, out, names = Path(folder), Path(out), set(names)
    rows = files.read_manifest(folder)
    unknown = sorted(names - {row["file_name"] for row in rows})
    if unknown:
        raise ValueError(f"{folder} has no tile {unknown[0]!r}")
    refuse_foreign(folder, out)
    kept = [row for row in rows if row["file_name"] not in names]
    if not kept:
        raise ValueError(f"all {len(rows)} tiles of {folder} are copies: nothing would be left")
    with folders.replaced(out) as new:
        for row in kept:
            target = new / row["file_name"]
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(folder / row["file_name"], target)
            except OSError:
                shutil.copyfile(folder / row["file_name"], target)
        if (folder / "provenance.json").is_file():  # which tiles the generator saw: classify.py asks for it
            shutil.copyfile(folder / "provenance.json", new / "provenance.json")
        files.write_json(new / "dropped.json", {"from": str(folder), "copies": sorted(names)})
        files.write_manifest(new, kept)
        sums.write(new)
    return len(kept)


def refuse_foreign(folder: Path, out: Path) -> None:
    """ValueError if `out` holds anything that was not made from `folder` by `drop_copies`."""
    note = out / "dropped.json"
    made = files.read_json(note).get("from") if note.is_file() else None
    origin = None if made is None else Path(files.check_text(made, f"{note}: from")).resolve()
    if out.exists() and any(out.iterdir()) and origin != folder.resolve():
        raise ValueError(f"{out} exists, is not empty and was not made from {folder}: give another folder for the tiles "
                         "without copies")
