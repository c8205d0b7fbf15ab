"""What people said about tiles, as files for other programs, and back: captions beside the pictures, a table of labels.

The table has one line a tile and annotator: `file_name, isic_id, label, annotator`, a column for each attribute, then
`flagged` and `comment`. An empty cell is "not answered", `none` an empty list, `cannot tell` is what it says; several
values are joined by "; ". Cells are disarmed by lesion.web.tables. Proven by tests/web/test_label_people.py.
"""
import csv
import io
import secrets
from pathlib import Path

from lesion.describe.prompts import VOCABULARY
from lesion.run import files
from lesion.run.cells import plain
from lesion.web import label_folder
from lesion.web.tables import write_table

COLUMNS = ("file_name", "isic_id", "label", "annotator", *VOCABULARY, "flagged", "comment")


def labels_csv(rows: list[dict], said: dict[str, label_folder.Labels]) -> str:
    """The table of what each of `said` {annotator: Labels} answered about the tiles of `rows`."""
    table = []
    for annotator, labels in said.items():
        for row in rows:
            tile = labels.tiles.get(row["file_name"]) or label_folder.Tile()
            cells = {name: "cannot tell" if value is None else "; ".join(value) or "none" if isinstance(value, list) else value
                     for name, value in tile.answers.items()}
            table.append({"file_name": row["file_name"], "isic_id": row.get("isic_id"), "label": row["label"],
                          "annotator": annotator, **cells, "flagged": "yes" if tile.flagged else "", "comment": tile.comment})
    return write_table(COLUMNS, table)


def read_labels_csv(path: Path, rows: list[dict], annotator: str, labels: label_folder.Labels) -> list[dict]:
    """The journal rows that make `annotator`'s labels what the table at `path` says; cells that say so already need none.

    Lines are matched to `rows` by `file_name`, else `isic_id`; lines of other annotators are left out, where the table
    has that column. ValueError, naming line and column, for an unknown tile, column or value: then nothing is to be kept.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8: save it as CSV in UTF-8") from None
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
        columns = [name.strip() for name in reader.fieldnames or ()]
        table = [(reader.line_num, cells) for cells in reader]
    except csv.Error as error:
        raise ValueError(f"{path} is not a readable csv file: {error}") from None
    if not {"file_name", "isic_id"} & set(columns):
        raise ValueError(f"{path}: no column file_name or isic_id: the first line must name the columns, "
                         f"{', '.join(COLUMNS)}")
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise ValueError(f"{path}: no column {unknown[0]!r} is known: allowed are {', '.join(COLUMNS)}")
    by_name = {row["file_name"]: row for row in rows}
    by_id = {str(row["isic_id"]): row for row in rows if row.get("isic_id")}
    events, seen = [], set()
    for line, cells in table:
        where = f"{path}, line {line}"
        cells = {name.strip(): plain((value or "").strip()) for name, value in cells.items() if isinstance(name, str)}
        if cells.get("annotator", annotator) not in (annotator, ""):
            continue
        row = by_name.get(cells.get("file_name")) or by_id.get(cells.get("isic_id"))
        if row is None:
            raise ValueError(f"{where}: no tile {cells.get('file_name') or cells.get('isic_id')!r} among the tiles chosen")
        if row["file_name"] in seen:
            raise ValueError(f"{where}: {row['file_name']} a second time")
        if cells.get("label") not in (None, "", row["label"]):
            raise ValueError(f"{where}: {row['file_name']} is {row['label']} by its diagnosis, not {cells['label']}")
        seen.add(row["file_name"])
        events += _events_of(cells, row, labels.tiles.get(row["file_name"]) or label_folder.Tile(), where)
    if not seen:
        raise ValueError(f"{path}: no line is {annotator}'s: give --annotator as the table has it, or take that column out")
    return events


def _delimiter(text: str) -> str:
    head = text.partition("\n")[0]
    return max(",;\t", key=head.count)


def _events_of(cells: dict, row: dict, tile: label_folder.Tile, where: str) -> list[dict]:
    answers = {}
    for name, attribute in VOCABULARY.items():
        cell = cells.get(name, "")
        if cell:
            value = None if cell == "cannot tell" else cell if not attribute.many else [] if cell == "none" else \
                [part.strip() for part in cell.split(";")]
            try:
                label_folder.check_answers({name: value})
            except ValueError as error:
                raise ValueError(f"{where}, {name}: {error}") from None
            if attribute.many and value:
                value = [each.name for each in attribute.values if each.name in value]
            answers[name] = value
    both = tile.answers | answers
    if both.get("other_colors") is not None and both.get("color") in (None, *both["other_colors"]):
        raise ValueError(f"{where}, other_colors: needs a main colour that it does not repeat")
    answers = {name: value for name, value in answers.items() if name not in tile.answers or tile.answers[name] != value}
    base = {"tile": row["file_name"]}
    events = []
    if answers:
        events.append({"event": "answer", **base, "answers": answers, "was": dict.fromkeys(answers, "imported"), "by": "csv"})
    flagged = cells.get("flagged", "").casefold()
    if flagged not in ("", "yes", "no", "true", "false", "1", "0"):
        raise ValueError(f"{where}, flagged: {flagged!r}, allowed are yes, no and nothing")
    if "flagged" in cells and (flagged in ("yes", "true", "1")) != tile.flagged:
        events.append({"event": "flag", **base, "flagged": not tile.flagged})
    comment = cells.get("comment", tile.comment)
    if len(comment) > label_folder.MAX_COMMENT:
        raise ValueError(f"{where}, comment: over {label_folder.MAX_COMMENT} characters")
    if comment != tile.comment:
        events.append({"event": "comment", **base, "text": comment})
    return [{"time": label_folder.now(), "id": secrets.token_hex(8), **event} for event in events]


def export_captions(folder: Path, rows: list[dict], out: Path | None = None) -> int:
    """Write each row's `text`, on one line, as a kohya sidecar, NAME.txt, in `out` or beside the picture; how many there are.

    ValueError if two pictures would share a sidecar, none has a text, or a picture's folder leads out of the data set.
    """
    texts = {}
    for row in rows:
        if row.get("text"):
            picture = Path(folder) / row["file_name"]
            if not out and not picture.parent.resolve().is_relative_to(Path(folder).resolve()):
                raise ValueError(f"{picture} leads out of the data set: give --export-captions a DIR to write into")
            path = (Path(out) / picture.name if out else picture).with_suffix(".txt")
            if path in texts:
                raise ValueError(f"{path} would be the caption of two pictures, {row['file_name']} and another: leave "
                                 "DIR out to write them beside the pictures")
            texts[path] = (" ".join(row["text"].split()) + "\n").encode()  # trainers read the first line
    if not texts:
        raise ValueError(f"{folder}: none of the {len(rows)} tiles has a text: label some first")
    for path, text in texts.items():
        if not path.exists() or path.read_bytes() != text:
            files.write_bytes(path, text)
    return len(texts)
