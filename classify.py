"""Do synthetic malignant tiles help a classifier to find real ones? Train the arms of the experiment.

    python classify.py --data data/isic2024 --synthetic runs/synthetic --out runs/classify
    python classify.py --experiments B0 A1 --seeds 1 --arch resnet18 --weights none --image-size 64 --max-benign 3000
    torchrun --nproc-per-node 4 classify.py ...      (each process takes its share of the runs)

Writes RUN/<arm>/seed<k>/predictions.csv (the score of every validation and test tile) and metrics.jsonl, from which
`python evaluate.py --classify RUN` makes the report. What is done is skipped, what was cut off goes on where it was.
"""
import argparse
import itertools
import os
from datetime import timedelta
from pathlib import Path

from lesion.classify import arms
from lesion.run import cli, lock, sums
from lesion.tiles import seen

FREE = ("experiments", "seeds", "synthetic", "synthetic_sha256", "checked", "notes", "counts", "device")  # may differ when a run goes on
STATE = "state.safetensors"
UNRECORDED = ("out", "resume", "save_weights", "synthetic")


def parse(argv=None):
    """The flags; see --help."""
    parser = cli.Parser(prog="classify.py", description=__doc__.split("\n\n")[0])
    group = parser.add_argument_group("tiles")
    group.add_argument("--data", type=Path, default=Path("data/isic2024"), help="prepared data set")
    group.add_argument("--synthetic", type=Path, nargs="+", metavar="DIR",
                       help="generate.py's folder of malignant tiles, for S2 and S2w; with --folds, one a fold")
    group.add_argument("--ratio", type=cli.number(float, above=0), default=1.0,
                       help="synthetic (in O1: repeated real) tiles per real malignant training tile")
    group.add_argument("--max-benign", type=cli.number(int, low=0), default=0, help="benign training tiles; 0 = all")
    group.add_argument("--image-size", type=cli.number(int, low=32, high=1024), default=128, help="side in pixels")
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
    group.add_argument("--seeds", type=cli.number(int, low=1), default=5, help="5 for a table, 1 for a quick look")
    group.add_argument("--seed", type=cli.number(int, low=0), default=0, help="of the splits, and the first seed")
    group.add_argument("--folds", type=cli.number(int, low=2), help="cross-fit over patients: each tile is tested once")
    group = parser.add_argument_group("network and training")
    group.add_argument("--arch", choices=("resnet18", "resnet34", "resnet50"), default="resnet50", help="network")
    group.add_argument("--weights", default="imagenet", help="imagenet, none (from scratch), or a state dict's path")
    group.add_argument("--epochs", type=cli.number(int, low=1), default=12,
                       help="passes over DS1; an arm with more tiles takes the same number of steps")
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
    args = parse(argv)
    with lock.owner(args.out, wanted=int(os.environ.get("RANK", 0)) == 0):
        classify(args)


def classify(args) -> None:
    """Every run that is not done yet, one after the other."""
    import torch

    from lesion.classify import network, predictions
    from lesion.run import devices, folders
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        if args.device == "auto" and torch.cuda.is_available():
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    where = devices.device(args.device)
    if where.type == "cpu":
        devices.keep_freed_memory()
    if args.precision == "auto":
        args.precision = "fp16" if where.type == "cuda" else "fp32"
    args.lr = args.lr or (1e-3 if args.weights == "none" else 1e-4)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False

    # Everything that can be wrong with the input is found before anything is written.
    folds, identity = read_parts(args)
    extra = [arms.extra_count(args.ratio, parts.train) for parts in folds]
    synthetic, checked = read_synthetic(args, folds, extra)
    network.build(args.arch, args.weights, args.seed)
    sums.require(args.data, {row["file_name"] for parts in folds for part in (parts.train, parts.val, parts.test) for row in part})
    for row in (row for chosen in synthetic for row in chosen):
        sums.require(row["folder"], [row["file_name"]])
    images = read_images(args, folds, synthetic)
    recipe = describe(args, folds, extra, identity, synthetic, checked)
    if rank == 0:
        folders.open_run(args.out, recipe, args.resume, FREE)
        sums.begin(args.out)
        for note in recipe["notes"]:
            print(f"note: {note}", flush=True)
    if world > 1:
        torch.distributed.barrier()

    tasks = list(itertools.product(range(args.seeds), range(len(folds)), args.experiments))
    for seed, fold, name in tasks[rank::world]:
        folder = args.out / name / f"seed{seed}"
        place = folder / f"fold{fold}" if args.folds else folder
        title = f"{name} seed {seed}{f' fold {fold}' if args.folds else ''}"
        if finished(place, title):
            print(f"{title}: done before", flush=True)
        else:
            tiles = images(folds[fold], synthetic[fold])
            train_one(args, where, arms.ARMS[name], seed, fold, place, title, folds[fold], tiles, extra[fold])
        if args.folds:
            predictions.merge_folds(folder, args.folds)
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        sums.write(args.out)
        summarise(args)


