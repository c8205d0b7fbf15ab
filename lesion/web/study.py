"""`python -m lesion study DIR`: a web page on which readers say, tile by tile, which are real and which synthetic.

Each reader has a personal link, an order of their own and a journal; an answer is on disk before the next tile is sent,
so a reload, another tab or a killed server loses nothing and goes on at the right tile. No page tells a class or a
score. The organiser's page shows progress only and needs the token. lesion.web.study_folder keeps the folder,
lesion.stats.readers judges the answers.
Proven by tests/web/test_study.py and tests/browser/test_study_browser.py.
"""
import math
import re
import shlex
import statistics
import sys
import time
from argparse import BooleanOptionalAction, HelpFormatter, Namespace
from dataclasses import dataclass, field
from pathlib import Path

from lesion.run import cli, lock

EXPECTED_S = 8  # a tile, for the announced duration
HASTY_S = 1.0   # a median under this is no looking: the organiser's page says so


def parse(argv: list[str]) -> Namespace:
    """The flags of `python -m lesion study`; exit code 2 with one line for a bad one."""
    parser = cli.Parser(prog="lesion study", description="Ask readers which tiles are real and which synthetic.",
                        formatter_class=HelpFormatter)  # defaults stand in brackets: None means "as the study has it"
    parser.add_argument("folder", type=Path, metavar="DIR", help="study folder: made if new, gone on with if there")
    made = parser.add_argument_group("a new study (an existing one keeps its own settings, and refuses others)")
    made.add_argument("--real", type=Path, metavar="DATA", help="prepared data set with the real tiles")
    made.add_argument("--synthetic", type=Path, metavar="DIR", help="folder written by generate.py")
    made.add_argument("--count", type=cli.number(int, 1, 1000), help="tiles of each class [20]")
    made.add_argument("--label", help="class of the tiles [malignant]")
    made.add_argument("--split", choices=("held-out", "test", "val", "train", "all"),
                      help="where real tiles come from; held-out is test and val [held-out]")
    made.add_argument("--resolution", type=cli.number(int, 16, 2048), help="side in pixels [the synthetic tiles' own]")
    made.add_argument("--readers", type=cli.number(int, 1, 500), help="readers; may be raised later [5]")
    made.add_argument("--seed", type=cli.number(int, 0, 2 ** 64 - 1), help="decides tiles and orders; keep it from readers [drawn]")
    made.add_argument("--allow-back", action=BooleanOptionalAction, help="readers may go back and change answers [no]")
    made.add_argument("--question-malignancy", action=BooleanOptionalAction, help="also ask benign or malignant [no]")
    served = parser.add_argument_group("server")
    served.add_argument("--host", default="127.0.0.1", help="listen on; 0.0.0.0 lets other machines in [%(default)s]")
    served.add_argument("--port", type=cli.number(int, 0, 65535), default=8001, help="0 takes any free one [8001]")
    served.add_argument("--token", help="opens the organiser's page; needed where other machines are let in")
    served.add_argument("--name", action="append", default=[], metavar="HOST",
                        help="a host name readers use for this machine, such as a reverse proxy's; may be repeated")
    served.add_argument("--contact", default="", help="whom readers may ask; shown on the first page")
    served.add_argument("--no-serve", action="store_true", help="make or check the study, write answers.csv, and stop")
    args = parser.parse_args(argv)
    for name in ("real", "synthetic"):
        if getattr(args, name) and not getattr(args, name).is_dir():
            parser.error(f"--{name} {getattr(args, name)}: no such folder")
    return args


def main(argv: list[str]) -> None:
    """Make or open the study, then serve it until a signal. ValueError for what folder or flags do not allow."""
    args = parse(argv)
    with lock.owner(args.folder):
        study(args)


def study(args: Namespace) -> None:
    """Make or open the study, write its answers, serve it."""
    from lesion.web import server, study_folder
    if args.no_serve:
        _prepare(args)
        return
    if args.token is None and not server.is_loopback(args.host):
        server.create_app(__name__, None, args.host)  # refuses, before anything is made
    with server.bind(args.host, args.port) as listener:
        study, readers = _prepare(args)
        app = create_app(args.folder, study, readers, args.token, args.host, args.name, args.contact)

        def ready(url: str) -> None:
            base = url.split("/organiser")[0]
            for reader, entry in zip(readers, study["readers"], strict=True):
                print(f"{reader.name}: {base}/r/{entry['link']}")
            print(f"organiser: {url}", flush=True)
        try:
            server.serve(app, listener, args.host, ready=ready, path="/organiser", threads=16)
        finally:
            study_folder.export(args.folder)
            print(f"stopped; {args.folder / 'answers.csv'}: {sum(len(reader.answers) for reader in readers)} answers")


