"""Words for the rows of a data set: attributes measured or given, the sentence that says them, a sheet to look them
over.

Proven by tests/test_prepare.py.
"""
from pathlib import Path

import numpy as np
from PIL import Image

from lesion.describe.prompts import FIXED_PROMPT, to_sentence, validate
from lesion.run import cli, sheets
from lesion.tiles import decode


def describe(rows: list[dict], folder: Path, structured: bool, workers: int) -> None:
    """Give each row of `folder` its `text`, and with `structured` prompts its `attributes`, `measured` and
    `confidence`.

    A caption, or attributes, that came with the tile are kept; else what ISIC's metadata says goes before what pixels
    say. ValueError names the tile whose attributes or metadata cannot be used.
    """
    bare = [row for row in rows if not row["attributes"]]
    for row in rows:
        _naming(row, validate, row["attributes"])
    if structured and bare:
        from lesion.describe import attributes  # scikit-image: fixed prompts do without
        measures = attributes.measure_all([folder / row["file_name"] for row in bare], workers, cli.progress)
        quantiles = attributes.metadata_quantiles(row.get("metadata") or {} for row in rows)
        for row, measured in zip(bare, measures):
            row["attributes"], confidence = _naming(row, attributes.describe, measured, row.get("metadata"), quantiles)
            row["confidence"], row["measured"] = _rounded(confidence), _rounded(measured)
    for row in rows:
        if not row["text"]:
            row["text"] = to_sentence(row["label"], row["attributes"]) if structured else FIXED_PROMPT[row["label"]]


def _naming(row, function, *arguments):
    """`function`'s result; what it refuses is refused with the tile's name."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"{row['file_name']}: {error}") from None


def outline_sheet(rows: list[dict], folder: Path) -> None:
    """Write `folder`/attributes.png: up to 64 tiles of every class by turns, outlined as measured, for people to look
    over."""
    from lesion.describe import attributes
    by_label = [[row for row in rows if row["label"] == label] for label in sorted({row["label"] for row in rows})]
    some = [part[i] for part in by_label
            for i in np.linspace(0, len(part) - 1, min(len(part), 64 // len(by_label))).astype(int)]
    raw = [decode.decode((folder / row["file_name"]).read_bytes()) for row in some]
    shown = [Image.fromarray(attributes.outlined(image)).resize((256, 256)) for image in raw]
    sheets.save_png(folder / "attributes.png", sheets.contact_sheet(np.stack([np.asarray(image) for image in shown])))


def _rounded(value):
    """Floats to five significant digits, however nested."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
