"""What people said about tiles, as files for other programs: captions beside the pictures.

Proven by tests/web/test_label.py.
"""
from pathlib import Path

from lesion.run import files


def export_captions(folder: Path, rows: list[dict], out: Path | None = None) -> int:
    """Write each row's `text` as a kohya sidecar, NAME.txt, in `out` or beside the picture; how many there are.

    ValueError if two pictures would share a sidecar, or none has a text.
    """
    texts = {}
    for row in rows:
        if row.get("text"):
            picture = Path(folder) / row["file_name"]
            path = (Path(out) / picture.name if out else picture).with_suffix(".txt")
            if path in texts:
                raise ValueError(f"{path} would be the caption of two pictures, {row['file_name']} and another: leave "
                                 "DIR out to write them beside the pictures")
            texts[path] = (row["text"] + "\n").encode()
    if not texts:
        raise ValueError(f"{folder}: none of the {len(rows)} tiles has a text: label some first")
    for path, text in texts.items():
        if not path.exists() or path.read_bytes() != text:
            files.write_bytes(path, text)
    return len(texts)