def _prepare(args: Namespace) -> tuple:
    """(study, readers), opened and told about; answers.csv is up to date."""
    from lesion.web import study_folder
    study = _open(args)
    settings = study["settings"]
    print(f"{args.folder}: {settings['count']} real and {settings['count']} synthetic {settings['label']} tiles of "
          f"{settings['resolution']} px, {len(study['readers'])} readers")
    real = [tile for tile in study["tiles"] if tile["class"] == "real"]
    if smaller := sum(tile["source_side"] < settings["resolution"] for tile in real):
        print(f"{smaller} of the real tiles are smaller than that and were enlarged, which readers may notice")
    for line in study.get("skipped", []):
        print(cli.one_line(f"unreadable, another tile was taken: {line}"))
    readers = [_open_reader(args.folder, study, number) for number in range(len(study["readers"]))]
    for reader in readers:
        for number, reason in reader.journal.bad:
            print(cli.one_line(f"{reader.journal.path}, line {number}: skipped, {reason}"))
    study_folder.export(args.folder)
    print(f"{args.folder / 'answers.csv'}: {sum(len(reader.answers) for reader in readers)} answers")
    return study, readers


def _open(args: Namespace) -> dict:
    """The study of args.folder: loaded and compared with the flags given, or made."""
    from lesion.web import study_folder
    made = {name: getattr(args, name) for name in ("real", "synthetic", "count", "label", "split", "resolution", "seed",
                                                   "allow_back", "question_malignancy")}
    given = {name: value for name, value in made.items() if value is not None}
    if not (args.folder / "study.json").exists():
        if not {"real", "synthetic"} <= given.keys():
            raise ValueError(f"{args.folder} has no study.json: give --real and --synthetic to make a study there")
        if args.readers:
            given["readers"] = args.readers
        study = study_folder.create(args.folder, **given)
        _print_power(study)
        return study
    study = study_folder.load(args.folder)
    for name, value in given.items():
        value = str(value.resolve()) if isinstance(value, Path) else value
        if value != study["settings"][name]:
            raise ValueError(f"{args.folder} was made with {_flag(name, study['settings'][name])}, not "
                             f"{_flag(name, value) if isinstance(value, bool) else value}: leave the flag out to go on with "
                             "it, or give a new folder")
    have = len(study["readers"])
    if args.readers and args.readers < have:
        raise ValueError(f"{args.folder} has {have} readers, not {args.readers}: readers can be added, not taken away")
    if args.readers and args.readers > have:
        study_folder.add_readers(args.folder, study, args.readers)
    return study


def _flag(name: str, value: object) -> str:
    """A setting as one would type it."""
    flag = name.replace("_", "-")
    return f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}"


def report_command(folder: Path) -> str:
    """The command that puts a study into the report, as it works from any folder."""
    script = Path(__file__).resolve().parents[2] / "evaluate.py"
    return shlex.join([sys.executable, str(script) if script.is_file() else "evaluate.py", "--study", str(Path(folder).resolve())])


def _print_power(study: dict) -> None:
    from lesion.stats import readers as reader_study
    readers, count = len(study["readers"]), study["settings"]["count"]
    power = reader_study.planned_power(readers, count, studies=400)
    print(f"power: were readers unable to tell, {readers} readers and {count} + {count} tiles would show it (d' within "
          f"+-{reader_study.MARGIN}, by simulation) with a chance of {power:.0%}; more readers or tiles raise it")


# --------------------------------------------------------------------------------------- a reader's state

@dataclass
class Reader:
    """One reader while the server runs; `journal.lock` guards the rest."""
    name: str
    order: list[str]
    journal: object
    answers: dict[str, dict]
    consented: bool
    shown: dict[int, float] = field(default_factory=dict)  # position -> when it was sent

    def current(self) -> int:
        """The first position without an answer; the number of tiles when all have one."""
        return next((n for n, tile in enumerate(self.order) if tile not in self.answers), len(self.order))

    def revision(self, position: int) -> int:
        """How many answers this position has had: a tab that knows fewer is out of date."""
        answer = self.answers.get(self.order[position])
        return answer["changes"] + 1 if answer else 0


