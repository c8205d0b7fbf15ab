"""`python -m lesion label DATA`: describe tiles in the browser, one key an answer.

The page asks for the attributes of lesion.describe.prompts.VOCABULARY one after another, the measured ones pre-selected,
and goes on by itself to the next attribute and the next tile. Every answer is a row of the annotator's journal, on disk
before the reply; `metadata.jsonl` follows within seconds, and at every start (lesion.web.label_folder). A page says
which revision of a tile it has seen, so that of two tabs the later one is told and overwrites nothing; each request has
an id of its own, so that one sent again after a lost reply counts once. lesion.web.label_desk takes the answers.
Proven by tests/web/test_label.py and tests/browser/test_label_browser.py.
"""
import re
import threading
import time
from argparse import HelpFormatter, Namespace
from pathlib import Path

from lesion.run import cli, lock

SYNC_S = 1.0  # the manifest follows the journal after this, or after ten times what writing it took


def parse(argv: list[str]) -> Namespace:
    """The flags of `python -m lesion label`; exit code 2 with one line for a bad one."""
    parser = cli.Parser(prog="lesion label", description="Describe tiles in the browser: one key an answer.",
                        formatter_class=HelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="prepared data set (see `python -m lesion prepare`)")
    tiles = parser.add_argument_group("tiles")
    tiles.add_argument("--label", choices=("malignant", "benign", "all"), default="malignant",
                       help="class of the tiles [%(default)s]")
    tiles.add_argument("--split", choices=("train", "val", "test", "all"), default="all",
                       help="their part [%(default)s]")
    people = parser.add_argument_group("people")
    people.add_argument("--annotator", default="first", metavar="NAME",
                        help="who labels: everyone has a journal, DATA/labels/NAME.jsonl [%(default)s]")
    people.add_argument("--primary", metavar="NAME",
                        help="from now on metadata.jsonl takes this annotator's answers [whoever labelled first]")
    served = parser.add_argument_group("server")
    served.add_argument("--host", default="127.0.0.1", help="listen on; 0.0.0.0 lets other machines in [%(default)s]")
    served.add_argument("--port", type=cli.number(int, 0, 65535), default=8002, help="0 takes any free one [8002]")
    served.add_argument("--token", help="a secret of at least 12 characters; needed where other machines are let in")
    served.add_argument("--no-browser", action="store_true", help="do not open the page")
    instead = parser.add_argument_group("instead of serving")
    instead.add_argument("--agreement", action="store_true", help="print Cohen's kappa between annotators, and stop")
    instead.add_argument("--export-captions", nargs="?", type=Path, const=Path(), metavar="DIR",
                         help="write each tile's sentence to NAME.txt in DIR, or beside the pictures, and stop")
    instead.add_argument("--no-serve", action="store_true", help="bring metadata.jsonl up to date, and stop")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Serve the labelling page until ctrl-C, or do the one thing a flag asks for. ValueError for what cannot be."""
    args = parse(argv)
    with lock.owner(args.data, shared=True):
        label(args)


def label(args: Namespace) -> None:
    """Bring the manifest up to date, and serve the pages."""
    from lesion.web import label_compare, label_desk, label_export, label_folder, server
    from lesion.web.journal import Journal
    path = label_folder.journal_path(args.data, args.annotator)
    rows, notes = label_folder.select(args.data, args.label, args.split)
    for note in notes:
        print(note)
    if args.agreement:
        print_agreement(label_compare.agreement(args.data))
        return
    if args.primary:
        known = {*label_folder.annotators(args.data), args.annotator}
        if label_folder.check_annotator(args.primary) not in known:
            raise ValueError(f"--primary {args.primary} has no answers in {args.data}: there are {', '.join(sorted(known))}")
        label_folder.set_primary(args.data, args.primary)
    if args.no_serve or args.export_captions is not None:
        changed = label_folder.sync(args.data)
        if args.export_captions is None:
            print(f"{args.data / 'metadata.jsonl'}: {'brought up to date' if changed else 'is up to date'}")
        else:
            rows, _ = label_folder.select(args.data, args.label, args.split)
            out = args.export_captions if args.export_captions != Path() else None
            count = label_export.export_captions(args.data, rows, out)
            print(f"{count} captions in {out or 'their pictures folder'}")
        return
    server.create_app(__name__, args.token, args.host)  # refuses, before anything is made
    with Journal(path, label_folder.check_row) as journal:
        for number, reason in journal.bad:
            print(f"{path}, line {number}: skipped, {reason}")
        if label_folder.primary(args.data) is None:
            label_folder.set_primary(args.data, args.annotator)
        label_folder.sync(args.data)
        desk = label_desk.Desk(args.data, rows, args.annotator, journal)
        app = create_app(desk, args.token, args.host)
        done = len(desk.labels.complete & desk.numbers.keys())
        whose = label_folder.primary(args.data)
        print(f"{args.data}: {len(rows)} tiles, {done} labelled by {args.annotator}; metadata.jsonl takes the "
              f"answers of {whose}")
        stop = threading.Event()
        follower = threading.Thread(target=follow, args=(desk, stop))
        follower.start()
        try:
            server.serve(app, args.host, args.port, browser=not args.no_browser,
                         ready=lambda url: print(f"open {url} (ctrl-C stops; answers are saved at once)", flush=True))
        finally:
            stop.set()
            desk.dirty.set()
            follower.join()
        print(f"stopped; {path}: {len(journal.rows)} rows")


def follow(desk, stop: threading.Event) -> None:
    """Keep the manifest up to date with the journal until `stop`, and once more then."""
    from lesion.web import label_folder
    took = 0.0
    while not stop.is_set():
        desk.dirty.wait()
        stop.wait(max(SYNC_S, 10 * took))
        desk.dirty.clear()
        start = time.monotonic()
        try:
            label_folder.sync(desk.folder)
            desk.trouble = ""
        except (OSError, ValueError) as error:
            desk.trouble = f"metadata.jsonl is behind ({error}); all answers are safe in labels/{desk.annotator}.jsonl"
        took = time.monotonic() - start


def print_agreement(table: list[dict]) -> None:
    """Print the rows of label_compare.agreement, one block a pair of annotators."""
    for pair in dict.fromkeys((row["first"], row["second"]) for row in table):
        print(f"{pair[0]} and {pair[1]}\n  {'attribute':14}{'tiles':>7}{'agree':>8}{'kappa':>8}")
        for row in table:
            if (row["first"], row["second"]) == pair:
                agree = "-" if row["agree"] is None else f"{row['agree']:.0%}"
                kappa = "-" if row["kappa"] is None else f"{row['kappa']:.2f}"
                print(f"  {row['attribute']:14}{row['tiles']:>7}{agree:>8}{kappa:>8}")
    print("Cohen's kappa: 0 is chance, 1 is full agreement; - where both only ever gave one and the same answer, or no "
          "tile has answers of both. Other colours and surface: each word's yes or no is one decision.")


# ------------------------------------------------------------------------------------ the pages

def create_app(desk, token: str | None = None, host: str = "127.0.0.1"):
    """The Flask app of one annotator's desk."""
    from flask import Response, abort, render_template, request

    from lesion.describe.prompts import VOCABULARY
    from lesion.web import server
    from lesion.web.label_desk import FILTERS, answers_of, png, state_of, take_answers
    from lesion.web.label_folder import MAX_COMMENT
    app = server.create_app(__name__, token, host)

    def number_of(value: object) -> int:
        text = str(value) if isinstance(value, int | str) else ""
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) >= len(desk.rows):
            raise ValueError(f"no tile {str(value)[:20]!r}: allowed are 0 to {len(desk.rows) - 1}")
        return int(text)

    def filter_of(value: object) -> str:
        if value not in FILTERS:
            raise ValueError(f"no filter {str(value)[:20]!r}: allowed are {', '.join(FILTERS)}")
        return value

    @app.get("/")
    def page():
        chosen = filter_of(request.args.get("filter", "all"))
        with desk.journal.lock:
            if not desk.members(chosen):
                chosen = "all"
            state = state_of(desk, desk.resume(chosen), chosen)
        vocabulary = [{"name": a.name, "title": a.title, "help": a.help, "many": a.many,
                       "values": [{"name": v.name, "key": v.key, "help": v.help} for v in a.values]}
                      for a in VOCABULARY.values()]
        labels = {row["label"] for row in desk.rows}
        filters = [name for name in FILTERS if name not in ("benign", "malignant") or len(labels) == 2]
        return render_template("label.html", state=state, vocabulary=vocabulary, filters=filters,
                               annotator=desk.annotator)

    @app.get("/state")
    def state():
        chosen = filter_of(request.args.get("filter", "all"))
        with desk.journal.lock:
            members = desk.members(chosen)
            if not members:
                raise ValueError(f"no tile is {chosen} at the moment")
            if "tile" in request.args:
                number = number_of(request.args["tile"])
            else:
                number = desk.resume(chosen) if chosen not in ("flagged", "changed") else members[0]
            return state_of(desk, number, chosen)

    @app.get("/picture/<int:number>/<kind>.png")
    def picture(number, kind):
        if kind not in ("original", "normalised") or number >= len(desk.rows):
            abort(404, "no such picture")
        data = png(desk, number, kind == "normalised")
        return Response(data, mimetype="image/png", headers={"Cache-Control": "private, max-age=60"})

    @app.post("/<action>")
    def act(action):
        form = request.get_json()
        if action not in ("answer", "undo", "flag", "comment"):
            abort(404, "no such page")
        if not isinstance(form, dict) or not isinstance(form.get("id"), str) or not 8 <= len(form["id"]) <= 64:
            raise ValueError("a request is a JSON object with an id of 8 to 64 characters")
        form["filter"] = filter_of(form.get("filter", "all"))
        with desk.journal.lock:
            number = number_of(form.get("tile"))
            if form["id"] in desk.labels.ids:  # sent again, as the reply was lost
                again = number
                if action == "undo":
                    again = desk.numbers.get(desk.labels.last, number)
                elif action == "answer" and form.get("stay") is not True and desk.tile(number).is_complete():
                    again = desk.next_tile(form["filter"], number)
                return state_of(desk, again, form["filter"])
            return {"answer": answer, "undo": undo, "flag": remark, "comment": remark}[action](number, form)

    def refuse(number: int, form: dict, reason: str):
        return state_of(desk, number, form["filter"]) | {"error": reason}, 409

    def is_late(number: int, form: dict) -> bool:
        return form.get("revision") != desk.tile(number).revision

    def answer(number: int, form: dict):
        if is_late(number, form):
            return refuse(number, form, "this tile was changed in another tab meanwhile; here is how it stands")
        by = form["by"] if form.get("by") in ("key", "button", "sentence", "accept") else None
        return take_answers(desk, number, form, answers_of(desk, number, form), by)

    def undo(number: int, form: dict):
        if not desk.labels.history:
            raise ValueError("nothing to undo")
        last = desk.labels.history[-1]
        if form.get("undo") != last["id"]:
            return refuse(number, form, "another tab has answered or undone meanwhile; here is how it stands")
        desk.write({"event": "undo", "id": form["id"], "undoes": last["id"]})
        names = [name for name in VOCABULARY if name in last["answers"]]
        if last["tile"] not in desk.numbers:  # of another --label or --split
            return state_of(desk, number, form["filter"])
        return state_of(desk, desk.numbers[last["tile"]], form["filter"], names[0])

    def remark(number: int, form: dict):
        if is_late(number, form):
            return refuse(number, form, "this tile was changed in another tab meanwhile; here is how it stands")
        name = desk.rows[number]["file_name"]
        if "comment" in form:
            text = form["comment"]
            if not isinstance(text, str) or len(text) > MAX_COMMENT:
                raise ValueError(f"a comment is text of at most {MAX_COMMENT} characters")
            desk.write({"event": "comment", "id": form["id"], "tile": name, "text": text.strip()})
        else:
            desk.write({"event": "flag", "id": form["id"], "tile": name, "flagged": form.get("flagged") is True})
        active = form.get("active") if form.get("active") in VOCABULARY else None
        return state_of(desk, number, form["filter"], active)

    return app
