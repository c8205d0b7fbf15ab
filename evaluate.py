"""Make the report: report.html (self-contained), report.md, results.json and the figures.

    python evaluate.py --classify runs/classify --data data/isic2024 --out report

Everything is recomputed from what the other commands wrote (predictions.csv and their like); nothing is trained.
"""
from pathlib import Path

from lesion import cli, experiments


def parse(argv=None):
    """The flags; see --help."""
    parser = cli.Parser(prog="evaluate.py", description=__doc__.split("\n\n")[0])
    group = parser.add_argument_group("what to report (each part is left out without its folder)")
    group.add_argument("--classify", type=Path, metavar="RUN", help="run folder of classify.py")
    group.add_argument("--data", type=Path, help="prepared data set, for the subgroups")
    group.add_argument("--confusion", nargs=2, choices=list(experiments.ARMS), default=["W1", "S2"], metavar="ARM",
                       help="two arms whose confusion matrices are drawn")
    group = parser.add_argument_group("output")
    group.add_argument("--title", default="Synthetic skin lesions: are they useful?", help="heading of the report")
    group.add_argument("--out", type=Path, default=Path("report"), help="folder; an older report in it is replaced")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse(argv)
    if not args.classify:
        raise ValueError("nothing to report: give --classify RUN (a run folder of classify.py)")
    from lesion import plots, report, report_classification
    blocks, results, figures = [], {}, {}

    part, found, drawn = report_classification.build(args.classify, args.data, tuple(args.confusion))
    blocks, results, figures = blocks + part, results | {"classification": found}, figures | drawn

    # Nothing is written before everything has been computed.
    for stem, figure in figures.items():
        plots.save(figure, args.out / "figures", stem)
    report.write(args.out, args.title, blocks, results)
    print(report_classification.finding(results["classification"]))
    print(f"report: {args.out / 'report.html'}")


if __name__ == "__main__":
    cli.run(main, "evaluate.py")