def _open_reader(folder: Path, study: dict, number: int) -> Reader:
    from lesion.web import study_folder
    from lesion.web.journal import Journal
    entry = study["readers"][number]
    journal = Journal(study_folder.journal_path(folder, entry), study_folder.row_check(study))
    answers = study_folder.latest(journal.rows)
    return Reader(entry["name"], study_folder.order_of(study, number), journal, answers, bool(journal.rows))


def state_of(reader: Reader, settings: dict, at: int | None = None) -> dict:
    """What the page needs to show position `at` (the current one by default); nothing in it tells a class."""
    current, total = reader.current(), len(reader.order)
    position = current if at is None or not settings["allow_back"] or not 0 <= at <= current else at
    answered = len(reader.answers)
    if position == total:
        return {"done": True, "total": total, "answered": answered}
    before = reader.answers.get(reader.order[position], {})
    reader.shown[position] = time.monotonic()
    return {"done": False, "position": position, "total": total, "answered": answered, "current": current,
            "revision": reader.revision(position), "rating": before.get("rating"), "malignant": before.get("malignant"),
            "back": settings["allow_back"] and position > 0, "ask_malignant": settings["question_malignancy"]}


def take_answer(reader: Reader, settings: dict, form: dict) -> str | None:
    """Put an answer on disk; None, or why it was not taken. ValueError for a form no page of ours sends.

    An answer counts only for the revision its page had seen: of two tabs the second is told, and overwrites nothing.
    A repeat of the stored answer (its reply was lost on the way) is fine.
    """
    from lesion.web import study_folder
    position = _whole(form, "position", 0, len(reader.order) - 1)
    rating, revision = _whole(form, "rating", 1, 6), _whole(form, "revision", 0, 10 ** 6)
    malignant = form.get("malignant")
    if malignant not in ("yes", "no", "", None) or not isinstance(malignant, str | None):
        raise ValueError(f"malignant {str(malignant)[:20]!r}: allowed are 'yes' and 'no'")
    malignant = {"yes": True, "no": False}.get(malignant)
    if settings["question_malignancy"] and malignant is None:
        raise ValueError("malignant: allowed are 'yes' and 'no'; choose one before the answer")
    if not settings["question_malignancy"]:
        malignant = None
    with reader.journal.lock:
        tile = reader.order[position]
        stored = reader.answers.get(tile)
        if stored is None and position != reader.current():
            return f"tile {position + 1} is not open yet"
        if stored and (stored["rating"], stored["malignant"]) == (rating, malignant):
            return None
        if revision != reader.revision(position):
            return f"tile {position + 1} was answered already, perhaps in another tab"
        if stored and not settings["allow_back"]:
            return f"tile {position + 1} was answered already, and answers cannot be changed in this study"
        shown = reader.shown.get(position)
        row = {"event": "answer", "time": study_folder.now(), "position": position + 1, "tile": tile, "rating": rating,
               "malignant": malignant, "client_s": _seconds(form.get("client_s")),
               "server_s": None if shown is None else round(time.monotonic() - shown, 3),
               "by": form.get("by") if form.get("by") in ("key", "button") else None,
               "side_px": _seconds(form.get("side_px")), "pixel_ratio": _seconds(form.get("pixel_ratio"))}
        reader.journal.append(row)
        reader.answers[tile] = {**row, "changes": stored["changes"] + 1 if stored else 0}
    return None


def _whole(form: dict, name: str, low: int, high: int) -> int:
    given = form.get(name)
    text = str(given) if type(given) in (int, str) else ""  # a form's fields are text, JSON's are numbers
    value = int(text) if re.fullmatch("[0-9]{1,9}", text) else None
    if value is None or not low <= value <= high:
        raise ValueError(f"{name} {str(form.get(name))[:20]!r}: allowed are whole numbers from {low} to {high}")
    return value


def _seconds(text: object) -> float | None:
    """A measurement of the browser's: a number of at least 0, or None for anything else."""
    try:
        value = math.nan if isinstance(text, bool) else float(text)
    except (TypeError, ValueError, OverflowError):
        return None
    return round(value, 3) if math.isfinite(value) and 0 <= value < 1e6 else None


