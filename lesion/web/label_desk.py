"""One annotator's desk: the tiles in hand, what the page shows of one, and how an answer is taken.

A finished tile changes only where the page says that the person asked for it (`change`): by a step back, a click, an
edited sentence. A blind desk knows no suggestions: nothing it sends to the page tells one.
lesion.web.label_pages serves it, lesion.web.label_folder keeps the answers. Proven by tests/web/test_label.py.
"""
import io
import threading
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from lesion.describe.prompts import NAMES, VOCABULARY, from_sentence, to_sentence
from lesion.describe.segment import segment
from lesion.tiles import colour, decode
from lesion.web import label_folder

FILTERS = ("all", "unlabelled", "flagged", "changed", "unsure", "benign", "malignant")
ONWARD = ("all", "unlabelled", "unsure", "benign", "malignant")  # here finished tiles are passed over
UNSURE = 0.5  # a suggestion with a lower confidence is called unsure


def check_filter(chosen: object) -> str:
    """A filter's name, or ATTRIBUTE=VALUE of the vocabulary (also `none` of lists, and `cannot tell`)."""
    if not isinstance(chosen, str):
        raise ValueError(f"no filter {str(chosen)[:20]!r}: allowed are {', '.join(FILTERS)}, and attribute=value")
    name, _, value = chosen.partition("=")
    if chosen not in FILTERS and not (name in VOCABULARY and (
            value in (*NAMES[name], "cannot tell") or value == "none" and VOCABULARY[name].many)):
        raise ValueError(f"no filter {chosen[:40]!r}: allowed are {', '.join(FILTERS)}, and attribute=value")
    return chosen


