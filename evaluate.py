"""Make the report: report.html (self-contained), report.md, results.json, manifest.json and the figures.

    python evaluate.py                          # the newest classifier run, synthetic folder and reader study
    python evaluate.py --classify runs/classify --data data/isic2024 --synthetic samples/malignant-phase2 --out report

Everything is recomputed from what the other commands wrote (predictions.csv and their like); nothing is trained. The report
appears as a whole, in the place of an older one.
"""
import os
import shlex
import time
from pathlib import Path

from lesion.classify import arms
from lesion.report import request
from lesion.report.request import Request
from lesion.run import cli, files, lock, sums

TITLE = "Synthetic skin lesions: are they useful?"


def parse(argv=None):
    """The flags; see --help."""
    parser = cli.Parser(prog="evaluate.py", description=__doc__.split("\n\n")[0])
    group = parser.add_argument_group("what to report", "Given none of --classify, --synthetic and --study: the newest of each. "
                                      "Else only what is given.")
    group.add_argument("--classify", type=Path, metavar="RUN", help="run folder of classify.py")
    group.add_argument("--data", type=Path, help="prepared data set, for the subgroups and the pictures")
    group.add_argument("--synthetic", type=Path, nargs="+", metavar="DIR", default=[],
                       help="folders of generate.py, side by side")
    group.add_argument("--runs", type=Path, nargs="+", metavar="RUN", default=[],
                       help="run folders of train_lora.py, for the learning curves beside --synthetic")
    group.add_argument("--study", type=Path, metavar="DIR", help="study folder of `python -m lesion study`")
    group.add_argument("--confusion", nargs=2, choices=list(arms.ARMS), default=["W1", "S2"], metavar="ARM",
                       help="two arms whose confusion matrices are drawn")
    group = parser.add_argument_group("output")
    group.add_argument("--title", default=TITLE, help="heading of the report")
    group.add_argument("--out", type=Path, default=Path("report"), help="folder; an older report in it is replaced")
    group.add_argument("--drop-copies", type=Path, metavar="DIR",
                       help="also write the --synthetic folders without copies of training tiles to DIR/<name>, in the place "
                       "of those of an earlier call")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """Compute the parts, then put the whole report in its place; ValueError with one line for what is missing."""
    args = parse(argv)
    asked = fill_from_newest(args)
    for folder in filter(None, (asked.classify, *asked.synthetic)):
        sums.require(folder)
    if asked.data:
        sums.require(asked.data, None if asked.synthetic else [files.MANIFEST, files.DATASET])
    for folder in asked.runs:
        sums.require_unless_gone(folder)
    with lock.owner(args.out, beside=True):
        report(args, asked)


def report(args, asked: Request) -> None:
    """Compute everything, then put it in its place as a whole."""
    from lesion.report import whole
    from lesion.run import state

    # Everything is computed before anything is written.
    whole.refuse_foreign(args.out)
    read = whole.hashes(asked.files_read())
    made, command = state.provenance(), command_of(asked, args)
    about = [("Made", today()), ("Command", command), ("Program", f"lesion {made['lesion']} at {(made['git_commit'] or '–')[:12]}")]
    made_report = whole.compute(asked, args.drop_copies, about, cli.progress)
    manifest = {"request": asked.to_json(), "title": args.title, "drop_copies": args.drop_copies and str(args.drop_copies),
                "read": read, "about": about, "provenance": made | {"command": command, "made": today()}}
    whole.write(made_report, args.out, args.title, manifest, args.drop_copies)
    print(*made_report.findings(), sep="\n")
    print(f"report: {args.out / 'report.html'}")
    print(f"next: {next_command(asked, args.out)}")


def fill_from_newest(args) -> Request:
    """The request of the flags; without a part to report, that of the newest folders, which are printed."""
    if args.drop_copies and not args.synthetic and (args.classify or args.study):
        raise ValueError("--drop-copies concerns synthetic tiles: give --synthetic DIR too")
    given = Request(args.classify, args.data, tuple(args.synthetic), tuple(args.runs), args.study, tuple(args.confusion))
    if args.classify or args.synthetic or args.study or args.runs:
        given.check()
        return given
    found = request.newest(args.data)
    if not (found.classify or found.synthetic or found.study):
        raise ValueError("nothing to report yet: no run of classify.py in runs/, no tiles of generate.py in samples/, no study; "
                         "run train_lora.py and generate.py first, or give --classify RUN, --synthetic DIR or --study DIR")
    found = Request(found.classify, found.data, found.synthetic, found.runs, found.study, tuple(args.confusion))
    print(f"the newest: {command_of(found, args)}", flush=True)
    return found


def command_of(asked: Request, args) -> str:
    """The command that makes this report, every folder named."""
    flags = [("--classify", asked.classify), ("--data", asked.data), ("--synthetic", *asked.synthetic), ("--runs", *asked.runs),
             ("--study", asked.study), ("--drop-copies", args.drop_copies)]
    if asked.confusion != Request().confusion:
        flags.append(("--confusion", *asked.confusion))
    if args.title != TITLE:
        flags.append(("--title", args.title))
    return shlex.join(["python", "evaluate.py", *(str(word) for flag in flags if any(flag[1:]) for word in flag), "--out", str(args.out)])


def today() -> str:
    """The day, as 2026-01-31; of SOURCE_DATE_EPOCH where it is set, so that a report can be made again byte for byte."""
    return time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())))


def next_command(asked: Request, out: Path) -> str:
    """What to type after this: the step that the report still lacks, or its check."""
    def line(*words):
        return shlex.join(["python", *map(str, words)])
    if not asked.synthetic:
        return line("generate.py")
    if not asked.classify:
        return line("classify.py", "--data", asked.data, "--synthetic", *asked.synthetic)
    if not asked.study:
        return line("-m", "lesion", "study", "runs/study", "--real", asked.data, "--synthetic", asked.synthetic[0])
    return line("-m", "lesion", "verify", out)


if __name__ == "__main__":
    cli.run(main, "evaluate.py")