# ------------------------------------------------------------------------------------------------ the app

def create_app(folder: Path, study: dict, readers: list[Reader], token: str | None = None, host: str = "127.0.0.1",
               names: list[str] = (), contact: str = ""):
    """The Flask app. Readers' pages are open to who has the link; the organiser's need `token`, or the study's own."""
    from flask import Response, abort, redirect, render_template, request, url_for

    from lesion.web import server, study_folder
    settings = study["settings"]
    app = server.create_app(__name__, token or study["organiser_token"], host, names,
                            study["organiser_token"])
    by_link = {entry["link"]: reader for entry, reader in zip(study["readers"], readers, strict=True)}

    def find(link: str) -> Reader:
        if link not in by_link:
            server.refuse_link()
        return by_link[link]

    @app.get("/")
    @server.public
    def front():
        return render_template("study_front.html")

    @app.get("/r/<link>")
    @server.public
    def page(link):
        reader = find(link)
        with reader.journal.lock:
            if not reader.consented:
                minutes = max(1, round(len(reader.order) * EXPECTED_S / 60))
                return render_template("study_welcome.html", link=link, total=len(reader.order), minutes=minutes,
                                       settings=settings, contact=contact)
            at = request.args.get("at", type=int)
            state = state_of(reader, settings, None if at is None else at - 1)
        if state["done"]:
            return render_template("study_done.html", link=link, total=state["total"], settings=settings)
        return render_template("study_tile.html", link=link, state=state, side=settings["resolution"],
                               can_go_back=settings["allow_back"])

    @app.post("/r/<link>/consent")
    @server.public
    def consent(link):
        reader = find(link)
        if request.form.get("agree") != "yes":
            raise ValueError("tick the box to take part, or close the page")
        with reader.journal.lock:
            if not reader.consented:
                reader.journal.append({"event": "consent", "time": study_folder.now()})
                reader.consented = True
        return redirect(url_for("page", link=link), 303)

    @app.post("/r/<link>/answer")
    @server.public
    def answer(link):
        reader = find(link)
        form = request.get_json() if request.is_json else request.form
        if not isinstance(form, dict) or not reader.consented:
            abort(400, "answers come after the first page, as a form or a JSON object")
        with reader.journal.lock:
            refusal = take_answer(reader, settings, form)
            state = state_of(reader, settings)
        if state["done"]:
            study_folder.export(folder, study)
        if request.is_json:
            return state | {"error": refusal}, 409 if refusal else 200
        return redirect(url_for("page", link=link), 303)

    @app.get("/r/<link>/tile/<int:position>")
    @server.public
    def tile(link, position):
        reader = find(link)
        current = reader.current()
        first = 0 if settings["allow_back"] else current
        if not reader.consented or not first <= position <= min(current + 1, len(reader.order) - 1):
            abort(404, "this tile is not open")
        data = (folder / "tiles" / f"{reader.order[position]}.png").read_bytes()
        return Response(data, mimetype="image/png")  # no name, no date, no ETag: the same headers for every tile

    @app.get("/organiser")
    def organiser():
        return render_template("study_organiser.html", readers=_progress(study, readers), settings=settings,
                               folder=Path(folder).resolve().name, command=report_command(folder))

    @app.get("/organiser/answers.csv")
    def answers():
        return Response(study_folder.answers_csv(folder, study), mimetype="text/csv",
                        headers={"Content-Disposition": "attachment; filename=answers.csv"})

    return app


def _progress(study: dict, readers: list[Reader]) -> list[dict]:
    """One entry a reader for the organiser's page: how far, how fast, when last; never how right."""
    table = []
    for entry, reader in zip(study["readers"], readers, strict=True):
        with reader.journal.lock:
            answers = list(reader.answers.values())
        times = [answer["client_s"] for answer in answers if answer["client_s"] is not None]
        table.append({"name": reader.name, "link": entry["link"], "answered": len(answers), "total": len(reader.order),
                      "state": "finished" if len(answers) == len(reader.order) else "reading" if answers else
                               "agreed" if reader.consented else "not started",
                      "seconds": round(statistics.median(times), 1) if times else None,
                      "hasty": len(times) >= 5 and statistics.median(times) < HASTY_S,
                      "last": max((answer["time"] for answer in answers), default="")[:16].replace("T", " "),
                      "bad": len(reader.journal.bad)})
    return table