@dataclass
class Desk:
    """An annotator, the tiles, the journal; `journal.lock` guards the labels."""
    folder: Path
    rows: list[dict]
    annotator: str
    journal: object
    blind: bool = False
    changed: threading.Event = field(default_factory=threading.Event)  # set by every answer: the manifest must follow
    trouble: str = ""                                                  # why it does not

    def __post_init__(self):
        self.labels = label_folder.Labels(self.journal.rows)
        self.numbers = {row["file_name"]: number for number, row in enumerate(self.rows)}
        self.norm, self.reference = decode.recorded_norm(self.folder)
        self._suggested = {}

    def write(self, row: dict) -> None:
        """On disk first, then in mind."""
        row = {"time": label_folder.now(), **row}
        self.journal.append(row)
        self.labels.add(row)
        self.changed.set()

    def tile(self, number: int) -> label_folder.Tile:
        """What the annotator has said of tile `number`."""
        return self.labels.tile(self.rows[number]["file_name"])

    def identity(self, number: int) -> str:
        """The id people know tile `number` by."""
        row = self.rows[number]
        return str(row.get("isic_id") or Path(row["file_name"]).stem)

    def done(self) -> int:
        """How many of the tiles in hand are finished."""
        return len(self.labels.complete & self.numbers.keys())

    def suggested(self, number: int) -> dict:
        """The suggestions for tile `number`; none at a blind desk."""
        if self.blind:
            return {}
        if number not in self._suggested:
            self._suggested[number] = label_folder.suggestions(self.rows[number])
        return self._suggested[number]

    def unsure(self, number: int, name: str) -> bool:
        """Whether the suggestion of an attribute has a low confidence."""
        confidence = self.rows[number].get("confidence")
        trust = confidence.get(name, 1) if isinstance(confidence, dict) and not self.blind else 1
        return isinstance(trust, int | float) and trust < UNSURE

    def members(self, chosen: str) -> list[int] | range:
        """Numbers of the tiles that a filter lets through, in order."""
        if chosen == "all":
            return range(len(self.rows))
        if chosen in ("benign", "malignant"):
            return [n for n, row in enumerate(self.rows) if row["label"] == chosen]
        if chosen == "unlabelled":
            return [n for n, row in enumerate(self.rows) if row["file_name"] not in self.labels.complete]
        if chosen == "unsure":
            return [n for n in range(len(self.rows)) if any(
                self.unsure(n, name) for name in self.suggested(n) if name not in self._said(n).answers)]
        if "=" in chosen:
            name, _, value = chosen.partition("=")
            return [n for n in range(len(self.rows)) if self._shows(n, name, value)]
        return sorted(self.numbers[name] for name, tile in self.labels.tiles.items() if name in self.numbers
                      and (tile.flagged if chosen == "flagged" else "corrected" in tile.was.values()))

    def _said(self, number: int) -> label_folder.Tile:
        return self.labels.tiles.get(self.rows[number]["file_name"]) or label_folder.Tile()

    def _shows(self, number: int, name: str, value: str) -> bool:
        answers = self._said(number).answers
        shown = answers[name] if name in answers else label_folder.proposals(self.suggested(number), answers).get(name, "")
        if shown is None:
            return value == "cannot tell"
        return value in shown or value == "none" and not shown if isinstance(shown, list) else shown == value

    def next_tile(self, chosen: str, after: int) -> int:
        """The next open tile of a filter, round the end; where a filter is for looking again simply the next; else `after`."""
        members = self.members(chosen)
        cut = bisect_right(members, after)
        for n in chain(members[cut:], members[:cut]):
            if chosen not in ONWARD or self.rows[n]["file_name"] not in self.labels.complete:
                return n
        return after

    def resume(self, chosen: str) -> int:
        """Where to go on: the tile of the last answer if it is not finished, else the next open one."""
        number = self.numbers.get(self.labels.last, -1)
        if number >= 0 and not self.tile(number).is_complete() and number in self.members(chosen):
            return number
        following = self.next_tile(chosen, number)
        return following if following >= 0 else len(self.rows) - 1

    def find(self, text: object, after: int = -1) -> int:
        """The number of the tile with this id or file name, else the next after `after` whose id, comment or sentence has
        the text in it. ValueError where none has."""
        if not isinstance(text, str) or not text.strip() or len(text) > 200:
            raise ValueError("search for 1 to 200 characters of an id, a comment or a sentence")
        wanted = text.strip().casefold()
        after = min(max(after, -1), len(self.rows) - 1)
        for number, row in enumerate(self.rows):
            if wanted in (self.identity(number).casefold(), row["file_name"].casefold(), Path(row["file_name"]).stem.casefold()):
                return number
        for number in chain(range(after + 1, len(self.rows)), range(after + 1)):
            said = self._said(number)
            texts = (self.identity(number), self.rows[number]["file_name"], said.comment, self.sentence(number))
            if any(wanted in each.casefold() for each in texts):
                return number
        raise ValueError(f"no tile here has {text.strip()[:60]!r} in its id, comment or sentence")

    def sentence(self, number: int) -> str:
        """The tile's sentence as far as this desk may know it."""
        attributes = label_folder.attributes_of(self.suggested(number), self._said(number).answers)
        return to_sentence(self.rows[number]["label"], attributes)


def state_of(desk: Desk, number: int, chosen: str = "all", active: str | None = None) -> dict:
    """What the page needs to show tile `number` and ask for `active` (the first open attribute by default)."""
    tile = desk.tile(number)
    proposed = label_folder.proposals(desk.suggested(number), tile.answers)
    questions = [{"name": name, "suggestion": proposed.get(name), "unsure": desk.unsure(number, name),
                  "answered": name in tile.answers, "value": tile.answers.get(name, proposed.get(name)),
                  "was": tile.was.get(name)} for name in VOCABULARY]
    members = desk.members(chosen)
    before, behind = bisect_left(members, number), bisect_right(members, number)
    first_open = next((q["name"] for q in questions if not q["answered"]), questions[0]["name"])
    return {"tile": number, "name": desk.identity(number), "label": desk.rows[number]["label"],
            "normalised": desk.norm if desk.norm != "none" else "", "questions": questions,
            "sentence": desk.sentence(number), "blind": desk.blind,
            "active": active or first_open, "revision": tile.revision, "complete": tile.is_complete(),
            "flagged": tile.flagged, "comment": tile.comment,
            "total": len(desk.rows), "done": desk.done(), "seconds": desk.labels.seconds_per_tile(),
            "filter": chosen, "members": len(members), "inside": before < behind,
            "place": before + 1, "ahead": desk.next_tile(chosen, number),
            "previous": members[before - 1] if before else None, "next": members[behind] if behind < len(members) else None,
            "undo": desk.labels.history[-1]["id"] if desk.labels.history else None, "trouble": desk.trouble}


