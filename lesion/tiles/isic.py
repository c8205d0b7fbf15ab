"""Which layout a source has, and its labels: the one way in for every reader of lesion tiles.

Layouts (ISIC 2024 / SLICE-3D, Kurtansky et al. 2024, doi:10.1038/s41597-024-03743-w, as archive and Kaggle publish it):
  the official zip (or several), read in place, or its folder however nested, with *_GroundTruth.csv beside it, and
  where present *_Supplement.csv and metadata.csv; the same zip at an http(s) URL;
  Kaggle's train-metadata.csv with train-image/image/*.jpg or train-image.hdf5;
  folders named benign and malignant (also under train, val, test; also kohya's "10_malignant"); a Hugging Face
  imagefolder (metadata.jsonl or .csv with file_name: a prepared data set is one); kohya captions (.txt, .caption)
  beside any loose tiles.
The readers: lesion/tiles/archives.py (zip, hdf5), loose.py (folders), remote.py (URL); what all share: source.py.
Proven by tests/tiles/test_isic.py.
"""
from collections.abc import Iterable
from pathlib import Path

from lesion.tiles import archives, loose
from lesion.tiles.source import Source, label_table_of, matched, read_groups, read_labels
from lesion.tiles.tables import Table, file_table

LABEL_TABLES = ("*GroundTruth*.csv", "train-metadata.csv")
MORE_TABLES = ("*Supplement*.csv", "metadata.csv")


def open_source(path: str | Path, ground_truth: str | Path | None = None, workers: int = 4) -> Source:
    """Recognise the layout at `path` (folder, zip, hdf5, csv, URL); read which tiles, labels, patients, lesions it has.

    `ground_truth`: the label csv, where it is not beside the tiles. Tiles without a label and labels without a tile are
    left out and counted in `notes`. `workers`: connections to a URL. ValueError says what is missing, wrong or twice.
    """
    if str(path).startswith(("http://", "https://")):
        from lesion.tiles import remote
        source, label_tables = remote.open_url(str(path), ground_truth, workers)
    else:
        source, label_tables = _open_local(Path(path), ground_truth)
    for table in label_tables:
        read_labels(table, source)
    for table in source.tables:
        read_groups(table, source)
    return matched(source)


def _open_local(path: Path, ground_truth) -> tuple[Source, list[Table]]:
    if not path.exists():
        raise ValueError(f"--source {path} does not exist: give the folder, zip, hdf5 file or URL of the tiles")
    if path.suffix.lower() == ".csv" and path.is_file():
        path, ground_truth = path.parent, ground_truth or path
    if path.is_dir() and (found := loose.listings(path)):
        return loose.imagefolder(path, found), []
    folder = path if path.is_dir() else path.parent
    source, names = _tiles(path, folder)
    labels = [file_table(ground_truth, "--ground-truth")] if ground_truth else _tables(folder, LABEL_TABLES)
    if len(labels) > 1:  # several releases may share a folder: only their own labels belong to the tiles
        labels = [t for t in labels if t.name.lower() in names] or labels
    if not labels and not source.labels:
        raise ValueError(f"{path}: no labels found: expected *_GroundTruth.csv or train-metadata.csv beside the tiles, "
                         "folders named benign and malignant, or --ground-truth CSV")
    source.tables = labels + _tables(folder, MORE_TABLES) + source.tables
    return source, labels


def _tiles(path: Path, folder: Path) -> tuple[Source, set[str]]:
    """The tiles at `path`, and the names their label tables would have."""
    suffix = path.suffix.lower() if path.is_file() else ""
    if suffix in (".hdf5", ".h5"):
        return archives.hdf5(path), {"train-metadata.csv"}
    if suffix not in ("", ".zip"):
        raise ValueError(f"--source {path} is not a folder, .zip, .hdf5 or .csv file")
    zips = [path] if suffix else sorted(folder.glob("*.zip"), key=lambda p: ("Permissive" not in p.name, p.name))
    if zips:
        return archives.zips(zips), {label_table_of(p.name).lower() for p in zips}
    if (folder / "train-image.hdf5").is_file() and not (folder / "train-image").is_dir():
        return archives.hdf5(folder / "train-image.hdf5"), {"train-metadata.csv"}
    return loose.folder(folder), set()


def _tables(folder: Path, patterns: Iterable[str]) -> list[Table]:
    """csv tables in `folder` and one level below (the archive's doubly nested folder)."""
    found = [p for pattern in patterns for p in sorted([*folder.glob(pattern), *folder.glob("*/" + pattern)])]
    return [file_table(p) for p in found]
