"""Which layout a source has, and its labels: the one way in for every reader of lesion tiles.

Layouts (ISIC 2024 / SLICE-3D, Kurtansky et al. 2024, doi:10.1038/s41597-024-03743-w, as archive and Kaggle publish it):
  the official zip (or several), read in place, or its folder however nested, with *_GroundTruth.csv beside it, and
  where present *_Supplement.csv and metadata.csv; the same zip at an http(s) URL;
  Kaggle's train-metadata.csv with train-image/image/*.jpg or train-image.hdf5, also as its competition's one zip;
  any tiles with a table of ids and labels (isic-cli, ISIC 2018 to 2020, HAM10000);
  folders named benign and malignant (also under train, val, test; also kohya's "10_malignant"); a Hugging Face
  imagefolder (metadata.jsonl or .csv with file_name: a prepared data set is one); kohya captions (.txt, .caption)
  beside any loose tiles.
The readers: lesion/tiles/archives.py (zip, hdf5), loose.py (folders), remote.py (URL); what all share: names.py (what
file names say), tables.py (csv), source.py. Proven by tests/tiles/test_isic.py.
"""
import re
import shlex
from pathlib import Path

from lesion.tiles import archives, hdf5, loose
from lesion.tiles.source import SUFFIXES, Source, label_table_of, matched, read_groups, read_labels
from lesion.tiles.tables import LABEL_COLUMNS, Table, file_table, header_of

LABEL_TABLE = re.compile(r"GroundTruth.*\.csv$|^train-metadata\.csv$")
MORE_TABLE = re.compile(r"Supplement.*\.csv$|LesionGroupings\.csv$|^metadata\.csv$|_metadata\.csv$", re.IGNORECASE)
ELSEWHERE = re.compile(r"^sample_submission|^test[-_.]|split", re.IGNORECASE)  # tables of other tiles, or no labels


def open_source(path: str | Path, ground_truth: str | Path | None = None, workers: int = 4,
                label_map: dict[str, str] | None = None) -> Source:
    """Recognise the layout at `path` (folder, zip, hdf5, csv, URL); read which tiles, labels, patients, lesions it has.

    `ground_truth`: the label csv, where it is not beside the tiles. `label_map`: what else stands for a label, a
    folder's name, a word or a diagnosis (small letters) -> benign, malignant or skip. Tiles without a label and labels
    without a tile are left out and counted in `notes`, files passed over in `skipped`. `workers`: connections to a URL.
    ValueError says what is missing, wrong or twice.
    """
    if _is_url(path):
        from lesion.tiles import remote
        source = remote.open_url(str(path), workers, label_map)
        labels, more, absent = remote.tables_beside(str(path), bool(ground_truth))
    else:
        path = Path(path)
        if not path.exists():
            raise ValueError(f"--source {path} does not exist: give the folder, zip, hdf5 file or URL of the tiles")
        if path.suffix.lower() == ".csv" and path.is_file():
            path, ground_truth = path.parent, ground_truth or path
        if path.is_dir() and (found := loose.listings(path)):
            return matched(loose.imagefolder(path, found, label_map))
        folder, absent = path if path.is_dir() else path.parent, ""
        source, names = _tiles(path, folder, label_map)
        labels, more = _tables_beside(folder, names, source, bool(ground_truth))
    if ground_truth:
        from lesion.tiles import remote
        labels = [remote.table_at(str(ground_truth)) if _is_url(ground_truth) else
                  file_table(ground_truth, "--ground-truth")]
    inside = source.tables
    labels = labels or [table for table in inside if LABEL_TABLE.search(_base(table))] or \
        ([] if source.labels else [table for table in inside if _has_labels(table)])
    if not labels and not source.labels:
        others = " ".join(shlex.quote(f"{name}=malignant") for name in list(source.unlabelled)[:2])
        raise ValueError(f"{path}: no labels found: expected *_GroundTruth.csv or train-metadata.csv beside the tiles, "
                         f"folders named benign and malignant, or --ground-truth CSV{absent and f' ({absent})'}"
                         + (f"; what else folders mean is said by --label-map, such as {others}" if others else ""))
    more += [table for table in inside if MORE_TABLE.search(_base(table)) and table not in labels]
    source.tables = [*labels, *more]
    for table in labels:
        read_labels(table, source, label_map)
    for table in source.tables:
        read_groups(table, source)
        source.notes += table.notes
    return matched(source)


def _is_url(path: str | Path) -> bool:
    return str(path).startswith(("http://", "https://"))


def _base(table: Table) -> str:
    return table.name.replace("\\", "/").rpartition("/")[2]


def _tiles(path: Path, folder: Path, label_map: dict[str, str] | None) -> tuple[Source, set[str]]:
    """The tiles at `path`, and the names their label tables would have."""
    suffix = path.suffix.lower() if path.is_file() else ""
    if suffix in (".hdf5", ".h5"):
        return hdf5.source(path), {"train-metadata.csv"}
    if suffix not in ("", ".zip"):
        raise ValueError(f"--source {path} is not a folder, .zip, .hdf5 or .csv file")
    zips = [path] if suffix else sorted((p for p in folder.glob("*.zip") if not p.name.startswith(".")),
                                        key=lambda p: ("Permissive" not in p.name, p.name))
    if zips:
        source = archives.zips(zips, label_map)
        if not suffix and (beside := sum(Path(name).suffix.lower() in SUFFIXES for name in loose.walk(folder)[0]
                                         if not Path(name).name.startswith("."))):
            source.skipped["loose tiles beside the zip"] += beside
        return source, {label_table_of(p.name).lower() for p in zips}
    if (folder / "train-image.hdf5").is_file() and not (folder / "train-image").is_dir():
        return hdf5.source(folder / "train-image.hdf5"), {"train-metadata.csv"}
    return loose.folder(folder, label_map), set()


def _tables_beside(folder: Path, names: set[str], source: Source,
                   labels_given: bool) -> tuple[list[Table], list[Table]]:
    """(label tables, other tables) in `folder` and one level below (the archive's doubly nested folder).

    Labels: tables of the official names; where neither these nor the tiles' folders say any, whatever table has a
    column of ids and one of labels.
    """
    paths = [p for p in sorted([*folder.glob("*.csv"), *folder.glob("*/*.csv")]) if not p.name.startswith(".")]
    named = [p for p in paths if LABEL_TABLE.search(p.name)]
    if len(named) > 1:  # several releases may share a folder: only their own labels belong to the tiles
        named = [p for p in named if p.name.lower() in names] or named
    labels = {p: file_table(p) for p in named}
    known = labels or labels_given or source.labels or any(LABEL_TABLE.search(_base(t)) for t in source.tables)
    if not known:
        labels = {p: table for p in paths if not ELSEWHERE.search(p.name) and _has_labels(table := file_table(p))}
    more = [p for p in sorted(paths, key=_order) if MORE_TABLE.search(p.name) and p not in labels]
    return list(labels.values()), [file_table(p) for p in more]


def _order(path: Path) -> tuple:
    return "supplement" not in path.name.lower(), len(path.parts), path


def _has_labels(table: Table) -> bool:
    try:
        names = header_of(table)
    except ValueError:
        return False
    return "isic_id" in names and any(name in names for name in LABEL_COLUMNS)