def take_answers(desk: Desk, number: int, form: dict, answers: dict) -> dict:
    """Put answers on disk; the state to show next. ValueError for what the vocabulary does not have."""
    label_folder.check_answers(answers)
    tile = desk.tile(number)
    if answers.get("color", "") is None:
        answers = answers | {"other_colors": None}
    known = tile.answers | answers
    beside = label_folder.proposals(desk.suggested(number), known)
    color = known.get("color", beside.get("color"))
    if answers.get("other_colors") is not None and color in (None, *answers["other_colors"]):
        raise ValueError("other colours need a main colour first" if color is None else
                         f"{color} is the main colour already: choose others, or none")
    was = {name: "given" if name not in beside else "accepted" if value == beside[name] else "corrected"
           for name, value in answers.items()}
    before = tile.is_complete()
    desk.write({"event": "answer", "id": form["id"], "tile": desk.rows[number]["file_name"], "answers": answers, "was": was,
                "by": form.get("by"), "seconds": form.get("seconds"), **({"blind": True} if desk.blind else {})})
    chosen, names = form["filter"], list(VOCABULARY)
    last = names.index([name for name in names if name in answers][-1])
    if form.get("stay") or before:  # a change is shown where it was made; going on is a key of its own
        return state_of(desk, number, chosen, names[last])
    if tile.is_complete():
        return state_of(desk, desk.next_tile(chosen, number), chosen)
    following = [name for name in names[last + 1:] + names[:last + 1] if name not in tile.answers]
    return state_of(desk, number, chosen, following[0])


def answers_of(desk: Desk, number: int, form: dict) -> dict:
    """What a request answers: one attribute, every suggestion left, or the difference a sentence makes."""
    tile, row = desk.tile(number), desk.rows[number]
    if form.get("accept"):
        proposed = label_folder.proposals(desk.suggested(number), tile.answers)
        left = {name: value for name, value in proposed.items() if name not in tile.answers}
        if not left:
            raise ValueError("no suggestion is left to accept here: answer with a number")
        return left
    if "text" not in form:
        return form.get("answers")
    label, said = from_sentence(form["text"])
    if label != row["label"]:
        raise ValueError(f"this tile is {row['label']} by its diagnosis: the sentence cannot make it {label}")
    shown = label_folder.attributes_of(desk.suggested(number), tile.answers)
    dropped = {name: None for name in shown if name not in said}
    if not said | dropped:
        raise ValueError("the sentence says nothing about the tile yet")
    return {**dropped, **said}


def picture_of(desk: Desk, number: int) -> np.ndarray:
    """A tile decoded at its own size, uint8 [H,W,3]. ValueError if unreadable, or a link that leads out of the set."""
    path = (desk.folder / desk.rows[number]["file_name"]).resolve()
    if not path.is_relative_to(desk.folder.resolve()):
        raise ValueError("this picture is a link that leads out of the data set")
    return decode.decode(path.read_bytes())


def png(desk: Desk, number: int, normalised: bool) -> bytes:
    """A tile's picture as PNG at its own size: as it was taken, or as the networks see it."""
    image = picture_of(desk, number)
    if normalised:
        image = colour.normalise(decode.fill_borders(image), desk.norm, desk.reference)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def centre_of(desk: Desk, number: int) -> dict:
    """Where the lesion's measured centre lies, as shares of the tile's width and height; its middle where none is seen."""
    mask = segment(picture_of(desk, number)).mask
    if not mask.any():
        return {"x": 0.5, "y": 0.5, "found": False}
    y, x = ((indices.mean() + 0.5) / side for indices, side in zip(mask.nonzero(), mask.shape, strict=True))
    return {"x": round(float(x), 4), "y": round(float(y), 4), "found": True}
