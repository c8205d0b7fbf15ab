"""Make the report: report.html (self-contained), report.md, results.json and the figures.

    python evaluate.py --classify runs/classify --data data/isic2024 --synthetic runs/synthetic --out report

Everything is recomputed from what the other commands wrote (predictions.csv and their like); nothing is trained.
"""
from pathlib import Path

from lesion.classify import arms
from lesion.run import cli


def parse(argv=None):
    """The flags; see --help."""
    parser = cli.Parser(prog="evaluate.py", description=__doc__.split("\n\n")[0])
    group = parser.add_argument_group("what to report (each part is left out without its folder)")
    group.add_argument("--classify", type=Path, metavar="RUN", help="run folder of classify.py")
    group.add_argument("--data", type=Path, help="prepared data set, for the subgroups and the pictures")
    group.add_argument("--synthetic", type=Path, nargs="+", metavar="DIR", help="folders of generate.py, side by side")
    group.add_argument("--runs", type=Path, nargs="+", metavar="RUN", default=[],
                       help="run folders of train_lora.py, for the learning curves beside --synthetic")
    group.add_argument("--study", type=Path, metavar="DIR", help="study folder of `python -m lesion study`")
    group.add_argument("--confusion", nargs=2, choices=list(arms.ARMS), default=["W1", "S2"], metavar="ARM",
                       help="two arms whose confusion matrices are drawn")
    group = parser.add_argument_group("output")
    group.add_argument("--title", default="Synthetic skin lesions: are they useful?", help="heading of the report")
    group.add_argument("--out", type=Path, default=Path("report"), help="folder; an older report in it is replaced")
    group.add_argument("--drop-copies", type=Path, metavar="DIR",
                       help="also write the --synthetic folders without copies of training tiles to DIR/<name>")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """Compute the parts that were asked for, then write them; ValueError with one line for what is missing."""
    args = parse(argv)
    if not (args.classify or args.study or args.synthetic):
        raise ValueError("nothing to report: give --classify RUN (a run folder of classify.py), --synthetic DIR or "
                         "--study DIR")
    if args.synthetic and not args.data:
        raise ValueError("--synthetic DIR is compared with real tiles: give --data, the data set its LoRA learnt from")
    if (args.runs or args.drop_copies) and not args.synthetic:
        raise ValueError("--runs and --drop-copies concern synthetic tiles: give --synthetic DIR too")
    from lesion.report import classification, page, pictures, plots, readers
    blocks, results, figures = [], {}, {}

    if args.synthetic:
        part, found, drawn = pictures.build(args.synthetic, args.data, args.classify, args.runs, args.drop_copies,
                                            cli.progress)
        blocks, results, figures = blocks + part, results | {"pictures": found}, figures | drawn
    if args.classify:
        part, found, drawn = classification.build(args.classify, args.data, tuple(args.confusion))
        blocks, results, figures = blocks + part, results | {"classification": found}, figures | drawn
    if args.study:
        part, found, drawn = readers.build(args.study)
        blocks, results, figures = blocks + part, results | {"readers": found}, figures | drawn

    # Nothing is written before everything has been computed.
    for stem, figure in figures.items():
        plots.save(figure, args.out / "figures", stem)
    page.write(args.out, args.title, blocks, results)
    if args.synthetic:
        print(*pictures.findings(results["pictures"]), sep="\n")
    if args.classify:
        print(classification.finding(results["classification"]))
    if args.study:
        print(results["readers"]["verdict"])
    print(f"report: {args.out / 'report.html'}")


if __name__ == "__main__":
    cli.run(main, "evaluate.py")
