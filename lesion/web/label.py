"""`python -m lesion label DATA`: describe tiles in the browser, one key an answer.

The page asks for the attributes of lesion.describe.prompts.VOCABULARY one after another, the measured ones pre-selected
(`--blind` hides them), and goes on by itself to the next attribute and the next tile. Every answer is a row of the
annotator's journal, on disk before the reply; `metadata.jsonl` follows within seconds, and at every start
(lesion.web.label_folder). `--people` lets several label at once, each by a personal link (lesion.web.label_pages);
`--adjudicate` shows where they disagree (lesion.web.label_adjudicate).
Nothing is made or taken over before the port is ours. Proven by tests/web/test_label.py, tests/web/test_label_people.py
and tests/browser/test_label_browser.py.
"""
import threading
import time
from argparse import HelpFormatter, Namespace
from contextlib import ExitStack
from pathlib import Path

from lesion.run import cli, files, lock

SYNC_S = 1.0  # the manifest follows the journal after this, or after ten times what writing it took
ADJUDICATOR = "adjudicator"


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
    people.add_argument("--annotator", metavar="NAME",
                        help="who labels: everyone has a journal, DATA/labels/NAME.jsonl [first]")
    people.add_argument("--people", nargs="+", metavar="NAME",
                        help="several at once: prints a personal link for each, and one for the page of progress")
    people.add_argument("--blind", action="store_true", help="hide the suggestions, for an agreement that means something")
    people.add_argument("--adjudicate", nargs="*", metavar="NAME",
                        help=f"decide where these disagree [everyone]; the decisions are --annotator's [{ADJUDICATOR}]")
    people.add_argument("--primary", metavar="NAME",
                        help="from now on metadata.jsonl takes this annotator's answers [whoever labelled first]")
    served = parser.add_argument_group("server")
    served.add_argument("--host", default="127.0.0.1", help="listen on; 0.0.0.0 lets other machines in [%(default)s]")
    served.add_argument("--port", type=cli.number(int, 0, 65535), default=8002, help="0 takes any free one [8002]")
    served.add_argument("--token", help="a secret of at least 12 characters; needed where other machines are let in")
    served.add_argument("--name", action="append", default=[], metavar="HOST",
                        help="a host name people use for this machine, such as a reverse proxy's; may be repeated")
    served.add_argument("--no-browser", action="store_true", help="do not open the page")
    instead = parser.add_argument_group("instead of serving")
    instead.add_argument("--agreement", action="store_true", help="print Cohen's kappa between annotators, and stop")
    instead.add_argument("--export-captions", nargs="?", type=Path, const=Path(), metavar="DIR",
                         help="write each tile's sentence to NAME.txt in DIR, or beside the pictures, and stop")
    instead.add_argument("--export-csv", type=Path, metavar="FILE", help="write everybody's labels as a table, and stop")
    instead.add_argument("--import-csv", type=Path, metavar="FILE", help="take --annotator's labels from such a table, and stop")
    instead.add_argument("--no-serve", action="store_true", help="bring metadata.jsonl up to date, and stop")
    args = parser.parse_args(argv)
    if args.people and (args.annotator or args.adjudicate is not None):
        parser.error("--people names everyone who labels: leave out --annotator and --adjudicate (the page of progress "
                     "links to adjudication)")
    if args.annotator is None:
        args.annotator = ADJUDICATOR if args.adjudicate is not None else "first"
    return args


def main(argv: list[str]) -> None:
    """Serve the labelling pages until a signal, or do the one thing a flag asks for. ValueError for what cannot be."""
    args = parse(argv)
    with lock.owner(args.data, shared=True):
        files.sweep(args.data / "labels")
        label(args)


def label(args: Namespace) -> None:
    """What `main` does, once nobody is rewriting the data set."""
    from lesion.web import label_folder, server
    label_folder.journal_path(args.data, args.annotator)  # refuses a name that cannot be a file's
    rows, notes = label_folder.select(args.data, args.label, args.split)
    for note in notes:
        print(cli.one_line(note))
    if args.primary:
        known = {*label_folder.annotators(args.data), *(args.people or [args.annotator])}
        if label_folder.check_annotator(args.primary) not in known:
            raise ValueError(f"--primary {args.primary} has no answers in {args.data}: there are {', '.join(sorted(known))}")
    if _instead(args, rows):
        return
    server.create_app(__name__, args.token, args.host)  # refuses, before anything is made
    with server.bind(args.host, args.port) as listener, ExitStack() as opened:
        _serve(args, rows, listener, opened)


