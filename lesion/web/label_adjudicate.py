"""Adjudication: the attributes on which annotators disagree, their answers side by side, one key to decide.

A case is a tile and an attribute that at least two people answered, differently. The adjudicator's decisions are rows of
a journal of their own (`was`: adjudicated), beside the answers on which all agree (`was`: agreed), so that
`--primary` can give the manifest the settled answers like anybody's. Proven by tests/web/test_label_people.py.
"""
import secrets

from flask import Flask, Response, abort, render_template, request

from lesion.describe.prompts import NAMES, VOCABULARY
from lesion.web import label_folder
from lesion.web.label_desk import Desk, png


def in_words(value: object) -> str:
    """An answer as people read it."""
    return "cannot tell" if value is None else (", ".join(value) or "none") if isinstance(value, list) else value


class Bench:
    """The adjudicator's desk, and what the others said: {name: Labels}, live where they label on the same server."""

    def __init__(self, desk: Desk, said: dict[str, label_folder.Labels]):
        self.desk, self.said = desk, said

    def answers(self, number: int, attribute: str) -> dict[str, object]:
        """{name: answer} of everyone who answered."""
        file_name = self.desk.rows[number]["file_name"]
        tiles = {name: labels.tiles.get(file_name) for name, labels in list(self.said.items())}
        return {name: tile.answers[attribute] for name, tile in tiles.items() if tile and attribute in tile.answers}

    def cases(self) -> list[tuple[int, str]]:
        """(tile's number, attribute) of every disagreement, decided or not, in order."""
        return [(number, name) for number, name, values in self._asked_twice() if any(v != values[0] for v in values)]

    def _asked_twice(self):
        for number in range(len(self.desk.rows)):
            for name in VOCABULARY:
                values = list(self.answers(number, name).values())
                if len(values) > 1:
                    yield number, name, values

    def is_decided(self, case: tuple[int, str]) -> bool:
        """Whether the adjudicator has decided this case."""
        return self.desk.tile(case[0]).was.get(case[1]) == "adjudicated"

    def summary(self) -> dict:
        """How many disagreements there are, and how many are decided."""
        cases = self.cases()
        return {"cases": len(cases), "decided": sum(map(self.is_decided, cases))}

    def keep_agreed(self) -> int:
        """Take every answer on which all agree into the adjudicator's journal, a row a tile; how many rows are new."""
        agreed = {}
        for number, name, values in self._asked_twice():
            tile = self.desk.tile(number)
            if all(v == values[0] for v in values) and (name not in tile.answers or tile.answers[name] != values[0]) \
                    and tile.was.get(name) in (None, "agreed"):
                agreed.setdefault(number, {})[name] = values[0]
        for number, answers in agreed.items():
            self.desk.write({"event": "answer", "id": secrets.token_hex(8), "tile": self.desk.rows[number]["file_name"],
                             "answers": answers, "was": dict.fromkeys(answers, "agreed"), "by": "agreed"})
        return len(agreed)

    def state(self, at: int | None = None) -> dict:
        """What the page needs to show case `at`; the first open one by default, none where there are no cases."""
        cases = self.cases()
        opened = [n for n, case in enumerate(cases) if not self.is_decided(case)]
        summary = {"cases": len(cases), "decided": len(cases) - len(opened), "annotator": self.desk.annotator,
                   "undo": next((row["id"] for row in reversed(self.desk.labels.history) if row.get("by") == "adjudicate"), None)}
        if not cases or (at is None and not opened):
            return summary | {"at": None}
        at = opened[0] if at is None else min(max(at, 0), len(cases) - 1)
        number, name = cases[at]
        tile, attribute = self.desk.tile(number), VOCABULARY[name]
        people, options = self.answers(number, name), []
        for person, value in people.items():
            option = next((each for each in options if each["value"] == value), None)
            if option is None:
                option = {"value": value, "words": in_words(value), "people": []}
                options.append(option)
            option["people"].append(person)
        others = [] if attribute.many else [value for value in (*NAMES[name], None) if value not in people.values()]
        decided = self.is_decided(cases[at])
        return summary | {"at": at, "tile": number, "name": self.desk.identity(number), "label": self.desk.rows[number]["label"],
                          "attribute": name, "title": attribute.title, "help": attribute.help, "options": options,
                          "others": [{"value": value, "words": in_words(value)} for value in others],
                          "revision": tile.revision, "decided_now": decided,
                          "decision": tile.answers.get(name) if decided else None,
                          "normalised": self.desk.norm if self.desk.norm != "none" else "",
                          "following": next((n for n in (*opened, *opened) if n > at), opened[0] if opened else None)}

    def decide(self, form: dict) -> tuple[dict, int]:
        """Put a decision on disk; the next state, with 409 and `error` where another tab was quicker."""
        number, name, cases = form.get("tile"), form.get("attribute"), self.cases()
        if type(number) is not int or not isinstance(name, str) or (number, name) not in cases:
            raise ValueError("no such disagreement: reload the page")
        if "value" not in form or type(form.get("revision")) is not int:
            raise ValueError("a decision has a value and a revision")
        label_folder.check_answers({name: form["value"]})
        at = cases.index((number, name))
        if form["id"] in self.desk.labels.ids:
            return self.state(), 200
        if form["revision"] != self.desk.tile(number).revision:
            return self.state(at) | {"error": "this case was decided in another tab meanwhile; here is how it stands"}, 409
        self.desk.write({"event": "answer", "id": form["id"], "tile": self.desk.rows[number]["file_name"],
                         "answers": {name: form["value"]}, "was": {name: "adjudicated"}, "by": "adjudicate"})
        self.keep_agreed()
        return self.state(self.state(at).get("following")), 200

    def undo(self, form: dict) -> tuple[dict, int]:
        """Take the last decision back and show its case."""
        last = next((row for row in reversed(self.desk.labels.history) if row.get("by") == "adjudicate"), None)
        if form["id"] in self.desk.labels.ids:
            return self.state(), 200
        if last is None:
            raise ValueError("nothing to undo")
        if form.get("undo") != last["id"]:
            return self.state() | {"error": "another tab has decided meanwhile; here is how it stands"}, 409
        self.desk.write({"event": "undo", "id": form["id"], "undoes": last["id"]})
        case = (self.desk.numbers.get(last["tile"]), next(iter(last["answers"])))
        cases = self.cases()
        return self.state(cases.index(case) if case in cases else None), 200


def add_pages(app: Flask, bench: Bench) -> None:
    """`/adjudicate` and what its page asks for."""
    desk = bench.desk

    @app.get("/adjudicate")
    def adjudicate():
        with desk.journal.lock:
            return render_template("label_adjudicate.html", state=bench.state(), people=list(bench.said))

    @app.get("/adjudicate/state")
    def adjudicate_state():
        with desk.journal.lock:
            return bench.state(request.args.get("at", type=int))

    @app.get("/adjudicate/picture/<int:number>/<kind>.png")
    def adjudicate_picture(number, kind):
        if kind not in ("original", "normalised") or number >= len(desk.rows):
            abort(404, "no such picture")
        return Response(png(desk, number, kind == "normalised"), mimetype="image/png")

    @app.post("/adjudicate/<any(decide, undo):action>")
    def adjudicate_act(action):
        form = request.get_json()
        if not isinstance(form, dict) or not isinstance(form.get("id"), str) or not 8 <= len(form["id"]) <= 64:
            raise ValueError("a request is a JSON object with an id of 8 to 64 characters")
        with desk.journal.lock:
            return bench.decide(form) if action == "decide" else bench.undo(form)
