"""The labelling app's pages: one person's desk at `/`, or everybody's at a personal link, with a page of progress.

A page says which revision of a tile it has seen, so that of two tabs the later one is told and overwrites nothing; each
request has an id of its own, so that one sent again after a lost reply counts once; the types of all that a request
holds are checked before anything is written. lesion.web.label_desk takes the answers.
Proven by tests/web/test_label.py, tests/web/test_label_people.py and tests/browser/test_label_browser.py.
"""
import math
import re
from pathlib import Path

from flask import Flask, Response, abort, redirect, render_template, request, url_for

from lesion.describe.prompts import VOCABULARY
from lesion.web import label_adjudicate, label_export, server
from lesion.web.label_desk import FILTERS, Desk, answers_of, centre_of, check_filter, png, state_of, take_answers
from lesion.web.label_folder import MAX_COMMENT

SWATCHES = {  # sRGB: skin in the middle of each group's range of ITA, and a lesion's colours as `color_names` has them
    "skin_tone": {"very light": "#d1b39f", "light": "#c6a18a", "intermediate": "#b99278", "tan": "#a98066",
                  "brown": "#8b654c", "dark": "#634838"},
    "color": {"white": "#e7dad3", "red": "#b45552", "light brown": "#b2815b", "dark brown": "#65402f",
              "blue-grey": "#495663", "black": "#231e1d"}}
SWATCHES["other_colors"] = SWATCHES["color"]
KINDS = {"id": str, "filter": str, "active": str, "by": str, "text": str, "comment": str, "undo": str, "revision": int,
         "stay": bool, "accept": bool, "change": bool, "flagged": bool, "answers": dict}
NEEDS = {"answer": ("revision",), "undo": ("undo",), "flag": ("revision", "flagged"), "comment": ("revision", "comment")}
WAYS = ("key", "button", "sentence", "accept", "swipe")


def check_form(form: object, needs: tuple[str, ...] = ()) -> dict:
    """A request's JSON, every value of the type that it must have; ValueError naming the first that is not."""
    if not isinstance(form, dict) or not isinstance(form.get("id"), str) or not 8 <= len(form["id"]) <= 64:
        raise ValueError("a request is a JSON object with an id of 8 to 64 characters")
    for name, kind in KINDS.items():
        if (name in form or name in needs) and type(form.get(name)) is not kind:
            words = {str: "text", int: "a whole number", bool: "true or false", dict: "an object of attribute: value"}[kind]
            raise ValueError(f"{name} must be {words}, got {str(form.get(name))[:20]!r}")
    seconds = form.get("seconds")
    if seconds is not None and not (type(seconds) in (int, float) and math.isfinite(seconds) and 0 <= seconds < 1e7):
        raise ValueError(f"seconds {str(seconds)[:20]!r}: allowed are numbers of at least 0")
    if form.get("by") is not None and form["by"] not in WAYS:
        raise ValueError(f"by {form['by'][:20]!r}: allowed are {', '.join(WAYS)}")
    if len(form.get("comment", "")) > MAX_COMMENT:
        raise ValueError(f"a comment is text of at most {MAX_COMMENT} characters")
    return form | {"filter": check_filter(form.get("filter", "all"))}


def create_app(folder: Path, desks: dict[str, Desk], token: str | None = None, host: str = "127.0.0.1", names: tuple = (),
               secret: str | None = None, bench: label_adjudicate.Bench | None = None) -> Flask:
    """The Flask app. desks: {"": desk} for one person, whose page is `/` and needs `token` where there is one; otherwise
    {link: desk}, each open to who has the link, with `/progress` behind the token. bench: adds `/adjudicate`, behind the
    token. names, secret: as lesion.web.server.create_app takes them."""
    app = server.create_app(__name__, token, host, names, secret)
    alone = desks.keys() <= {""}
    if desks:
        _desk_pages(app, desks, "" if alone else "/p/<link>", (lambda view: view) if alone else server.public)
    if not alone:
        _progress_pages(app, folder, desks, bench)
    if bench is not None:
        label_adjudicate.add_pages(app, bench)
        if not desks:
            app.get("/")(lambda: redirect(url_for("adjudicate")))
    return app


