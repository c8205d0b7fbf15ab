"""What people say about tiles, on disk: one journal per annotator, and the manifest that follows the primary one's.

`DATA/labels/NAME.jsonl` holds every answer of NAME, appended and fsynced before the next tile shows
(lesion.web.journal); nothing else is needed to know what was said. `metadata.jsonl` takes the primary annotator's
answers: the first one who said something, or whoever `--primary` names, kept in `labels/primary.json`. Other
annotators' answers stay in their journals, for agreement. A row of the manifest that has an answer keeps what stood
there before under `suggested`, so that another annotator is shown the measured suggestions, never a colleague's answers,
and an undo restores it.

Journal rows: `event` and a random `id`, with `tile` (its file name):
    answer   `answers` {attribute: value, a list, or null for "cannot tell"},
             `was` {attribute: accepted, corrected (a suggestion was in view), given (none was), imported (from a table),
             agreed, adjudicated (lesion.web.label_adjudicate)}, `blind` true where suggestions were hidden
    undo     `undoes`, the id of an answer row
    flag     `flagged`, true or false
    comment  `text`
Proven by tests/web/test_label.py.
"""
import contextlib
import json
import os
import re
import secrets
import statistics
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from lesion.describe.prompts import NAMES, VOCABULARY, to_sentence, validate
from lesion.run import files, sums
from lesion.web.journal import read_journal

try:
    import fcntl
except ImportError:  # Windows: no lock between processes
    fcntl = None

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
LINK = "[A-Za-z0-9_-]{16,64}"
MAX_COMMENT = 1000  # characters
PAUSE_S = 300  # a longer gap between two tiles is a pause, not work


def check_annotator(name: str) -> str:
    """`name` if it can be a file's name everywhere; ValueError otherwise."""
    if not re.fullmatch(r"\w[\w.-]{0,39}", name) or name == "primary":
        raise ValueError(f"annotator {name[:60]!r}: allowed are 1 to 40 letters, digits, _ . and -, beginning with a "
                         "letter or digit, for example --annotator anna")
    return name


def journal_path(folder: Path, annotator: str) -> Path:
    """Where `annotator` has their journal; ValueError for a name that cannot be a file's."""
    return Path(folder) / "labels" / f"{check_annotator(annotator)}.jsonl"


def annotators(folder: Path) -> list[str]:
    """Names of everyone who has said something in `folder`; the ._ twins that macOS makes are nobody."""
    return sorted(path.stem for path in (Path(folder) / "labels").glob("[!.]*.jsonl") if path.stat().st_size)


def select(folder: Path, label: str = "all", split: str = "all") -> tuple[list[dict], list[str]]:
    """(rows of the tiles to label, in the manifest's order; one line for each thing that is amiss).

    ValueError if `folder` is no data set, has a row with another label, or no tile of `label` and `split`.
    """
    rows, notes = files.read_manifest(folder), []
    for number, row in enumerate(rows, 1):
        if row.get("label") not in ("benign", "malignant"):
            raise ValueError(f"{folder}/{files.MANIFEST}, row {number}: label {row.get('label')!r}, allowed are 'benign' "
                             "and 'malignant'")
    chosen = [row for row in rows if label in ("all", row["label"]) and split in ("all", row.get("split") or "train")]
    what = " ".join(word for word in (label, split) if word != "all") or "any"
    if not chosen:
        counts = {each: sum(row["label"] == each for row in rows) for each in ("benign", "malignant")}
        raise ValueError(f"{folder} has no {what} tile to label (it has {counts['benign']} benign and "
                         f"{counts['malignant']} malignant): choose another --label or --split")
    there, absent = [], []
    for row in chosen:
        (there if (Path(folder) / row["file_name"]).is_file() else absent).append(row)
    if absent:
        notes.append(f"{len(absent)} of {len(chosen)} tiles left out: no picture, the first is {absent[0]['file_name']}")
    if not there:
        raise ValueError(f"{folder}: none of the {len(chosen)} {what} tiles has its picture, the first is "
                         f"{chosen[0]['file_name']}: prepare the set again")
    listed = {row["file_name"] for row in rows}
    there_too = (path.relative_to(folder).as_posix() for path in (Path(folder) / "images").glob("*")
                 if path.suffix.lower() in PICTURES)
    stray = sorted(name for name in there_too if name not in listed)
    if stray:
        notes.append(f"{len(stray)} pictures left out: not in {files.MANIFEST}, the first is {stray[0]}")
    return there, notes