def _instead(args: Namespace, rows: list[dict]) -> bool:
    """Do what is asked for instead of serving; whether anything was."""
    from lesion.run import files
    from lesion.web import label_compare, label_export, label_folder
    if args.agreement:
        print_agreement(label_compare.agreement(args.data))
        return True
    if args.export_csv:
        names = label_folder.annotators(args.data) or [args.annotator]
        text = label_export.labels_csv(rows, {name: label_folder.read_labels(args.data, name) for name in names})
        files.write_bytes(args.export_csv, text.encode())
        print(f"{args.export_csv}: {len(rows)} tiles, {', '.join(names)}")
        return True
    if not (args.no_serve or args.export_captions is not None or args.import_csv):
        return False
    if args.import_csv:
        _import(args, rows)
    if args.primary:
        label_folder.set_primary(args.data, args.primary)
    changed = label_folder.sync(args.data)
    if args.export_captions is None:
        print(f"{args.data / 'metadata.jsonl'}: {'brought up to date' if changed else 'is up to date'}")
    else:
        rows, _ = label_folder.select(args.data, args.label, args.split)
        out = args.export_captions if args.export_captions != Path() else None
        count = label_export.export_captions(args.data, rows, out)
        print(f"{count} captions in {out or 'their pictures folder'}")
    return True


def _import(args: Namespace, rows: list[dict]) -> None:
    from lesion.web import label_export, label_folder
    from lesion.web.journal import Journal
    path = label_folder.journal_path(args.data, args.annotator)
    labels = label_folder.read_labels(args.data, args.annotator)
    if label_export.read_labels_csv(args.import_csv, rows, args.annotator, labels):
        with Journal(path, label_folder.check_row) as journal:  # nobody labels meanwhile
            labels = label_folder.Labels(journal.rows)
            events = label_export.read_labels_csv(args.import_csv, rows, args.annotator, labels)
            for event in events:
                journal.append(event)
        print(f"{path}: {len(events)} new rows from {args.import_csv}; labels that stood already were left as they are")
    else:
        print(f"{args.import_csv} says nothing that {args.annotator} has not said")


def _serve(args: Namespace, rows: list[dict], listener, opened: ExitStack) -> None:
    """Open everyone's journal and serve on `listener` until ctrl-C."""
    from lesion.web import label_adjudicate, label_desk, label_folder, label_pages, server
    from lesion.web.journal import Journal
    changed = threading.Event()

    def desk_of(name: str, blind: bool = False):
        path = label_folder.journal_path(args.data, name)
        journal = opened.enter_context(Journal(path, label_folder.check_row))
        for number, reason in journal.bad:
            print(cli.one_line(f"{path}, line {number}: skipped, {reason}"))
        return label_desk.Desk(args.data, rows, name, journal, blind, changed)

    secret, links = label_folder.people(args.data, args.people or [])
    desks, bench = {}, None
    if args.people:
        desks = {link: desk_of(name, args.blind) for name, link in links.items()}
        if len(desks) > 1 and ADJUDICATOR not in links:
            bench = label_adjudicate.Bench(desk_of(ADJUDICATOR), {desk.annotator: desk.labels for desk in desks.values()})
    elif args.adjudicate is not None:
        said = _said(args)
        bench = label_adjudicate.Bench(desk_of(args.annotator), said)
        bench.keep_agreed()
    else:
        desks = {"": desk_of(args.annotator, args.blind)}
    everyone = [*desks.values(), *([bench.desk] if bench else [])]
    if args.primary:
        label_folder.set_primary(args.data, args.primary)
    label_folder.sync(args.data)
    token = args.token or (secret if args.people else None)
    app = label_pages.create_app(args.data, desks, token, args.host, args.name, secret, bench)
    whose = label_folder.primary(args.data)
    done = ", ".join(f"{desk.done()} labelled by {desk.annotator}" for desk in desks.values()) or \
        "{cases} disagreements, {decided} decided".format(**bench.summary())
    print(f"{args.data}: {len(rows)} tiles, {done}; metadata.jsonl takes the answers of {whose or 'whoever answers first'}")

    def ready(url: str) -> None:
        base = url.split("/progress")[0]
        for link, desk in desks.items():
            if args.people:
                print(f"{desk.annotator}: {base}/p/{link}/")
        if args.people:
            print(f"progress: {url} (ctrl-C stops; answers are saved at once)", flush=True)
        else:
            print(f"open {url} (ctrl-C stops; answers are saved at once)", flush=True)

    stop = threading.Event()
    follower = threading.Thread(target=follow, args=(args.data, everyone, changed, stop))
    follower.start()
    try:
        server.serve(app, listener, args.host, browser=not args.no_browser, ready=ready,
                     path="/progress" if args.people else "/", threads=16 if args.people else 8)
    finally:
        stop.set()
        changed.set()
        follower.join()
        for desk in everyone:
            print(f"stopped; {desk.journal.path}: {len(desk.journal.rows)} rows")