def _desk_pages(app: Flask, desks: dict[str, Desk], prefix: str, opened) -> None:
    def find(link: str) -> Desk:
        if link not in desks:
            server.refuse_link()
        return desks[link]

    def number_of(desk: Desk, value: object) -> int:
        text = str(value) if type(value) in (int, str) else ""
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) >= len(desk.rows):
            raise ValueError(f"no tile {str(value)[:20]!r}: allowed are 0 to {len(desk.rows) - 1}")
        return int(text)

    @app.get(prefix + "/")
    @opened
    def page(link=""):
        desk = find(link)
        chosen = check_filter(request.args.get("filter", "all"))
        with desk.journal.lock:
            if not desk.members(chosen):
                chosen = "all"
            number = desk.find(request.args["tile"]) if "tile" in request.args else desk.resume(chosen)
            state = state_of(desk, number, chosen)
        labels = {row["label"] for row in desk.rows}
        filters = [name for name in FILTERS if name not in ("benign", "malignant") or len(labels) == 2]
        if desk.blind:
            filters = [name for name in filters if name not in ("unsure", "changed")]
        return render_template("label.html", state=state, vocabulary=vocabulary(), filters=filters,
                               annotator=desk.annotator)

    @app.get(prefix + "/state")
    @opened
    def state(link=""):
        desk = find(link)
        chosen = check_filter(request.args.get("filter", "all"))
        with desk.journal.lock:
            members = desk.members(chosen)
            if "find" in request.args:
                return state_of(desk, desk.find(request.args["find"], request.args.get("after", -1, type=int)), chosen)
            if not members:
                raise ValueError(f"no tile is {chosen.replace('=', ': ')} at the moment")
            if "tile" in request.args:
                number = number_of(desk, request.args["tile"])
            else:
                number = desk.resume(chosen) if chosen in ("all", "unlabelled", "benign", "malignant") else members[0]
            return state_of(desk, number, chosen)

    @app.get(prefix + "/picture/<int:number>/<kind>.png")
    @opened
    def picture(number, kind, link=""):
        desk = find(link)
        if kind not in ("original", "normalised") or number >= len(desk.rows):
            abort(404, "no such picture")
        data = png(desk, number, kind == "normalised")
        return Response(data, mimetype="image/png", headers={"Cache-Control": "private, max-age=60"})

    @app.get(prefix + "/centre/<int:number>")
    @opened
    def centre(number, link=""):
        desk = find(link)
        return centre_of(desk, number_of(desk, number))

    @app.get(prefix + "/labels.csv")
    @opened
    def labels_csv(link=""):
        desk = find(link)
        with desk.journal.lock:
            text = label_export.labels_csv(desk.rows, {desk.annotator: desk.labels})
        return _csv(text, f"labels-{desk.annotator}.csv")

    @app.post(prefix + "/<any(answer, undo, flag, comment):action>")
    @opened
    def act(action, link=""):
        desk = find(link)
        form = check_form(request.get_json(), NEEDS[action])
        with desk.journal.lock:
            number = number_of(desk, form.get("tile"))
            if form["id"] in desk.labels.ids:  # sent again, as the reply was lost
                again = number
                if action == "undo":
                    again = desk.numbers.get(desk.labels.last, number)
                elif action == "answer" and not form.get("stay") and not form.get("change") and desk.tile(number).is_complete():
                    again = desk.next_tile(form["filter"], number)
                return state_of(desk, again, form["filter"])
            return {"answer": _answer, "undo": _undo, "flag": _remark, "comment": _remark}[action](desk, number, form)


def _refuse(desk: Desk, number: int, form: dict, reason: str) -> tuple[dict, int]:
    return state_of(desk, number, form["filter"]) | {"error": reason}, 409


def _answer(desk: Desk, number: int, form: dict):
    tile = desk.tile(number)
    if form["revision"] != tile.revision:
        return _refuse(desk, number, form, "this tile was changed in another tab meanwhile; here is how it stands")
    if tile.is_complete() and not form.get("change"):
        return _refuse(desk, number, form, "this tile is finished: choose the attribute to change first")
    return take_answers(desk, number, form, answers_of(desk, number, form))


def _undo(desk: Desk, number: int, form: dict):
    if not desk.labels.history:
        raise ValueError("nothing to undo")
    last = desk.labels.history[-1]
    if form["undo"] != last["id"]:
        return _refuse(desk, number, form, "another tab has answered or undone meanwhile; here is how it stands")
    desk.write({"event": "undo", "id": form["id"], "undoes": last["id"]})
    if last["tile"] not in desk.numbers:  # of another --label or --split
        return state_of(desk, number, form["filter"])
    names = [name for name in VOCABULARY if name in last["answers"]]
    return state_of(desk, desk.numbers[last["tile"]], form["filter"], names[0])


def _remark(desk: Desk, number: int, form: dict):
    if form["revision"] != desk.tile(number).revision:
        return _refuse(desk, number, form, "this tile was changed in another tab meanwhile; here is how it stands")
    row = {"id": form["id"], "tile": desk.rows[number]["file_name"]}
    if "comment" in form:
        desk.write({"event": "comment", **row, "text": form["comment"].strip()})
    else:
        desk.write({"event": "flag", **row, "flagged": form["flagged"]})
    return state_of(desk, number, form["filter"], form.get("active") if form.get("active") in VOCABULARY else None)


def _progress_pages(app: Flask, folder: Path, desks: dict[str, Desk], bench) -> None:
    @app.get("/")
    @server.public
    def front():
        return render_template("label_front.html")

    @app.get("/progress")
    def progress():
        people = []
        for link, desk in desks.items():
            with desk.journal.lock:
                done, rows, pace = desk.done(), desk.journal.rows, desk.labels.seconds_per_tile()
                people.append({"name": desk.annotator, "link": url_for("page", link=link), "done": done, "total": len(desk.rows),
                               "blind": desk.blind, "seconds": None if pace is None else round(pace),
                               "last": rows[-1].get("time", "")[:16].replace("T", " ") if rows else "",
                               "state": "finished" if done == len(desk.rows) else "labelling" if rows else "not started",
                               "bad": len(desk.journal.bad), "trouble": desk.trouble})
        return render_template("label_progress.html", people=people, folder=folder.resolve().name,
                               disagreements=None if bench is None else bench.summary())

    @app.get("/progress/labels.csv")
    def all_labels():
        first = next(iter(desks.values()))
        return _csv(label_export.labels_csv(first.rows, {desk.annotator: desk.labels for desk in desks.values()}), "labels.csv")


def _csv(text: str, name: str) -> Response:
    return Response(text, mimetype="text/csv", headers={"Content-Disposition": f"attachment; filename={name}"})


def vocabulary() -> list[dict]:
    """lesion.describe.prompts.VOCABULARY as the pages take it, with a swatch beside each tone and colour."""
    return [{"name": a.name, "title": a.title, "help": a.help, "many": a.many,
             "values": [{"name": v.name, "key": v.key, "help": v.help,
                         "swatch": SWATCHES.get(a.name, {}).get(v.name)} for v in a.values]}
            for a in VOCABULARY.values()]