def suggestions(row: dict) -> dict:
    """What was known of a tile before anyone labelled it, as far as the vocabulary has it."""
    known = (row.get("suggested") or row).get("attributes") or {}
    found = {}
    for name in VOCABULARY:
        if isinstance(known, dict) and known.get(name) is not None:
            with contextlib.suppress(ValueError):
                found = validate(found | {name: known[name]})
    return found


def settle(values: dict) -> dict:
    """`values` with other colours that do not repeat the main one, and none without one."""
    others, color = values.get("other_colors"), values.get("color")
    if others and color in others:
        values = values | {"other_colors": [other for other in others if other != color]}
    if others is not None and "color" in values and color is None:
        values = values | {"other_colors": None}
    return values


def check_row(row: dict) -> None:
    """ValueError unless `row` is one of the journal's kinds (module docstring)."""
    kinds = {"answer": ("tile", "answers"), "undo": ("undoes",), "flag": ("tile", "flagged"),
             "comment": ("tile", "text")}
    kind = row.get("event")
    if not isinstance(kind, str) or kind not in kinds or not all(key in row for key in ("id", *kinds[kind])):
        raise ValueError("not a row of the labelling app")
    if not all(isinstance(row.get(key, ""), str) for key in ("id", "tile", "undoes", "text", "time")):
        raise ValueError("id, tile, undoes, text and time must be text")
    if kind == "answer":
        check_answers(row["answers"])
        was = row.get("was", {})
        if not isinstance(was, dict) or not all(isinstance(word, str) for word in was.values()):
            raise ValueError("was must be an object of attribute: word")


def check_answers(answers: object) -> None:
    """ValueError unless {attribute: value of the vocabulary, or null}."""
    if not isinstance(answers, dict) or not answers:
        raise ValueError("answers must be an object of attribute: value")
    for name, value in answers.items():
        beside = {}
        if name == "other_colors" and isinstance(value, list):  # any main colour that it does not repeat
            beside = {"color": next((color for color in NAMES["color"] if color not in value), "white")}
        validate({} if value is None and name in VOCABULARY else beside | {name: value})


# ------------------------------------------------------------------------------------ one annotator's answers

@dataclass
class Tile:
    """What one annotator has said of one tile."""
    rows: list[dict] = field(default_factory=list)  # the answer rows in force, oldest first
    answers: dict = field(default_factory=dict)     # attribute -> value, None for "cannot tell"
    was: dict = field(default_factory=dict)         # attribute -> accepted, corrected or given
    flagged: bool = False
    comment: str = ""
    revision: int = 0                               # events so far: a page that knows fewer is out of date

    def is_complete(self) -> bool:
        """Whether every attribute has an answer."""
        return len(self.answers) == len(VOCABULARY)


