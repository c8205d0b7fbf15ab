"""Do synthetic malignant tiles help a classifier to find real ones? Train the arms of the experiment.

    python classify.py                          # the newest run's data and tiles, a recipe that fits its base
    python classify.py --data data/isic2024 --synthetic runs/synthetic --out runs/classify
    python classify.py --experiments B0 A1 --seeds 1 --arch resnet18 --weights none --image-size 64 --max-benign 3000
    torchrun --nproc-per-node 4 classify.py ...      (each process takes its share of the runs)

Writes RUN/<arm>/seed<k>/predictions.csv (the score of every validation and test tile) and metrics.jsonl, from which
`python evaluate.py --classify RUN` makes the report. What is done is skipped, what was cut off goes on where it was.
"""
import argparse
import os
import shlex
from datetime import timedelta
from pathlib import Path

from lesion.classify import arms, defaults
from lesion.run import cli, lock, sums

FREE = ("experiments", "seeds", "synthetic", "synthetic_sha256", "checked", "notes", "counts", "device")  # may differ when a run goes on


def parse(argv=None):
    """The flags; see --help."""
    parser = cli.Parser(prog="classify.py", description=__doc__.split("\n\n")[0])
    group = parser.add_argument_group("tiles")
    group.add_argument("--data", type=Path, help="prepared data set; default: the newest LoRA run's")
    group.add_argument("--synthetic", type=Path, nargs="+", metavar="DIR",
                       help="generate.py's folder of malignant tiles, for S2 and S2w; with --folds, one a fold; default: the newest "
                       "whose LoRA learnt from --data")
    group.add_argument("--ratio", type=cli.number(float, above=0),
                       help="synthetic (in O1: repeated real) tiles per real malignant training tile; default: 1, for mini fewer "
                       "where fewer are there")
    group.add_argument("--max-benign", type=cli.number(int, low=0), default=0, help="benign training tiles; 0 = all")
    group.add_argument("--image-size", type=cli.number(int, low=32, high=1024), help="side in pixels; default: 128, for mini 64")
    group.add_argument("--validation-share", type=cli.number(float, low=0.05, high=0.5), default=0.2,
                       help="of train, held back to choose by where the data set has no part of its own for that")
    group.add_argument("--accept-overlap", action="store_true",
                       help="go on although patients or tiles are on two sides (to reproduce the study's split)")
    group.add_argument("--accept-unknown-synthetic", action="store_true",
                       help="go on although nothing says what the generator of the synthetic tiles has seen")
    group = parser.add_argument_group("experiments")
    names = list(arms.ARMS)
    group.add_argument("--experiments", nargs="+", choices=names, default=names, metavar="ARM",
                       help="; ".join(f"{name} = {arm.meaning}" for name, arm in arms.ARMS.items()))
    group.add_argument("--seeds", type=cli.number(int, low=1), help="default: 5, for a table; for mini 2, a quick look")
    group.add_argument("--seed", type=cli.number(int, low=0), default=0, help="of the splits, and the first seed")
    group.add_argument("--folds", type=cli.number(int, low=2), help="cross-fit over patients: each tile is tested once")
    group = parser.add_argument_group("network and training")
    group.add_argument("--arch", choices=("resnet18", "resnet34", "resnet50"), help="network; default: resnet50, for mini resnet18")
    group.add_argument("--weights", help="imagenet, none (from scratch), or a state dict's path; default: imagenet, for mini none")
    group.add_argument("--epochs", type=cli.number(int, low=1),
                       help="passes over DS1; an arm with more tiles takes the same number of steps; default: 12, for mini 4")
    group.add_argument("--batch-size", type=cli.number(int, low=2), default=64, help="tiles a step")
    group.add_argument("--lr", type=cli.number(float, above=0), help="peak; default 1e-3 from scratch, else 1e-4")
    group.add_argument("--weight-decay", type=cli.number(float, low=0), default=0.05, help="of AdamW")
    group.add_argument("--weight-power", type=cli.number(float, low=0, high=1), default=1.0,
                       help="of W1's and S2w's class weights: 1 = classes weigh the same, 0.5 = the root of that")
    group.add_argument("--augmentation", choices=("traditional", "dihedral", "none"), default="traditional",
                       help="flips, quarter turns, small affine and colour jitter; flips and turns; none (B0 has none)")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                       help="auto is fp16 on CUDA, else fp32")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, default=Path("runs/classify"), help="run folder")
    group.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on with --out")
    group.add_argument("--save-weights", choices=("first", "all", "none"), default="first",
                       help="keep the weights of the first seed, of all, of none")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """Train what is not done yet; ValueError with one line for what is missing or wrong."""
    args = parse(argv)
    for line in defaults.fill(args):
        print(line, flush=True)
    from lesion.classify.sweep import Sweep
    rank, world, where = join_processes(args.device)
    sweep = Sweep.of_flags(vars(args), where)
    with lock.owner(sweep.out, wanted=rank == 0):
        classify(sweep, rank, world, where)


def join_processes(device: str):
    """(rank, number of processes, device) under torchrun, which shares the runs out; (0, 1, device) without it."""
    import torch

    from lesion.run import devices
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        if device == "auto" and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    where = devices.device(device)
    if where.type == "cpu":
        devices.keep_freed_memory()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    return rank, world, where


def classify(sweep, rank: int, world: int, where) -> None:
    """Every run of the sweep (lesion.classify.sweep.Sweep) that is not done yet, one after the other, then the table."""
    import torch

    from lesion.classify import predictions
    from lesion.classify.sweep import describe, problems_of, read_inputs, table, tasks_of, train_one
    from lesion.run import folders
    inputs = read_inputs(sweep)  # everything that can be wrong with them is found before anything is written
    known = describe(sweep, inputs)
    if rank == 0:
        folders.open_run(sweep.out, known, sweep.resume, FREE)
        sums.begin(sweep.out)
        for note in known["notes"]:
            print(f"note: {note}", flush=True)
    if world > 1:
        torch.distributed.barrier()

    for task in tasks_of(sweep)[rank::world]:
        problems = problems_of(task)
        for line in problems or []:
            print(f"{task.title}: {line}: trained anew", flush=True)
        if problems == []:
            print(f"{task.title}: done before", flush=True)
        else:
            train_one(sweep, inputs, task, where)
        if sweep.folds:
            predictions.merge_folds(sweep.out / task.arm / f"seed{task.seed}", sweep.folds)
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        sums.write(sweep.out)
        print("", *table(sweep.out), sep="\n")
        print(f"next: {next_command(sweep)}")


def next_command(sweep) -> str:
    """What to type after this: the report, with intervals and tests."""
    words = ["python", "evaluate.py", "--classify", sweep.out, "--data", sweep.data]
    if sweep.synthetic:
        words += ["--synthetic", *sweep.synthetic]
    return shlex.join(map(str, words))


if __name__ == "__main__":
    cli.run(main, "classify.py")