def finished(place, title):
    """Whether a run's predictions are there as they were written; where they are not, which is said, it is trained anew."""
    if not (place / "predictions.csv").is_file() or (place / STATE).is_file():
        return False  # killed before its hashes were written: they are made again from the last state
    wrong = sums.problems(place) if (place / sums.NAME).is_file() else []
    for line in wrong:
        print(f"{title}: {line}: trained anew", flush=True)
    return not wrong


def read_parts(args):
    """The parts of each fold (one without --folds), checked, and the SHA-256 of all that decides them."""
    from lesion.run import files
    from lesion.tiles.decode import recorded_norm
    rows = files.read_manifest(args.data)
    for row in rows:
        path = args.data / row["file_name"]
        row["sha256"] = row.get("sha256") or (files.sha256_file(path) if path.is_file() else None)
    if args.folds:
        folds = arms.split_folds(rows, args.folds, args.validation_share, args.seed)
    else:
        folds = [arms.split_parts(rows, args.validation_share, args.seed)]
    for parts in folds:
        arms.check_parts(parts, args.accept_overlap)
        parts.train = arms.limit_benign(parts.train, args.max_benign, args.seed)
    keys = ("file_name", "label", "split", "patient_id", "sha256")
    return folds, files.sha256_json([recorded_norm(args.data), *([row.get(key) for key in keys] for row in rows)])


def read_synthetic(args, folds, extra):
    """Rows of synthetic tiles of each fold, and the record of the leak check; empty without an arm that needs them."""
    if not any(arms.ARMS[name].extra == "synthetic" for name in args.experiments):
        return [[] for _ in folds], None
    if not args.synthetic:
        raise ValueError("S2 and S2w need synthetic tiles: give --synthetic DIR (made by generate.py), or leave them "
                         "out with --experiments B0 A1 W1 O1")
    if len(args.synthetic) not in (1, len(folds)):
        raise ValueError(f"--synthetic names {len(args.synthetic)} folders for {len(folds)} folds: give one, or one a "
                         "fold")
    folders = args.synthetic * len(folds) if len(args.synthetic) == 1 else args.synthetic
    rows = [arms.choose_synthetic(folder, count, args.seed) for folder, count in zip(folders, extra)]
    checked = [seen.check_synthetic(folder, chosen, parts, args.accept_unknown_synthetic, args.accept_overlap)
               for folder, chosen, parts in zip(folders, rows, folds)]
    for folder, chosen in zip(folders, rows):
        for row in chosen:
            row["folder"] = folder
    return rows, checked


def read_images(args, folds, synthetic):
    """A function (parts, synthetic rows) -> images_u8 [N,R,R,3], labels [N] of train + synthetic + val + test.

    All tiles are read here, once; unreadable ones leave their part, with a note, and are refused among the synthetic.
    """
    import numpy as np
    import torch

    from lesion.tiles.decode import load_tiles
    rows = {row["file_name"]: row for parts in folds for part in (parts.train, parts.val, parts.test) for row in part}
    tiles = load_tiles(args.data, list(rows.values()), args.image_size, cli.progress)
    images, place = [np.asarray(tiles.images_u8)], {(None, row["file_name"]): i for i, row in enumerate(tiles.rows)}
    for parts in folds:
        for name in ("train", "val", "test"):
            readable = [row for row in getattr(parts, name) if (None, row["file_name"]) in place]
            if lost := len(getattr(parts, name)) - len(readable):
                parts.notes.append(f"{lost} tiles of {name} cannot be read and are left out, as {tiles.unreadable[0]}")
            setattr(parts, name, readable)
        arms.check_parts(parts, args.accept_overlap)
    for folder in {row["folder"]: None for chosen in synthetic for row in chosen}:
        chosen = list({row["file_name"]: row for part in synthetic for row in part if row["folder"] == folder}.values())
        drawn = load_tiles(folder, chosen, args.image_size)
        if drawn.unreadable:
            raise ValueError(f"{len(drawn.unreadable)} synthetic tiles of {folder} cannot be read (first: "
                             f"{drawn.unreadable[0]}): draw them again")
        start = sum(map(len, images))
        place |= {(folder, row["file_name"]): start + i for i, row in enumerate(drawn.rows)}
        images.append(np.asarray(drawn.images_u8))
    stack = torch.from_numpy(np.concatenate(images))

    def of(parts, chosen):
        used = [*parts.train, *chosen, *parts.val, *parts.test]
        index = torch.tensor([place[row.get("folder"), row["file_name"]] for row in used])
        return stack[index], torch.tensor([int(row["label"] == "malignant") for row in used])
    return of


