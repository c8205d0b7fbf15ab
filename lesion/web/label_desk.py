"""One annotator's desk: the tiles in hand, what the page shows of one, and how an answer is taken.

lesion.web.label serves it, lesion.web.label_folder keeps the answers. Proven by tests/web/test_label.py.
"""
import io
import threading
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from PIL import Image

from lesion.describe.prompts import VOCABULARY, from_sentence, to_sentence
from lesion.tiles import colour, decode
from lesion.web import label_folder

FILTERS = ("all", "unlabelled", "flagged", "changed", "benign", "malignant")


@dataclass
class Desk:
    """An annotator, the tiles, the journal; `journal.lock` guards the labels."""
    folder: Path
    rows: list[dict]
    annotator: str
    journal: object
    labels: object = None
    dirty: threading.Event = field(default_factory=threading.Event)
    trouble: str = ""

    def __post_init__(self):
        self.labels = label_folder.Labels(self.journal.rows)
        self.numbers = {row["file_name"]: number for number, row in enumerate(self.rows)}
        self.norm, self.reference = decode.recorded_norm(self.folder)

    def write(self, row: dict) -> None:
        """On disk first, then in mind."""
        row = {"time": label_folder.now(), **row}
        self.journal.append(row)
        self.labels.add(row)
        self.dirty.set()

    def tile(self, number: int) -> label_folder.Tile:
        """What the annotator has said of tile `number`."""
        return self.labels.tile(self.rows[number]["file_name"])

    def members(self, chosen: str) -> list[int] | range:
        """Numbers of the tiles that a filter lets through, in order."""
        if chosen == "all":
            return range(len(self.rows))
        if chosen in ("benign", "malignant"):
            return [n for n, row in enumerate(self.rows) if row["label"] == chosen]
        if chosen == "unlabelled":
            return [n for n, row in enumerate(self.rows) if row["file_name"] not in self.labels.complete]
        return sorted(self.numbers[name] for name, tile in self.labels.tiles.items() if name in self.numbers
                      and (tile.flagged if chosen == "flagged" else "corrected" in tile.was.values()))

    def next_tile(self, chosen: str, after: int) -> int:
        """The next open tile of a filter, round the end; of flagged and changed ones simply the next; else `after`."""
        members = self.members(chosen)
        cut = bisect_right(members, after)
        for n in chain(members[cut:], members[:cut]):
            if chosen in ("flagged", "changed") or self.rows[n]["file_name"] not in self.labels.complete:
                return n
        return after

    def resume(self, chosen: str) -> int:
        """Where to go on: the tile of the last answer if it is not finished, else the next open one."""
        number = self.numbers.get(self.labels.last, -1)
        if number >= 0 and not self.tile(number).is_complete() and number in self.members(chosen):
            return number
        following = self.next_tile(chosen, number)
        return following if following >= 0 else len(self.rows) - 1


def state_of(desk: Desk, number: int, chosen: str = "all", active: str | None = None) -> dict:
    """What the page needs to show tile `number` and ask for `active` (the first open attribute by default)."""
    row, tile = desk.rows[number], desk.tile(number)
    suggested = label_folder.suggestions(row)
    proposed = label_folder.proposals(suggested, tile.answers)
    confidence = row.get("confidence") if isinstance(row.get("confidence"), dict) else {}
    questions = [{"name": name, "suggestion": proposed.get(name), "unsure": confidence.get(name, 1) < 0.5,
                  "answered": name in tile.answers, "value": tile.answers.get(name, proposed.get(name)),
                  "was": tile.was.get(name)} for name in VOCABULARY]
    members = desk.members(chosen)
    done = len(desk.labels.complete & desk.numbers.keys())
    before, behind = bisect_left(members, number), bisect_right(members, number)
    first_open = next((q["name"] for q in questions if not q["answered"]), questions[0]["name"])
    sentence = to_sentence(row["label"], label_folder.attributes_of(suggested, tile.answers))
    return {"tile": number, "name": str(row.get("isic_id") or Path(row["file_name"]).stem), "label": row["label"],
            "normalised": desk.norm if desk.norm != "none" else "", "questions": questions, "sentence": sentence,
            "active": active or first_open, "revision": tile.revision, "complete": tile.is_complete(),
            "flagged": tile.flagged, "comment": tile.comment,
            "total": len(desk.rows), "done": done, "seconds": desk.labels.seconds_per_tile(),
            "filter": chosen, "members": len(members), "inside": before < behind,
            "place": before + 1, "ahead": desk.next_tile(chosen, number),
            "previous": members[before - 1] if before else None, "next": members[behind] if behind < len(members) else None,
            "undo": desk.labels.history[-1]["id"] if desk.labels.history else None, "trouble": desk.trouble}