class Labels:
    """One annotator's answers: the journal's rows, replayed."""

    def __init__(self, rows: list[dict] = ()):
        self.tiles: dict[str, Tile] = {}
        self.history: list[dict] = []  # answer rows in force, over all tiles: what undo takes back, last first
        self.ids: set[str] = set()
        self.complete: set[str] = set()  # names of the tiles with every attribute answered
        self.times: list[datetime] = []  # when a tile became complete
        self.last: str | None = None     # the tile of the last answer or undo
        for row in rows:
            self.add(row)

    def tile(self, name: str) -> Tile:
        """What was said of the tile with this file name; an empty one where nothing was."""
        return self.tiles.setdefault(name, Tile())

    def add(self, row: dict) -> None:
        """Take one row of the journal into account."""
        self.ids.add(row["id"])
        if row["event"] == "undo":
            places = reversed(range(len(self.history)))
            place = next((n for n in places if self.history[n]["id"] == row["undoes"]), None)
            if place is None:
                return  # its answer was lost with a damaged line
            gone = self.history.pop(place)
            tile = self.tile(gone["tile"])
            tile.rows = [kept for kept in tile.rows if kept["id"] != gone["id"]]
            self.last = gone["tile"]
        else:
            tile = self.tile(row["tile"])
        tile.revision += 1
        if row["event"] == "flag":
            tile.flagged = bool(row["flagged"])
        elif row["event"] == "comment":
            tile.comment = row["text"]
        else:
            if row["event"] == "answer":
                self.history.append(row)
                tile.rows.append(row)
                self.last = row["tile"]
            self._merge(tile, self.last, row)

    def _merge(self, tile: Tile, name: str, row: dict) -> None:
        before = tile.is_complete()
        tile.answers, tile.was = {}, {}
        for each in tile.rows:
            tile.answers |= each["answers"]
            tile.was |= each.get("was", {})
        tile.answers = settle(tile.answers)
        if tile.is_complete():
            self.complete.add(name)
        else:
            self.complete.discard(name)
        if tile.is_complete() and not before:
            with contextlib.suppress(ValueError):
                self.times.append(datetime.fromisoformat(row.get("time", "")))

    def seconds_per_tile(self) -> float | None:
        """Median of the last 30 gaps between finished tiles, pauses left out; None before there are three."""
        gaps = [(b - a).total_seconds() for a, b in zip(self.times, self.times[1:]) if b.tzinfo and a.tzinfo]
        gaps = [gap for gap in gaps if 0 <= gap < PAUSE_S][-30:]
        return statistics.median(gaps) if len(gaps) >= 3 else None


def read_labels(folder: Path, annotator: str) -> Labels:
    """What `annotator` has said so far, from their journal on disk; damaged lines are left out."""
    return Labels(read_journal(journal_path(folder, annotator), check_row)[0])


def proposals(suggested: dict, answers: dict) -> dict:
    """The suggestions as they stand beside the answers: where another main colour was named, the other colours lose it,
    and gain the one it replaced; with "cannot tell" as the main colour there is no suggestion for the others."""
    out = dict(suggested)
    if "other_colors" in out:
        color, others = answers.get("color", suggested["color"]), suggested["other_colors"]
        if color in others:
            others = [name for name in NAMES["color"] if name != color and name in (*others, suggested["color"])]
        out["other_colors"] = others
        if color is None:
            del out["other_colors"]
    return out


def attributes_of(suggested: dict, answers: dict) -> dict:
    """The tile's attributes: answers where there are any, else the suggestions; "cannot tell" leaves one out."""
    values = settle(proposals(suggested, answers) | answers)
    known = {name: value for name, value in values.items() if value is not None}
    if "color" not in known:
        known.pop("other_colors", None)
    return validate(known)


# ------------------------------------------------------------------------------------ the manifest

def primary(folder: Path) -> str | None:
    """Whose answers the manifest takes, once that is settled; ValueError where `primary.json` does not say."""
    path = Path(folder) / "labels" / "primary.json"
    if not path.exists():
        return None
    name = files.read_json(path).get("primary")
    if not isinstance(name, str):
        raise ValueError(f"{path} is damaged: it does not say whose answers {files.MANIFEST} takes: say it with --primary NAME "
                         f"(there are {', '.join(annotators(folder)) or 'none'})")
    return check_annotator(name)


def set_primary(folder: Path, annotator: str) -> None:
    """From now on the manifest takes `annotator`'s answers."""
    files.write_json(Path(folder) / "labels" / "primary.json", {"primary": check_annotator(annotator)})


def first_annotator(folder: Path) -> str | None:
    """Whoever said something first; None before anyone has."""
    began = {}
    for name in annotators(folder):
        rows = read_journal(journal_path(folder, name), check_row)[0]
        if rows:
            began[name] = rows[0].get("time", "")
    return min(began, key=began.get) if began else None