def describe(args, folds, extra, identity, synthetic, checked):
    """args.json: what the runs in the folder share, which --resume compares, and what was found when it was made."""
    import json

    from lesion.run import files
    from lesion.run.state import provenance
    path = args.out / "args.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tiles = [[(row["folder"] / row["file_name"]) for row in chosen] for chosen in synthetic]
    sha = files.sha256_json([[files.sha256_file(tile) for tile in chosen] for chosen in tiles]) if checked else None
    known = old.get("synthetic_sha256")
    if sha and known and sha != known:
        raise ValueError(f"{args.out} holds runs with other synthetic tiles: give another --out")
    notes = list(dict.fromkeys(note for parts in folds for note in parts.notes))
    for record in checked or []:
        if record["accepted_unknown"]:
            notes.append(f"nothing shows what the generator of {record['folder']} has seen "
                         "(--accept-unknown-synthetic)")
        if record["held_back_seen"]:
            notes.append(f"the generator of {record['folder']} saw {record['held_back_seen']} of the tiles held back "
                         "as validation: thresholds and checkpoints of S2 and S2w are chosen on tiles it knew; test "
                         "tiles it never saw")
    flags = {key: value for key, value in vars(args).items() if key not in UNRECORDED}
    counts = [{name: {label: sum(row["label"] == label for row in getattr(parts, name)) for label in arms.LABELS}
               for name in ("train", "val", "test")} | {"added": count} for parts, count in zip(folds, extra)]
    return {**flags, "data": str(args.data), "data_sha256": identity, "synthetic_sha256": sha or known,
            "experiments": [name for name in arms.ARMS
                            if name in args.experiments or name in old.get("experiments", [])],
            "seeds": max(args.seeds, old.get("seeds", 0)), "counts": counts, "checked": checked or old.get("checked"),
            "notes": list(dict.fromkeys(notes + old.get("notes", []))), "provenance": provenance()}


def train_one(args, where, arm, seed, fold, place, title, parts, tiles, extra):
    """Train one arm with one seed, from its saved state if there is one; write metrics.jsonl and predictions.csv."""
    import torch

    from lesion.classify import network, predictions
    from lesion.run import files
    from lesion.run.state import previous_of
    images, labels = (tensor.to(where) for tensor in tiles)
    real, held, tested = len(parts.train), len(parts.val), len(parts.test)
    synthetic = len(images) - real - held - tested
    malignant = [i for i, row in enumerate(parts.train) if row["label"] == "malignant"]
    order = arms.order_of(arm, real, malignant, synthetic, extra)
    index = torch.arange(len(images))
    val, test = index[len(images) - held - tested:len(images) - tested], index[len(images) - tested:]
    per_epoch = -(-real // args.batch_size)
    recipe = network.Recipe(
        steps=args.epochs * per_epoch, steps_per_epoch=per_epoch, batch_size=args.batch_size, lr=args.lr,
        weight_decay=args.weight_decay, weight_power=args.weight_power, precision=args.precision,
        augmentation=args.augmentation if arm.augmented else "none")
    model = network.build(args.arch, args.weights, args.seed + seed).to(where)
    state = place / STATE
    with cli.progress(total=recipe.steps, desc=title, unit="step") as bar:
        def on_epoch(row):
            bar.update(row["step"] - bar.n)
            bar.set_postfix_str(f"loss {row['loss']:.3f} val AUPRC {row['val_auprc']:.3f}")
        train, held_back = (network.Pool(images, labels, part) for part in (torch.tensor(order), val))
        rows = network.fit(model, train, held_back, recipe, args.seed + seed, arm.weighted, state, on_epoch, bar.write)
    scores = [network.predict(model, images, part, args.precision) for part in (val, test)]
    if args.save_weights == "all" or (args.save_weights == "first" and seed == 0):
        network.save(place / "model.safetensors", model, args.arch, args.image_size)
    files.write_jsonl(place / "metrics.jsonl", rows)
    predictions.write(place / "predictions.csv", parts, *scores, fold=fold if args.folds else None)
    sums.write(place, but=(STATE, previous_of(state).name))
    for path in (state, previous_of(state)):
        path.unlink(missing_ok=True)


def summarise(args):
    """The table of what there is, by arm."""
    import numpy as np

    from lesion.classify import predictions
    from lesion.stats import classification
    runs = predictions.read_runs(args.out)
    first = next(iter(next(iter(runs.values())).values()))
    print(f"\ntested on {len(first.labels)} tiles, {first.labels.sum()} malignant; thresholds chosen on validation")
    print(f"{'arm':5}{'seeds':>6}{'recall':>9}{'AUROC':>9}{'AUPRC':>9}   (means; AUPRC by chance "
          f"{first.labels.mean():.3f})")
    for name, seeds in runs.items():
        values = [classification.evaluate(run.labels, run.scores, run.thresholds) for run in seeds.values()]
        means = [np.mean([value[key] for value in values]) for key in ("recall_chosen", "auroc", "auprc")]
        figures = "".join(f"{mean:9.3f}" for mean in means)
        print(f"{name:5}{len(seeds):6}{figures}   {arms.ARMS[name].meaning}")
    print(f"the report, with intervals and tests: python evaluate.py --classify {args.out} --data {args.data}")


if __name__ == "__main__":
    cli.run(main, "classify.py")