def _said(args: Namespace) -> dict:
    """{name: Labels} of those whose disagreements are to be decided."""
    from lesion.web import label_folder
    there = [name for name in label_folder.annotators(args.data) if name != args.annotator]
    names = args.adjudicate or there
    if missing := [name for name in names if name not in there]:
        raise ValueError(f"--adjudicate {missing[0]}: no answers of that name; there are {', '.join(there) or 'none'}")
    if len(names) < 2:
        raise ValueError(f"--adjudicate needs answers of two people, {args.data} has those of {', '.join(there) or 'nobody'}: "
                         "everyone labels with a name of their own (--annotator or --people)")
    own = label_folder.read_labels(args.data, args.annotator)
    if any(row.get("by") not in ("adjudicate", "agreed") for row in own.history):
        raise ValueError(f"--annotator {args.annotator} has labelled: decisions need a name of their own, such as {ADJUDICATOR}")
    return {name: label_folder.read_labels(args.data, name) for name in names}


def follow(folder: Path, desks: list, changed: threading.Event, stop: threading.Event) -> None:
    """Keep `folder`'s manifest up to date with the journals until `stop`, and once more then. What keeps it from that
    stands in every desk's `trouble`."""
    from lesion.web import label_folder
    took = 0.0
    while not stop.is_set():
        changed.wait()
        stop.wait(max(SYNC_S, 10 * took))
        changed.clear()
        start = time.monotonic()
        trouble = ""
        try:
            label_folder.sync(folder)
        except (OSError, ValueError) as error:
            trouble = f"metadata.jsonl is behind ({error}); all answers are safe in the folder labels"
        for desk in desks:
            desk.trouble = trouble
        took = time.monotonic() - start


def print_agreement(table: list[dict]) -> None:
    """Print the rows of label_compare.agreement: a block a pair of annotators, blind and suggested answers apart."""
    for first, second, view in dict.fromkeys((row["first"], row["second"], row["view"]) for row in table):
        block = [row for row in table if (row["first"], row["second"], row["view"]) == (first, second, view)]
        if not any(row["tiles"] for row in block):
            continue
        what = "neither saw a suggestion" if view == "blind" else "a suggestion was in view"
        print(f"{first} and {second}, {view} answers: {what}\n  {'attribute':14}{'tiles':>7}{'agree':>8}{'kappa':>8}")
        for row in block:
            agree = "-" if row["agree"] is None else f"{row['agree']:.0%}"
            kappa = "-" if row["kappa"] is None else f"{row['kappa']:.2f}"
            print(f"  {row['attribute']:14}{row['tiles']:>7}{agree:>8}{kappa:>8}")
    print("Cohen's kappa: 0 is chance, 1 is full agreement; - where both only ever gave one and the same answer, or no "
          "tile has answers of both. Other colours and surface: each word's yes or no is one decision. Who accepts a "
          "suggestion agrees with it, not with a colleague: report the blind figures (--blind hides suggestions).")