def people(folder: Path, names: list[str]) -> tuple[str, dict[str, str]]:
    """(the set's secret, {name: personal link}): those there keep theirs in labels/links.json, others get one.

    The secret opens the page of progress where no token is given, and makes cookies. ValueError for a name twice.
    """
    with _locked(folder):
        return _people(folder, names)


def _people(folder, names):
    path = Path(folder) / "labels" / "links.json"
    known = files.read_json(path) if path.exists() else {"secret": secrets.token_urlsafe(24), "links": {}}
    there = known.get("links")
    if not isinstance(there, dict) or not all(isinstance(one, str) and re.fullmatch(LINK, one) for one in (
            known.get("secret"), *there.values())) or len(set(there.values())) < len(there):
        raise ValueError(f"{path} was edited: remove it to give everyone a new link")
    if twice := [name for number, name in enumerate(names) if name.casefold() in {n.casefold() for n in names[:number]}]:
        raise ValueError(f"two people named {twice[0]}: everyone needs a name of their own")
    links = {check_annotator(name): known["links"].get(name) or secrets.token_urlsafe(16) for name in names}
    after = known | {"links": known["links"] | links}
    if after != known or not path.exists():
        files.write_json(path, after)
        os.chmod(path, 0o600)  # the links are keys
    return known["secret"], links


def sync(folder: Path) -> bool:
    """Bring `metadata.jsonl` up to date with the primary annotator's journal; whether it had to be rewritten.

    Where nobody is primary yet, whoever said something first is from now on. One process at a time; all that others
    have written into the manifest meanwhile is kept. ValueError where the primary annotator's journal is lost.
    """
    if primary(folder) is None and not annotators(folder):
        return False  # and nothing is made
    with _locked(folder):
        name = primary(folder)
        if name is None:
            name = first_annotator(folder)
            if name is None:
                return False
            set_primary(folder, name)
        labels = read_labels(folder, name)
        before = files.read_manifest(folder)
        _check_journal(folder, name, labels, before)
        after = [labelled(row, labels.tiles.get(row["file_name"]), name) for row in before]
        if after == before:
            return False
        _write_manifest(folder, after)
        return True


def _check_journal(folder, name, labels, rows):
    """ValueError where `name` has said nothing, but has no journal while others have, or stands in the manifest: their
    answers would be taken out of it for a flipped bit or a lost file."""
    if labels.ids:
        return
    path, others = journal_path(folder, name), annotators(folder)
    if (others and not path.exists()) or any(row.get("annotator") == name for row in rows):
        raise ValueError(f"{files.MANIFEST} takes the answers of {name}, but {path} has none: restore that file, or say whose "
                         f"answers it takes with --primary NAME (there are {', '.join(others) or 'none'})")


def _write_manifest(folder, rows):
    """SHA256SUMS goes before the manifest: a kill between the two leaves a manifest that the next `sync` writes again."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with files.atomic_path(Path(folder) / files.MANIFEST) as temporary:
        temporary.write_bytes(data)
        sums.take_over(folder, {files.MANIFEST: files.sha256_bytes(data)})


def labelled(row: dict, tile: Tile | None, annotator: str) -> dict:
    """A manifest row with what `annotator` said of it; the row of before where nothing is said (any more)."""
    out = {key: value for key, value in row.items() if key not in ("suggested", "annotator", "flagged", "comment")}
    known = row.get("suggested") or row
    original = {key: known[key] for key in ("attributes", "text") if key in known}
    if "suggested" in row:
        out = {key: value for key, value in out.items() if key not in ("attributes", "text")} | original
    elif tile is None:
        return row
    if tile and tile.answers:
        attributes = attributes_of(suggestions(row), tile.answers)
        out |= {"text": to_sentence(row["label"], attributes), "attributes": attributes, "suggested": original,
                "annotator": annotator}
    if tile and tile.flagged:
        out["flagged"] = True
    if tile and tile.comment:
        out["comment"] = tile.comment
    return out


@contextlib.contextmanager
def _locked(folder: Path):
    """One process at a time changes the manifest, or who labels it."""
    path = Path(folder) / "labels" / "manifest.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def now() -> str:
    """The time for a row: UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