def take_answers(desk: Desk, number: int, form: dict, answers: dict, by: str) -> dict:
    """Put answers on disk; the state to show next. ValueError for what the vocabulary does not have."""
    label_folder.check_answers(answers)
    tile, row = desk.tile(number), desk.rows[number]
    suggested = label_folder.suggestions(row)
    if answers.get("color", "") is None:
        answers = answers | {"other_colors": None}
    known = tile.answers | answers
    beside = label_folder.proposals(suggested, known)
    color = known.get("color", beside.get("color"))
    if answers.get("other_colors") is not None and color in (None, *answers["other_colors"]):
        raise ValueError("other colours need a main colour first" if color is None else
                         f"{color} is the main colour already: choose others, or none")
    was = {name: "given" if name not in beside else "accepted" if value == beside[name] else "corrected"
           for name, value in answers.items()}
    before = tile.is_complete()
    desk.write({"event": "answer", "id": form["id"], "tile": row["file_name"], "answers": answers, "was": was, "by": by,
                "seconds": form.get("seconds") if isinstance(form.get("seconds"), int | float) else None})
    chosen, names = form["filter"], list(VOCABULARY)
    last = names.index([name for name in names if name in answers][-1])
    if form.get("stay") is True:
        return state_of(desk, number, chosen, names[last])
    if tile.is_complete() and not before:
        return state_of(desk, desk.next_tile(chosen, number), chosen)
    if tile.is_complete():
        return state_of(desk, number, chosen, names[min(last + 1, len(names) - 1)])
    following = [name for name in names[last + 1:] + names[:last + 1] if name not in tile.answers]
    return state_of(desk, number, chosen, following[0])


def answers_of(desk: Desk, number: int, form: dict) -> dict:
    """What a request answers: one attribute, every suggestion left, or the difference a sentence makes."""
    tile, row = desk.tile(number), desk.rows[number]
    if form.get("accept") is True:
        proposed = label_folder.proposals(label_folder.suggestions(row), tile.answers)
        left = {name: value for name, value in proposed.items() if name not in tile.answers}
        if not left:
            raise ValueError("no suggestion is left to accept here: answer with a number")
        return left
    if "text" not in form:
        return form.get("answers")
    label, said = from_sentence(form["text"])
    if label != row["label"]:
        raise ValueError(f"this tile is {row['label']} by its diagnosis: the sentence cannot make it {label}")
    shown = label_folder.attributes_of(label_folder.suggestions(row), tile.answers)
    dropped = {name: None for name in shown if name not in said}
    if not said | dropped:
        raise ValueError("the sentence says nothing about the tile yet")
    return {**dropped, **said}


def png(desk: Desk, number: int, normalised: bool) -> bytes:
    """A tile's picture as PNG at its own size: as it was taken, or as the networks see it. ValueError if unreadable."""
    path = (desk.folder / desk.rows[number]["file_name"]).resolve()
    if not path.is_relative_to(desk.folder.resolve()):
        raise ValueError("this picture is a link that leads out of the data set")
    image = decode.decode(path.read_bytes())
    if normalised:
        image = colour.normalise(decode.fill_borders(image), desk.norm, desk.reference)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
