"""`python -m lesion crossfit DATA --out RUN`: the experiment on every tile, by folds, resumable anywhere.

For each fold and each number of real malignant training tiles: a data set (lesion/classify/folds.py), both LoRA phases on its
training part, synthetic tiles, copies dropped, the leak check, the arms at each ratio. Then the folds' test parts together: every
tile tested once, by a model and a generator that saw none of its unit. Each step is one of the scripts, printed as the command a
person would type; what is done is checked by its SHA256SUMS and skipped, what was cut off goes on. When all folds are done, OUT has
SHA256SUMS of its own.
Proven by tests/classify/test_crossfit.py.
"""
import math
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lesion.classify import arms
from lesion.run import cli, files, folders, lock, sums
from lesion.tiles import seen

SPARE = 1.25  # synthetic tiles drawn for one that is needed: copies are dropped
INPUTS = ("--data", "--prompts-from", "--init-lora", "--lora", "--synthetic")  # flags that name what another step wrote


@dataclass(frozen=True)
class Plan:
    """What decides the result: the flags of `python -m lesion crossfit` (see its --help), and what the data set holds."""
    data: str
    data_sha256: str
    base: str
    folds: int
    sizes: tuple[int | None, ...]
    ratios: tuple[float, ...]
    experiments: tuple[str, ...]
    seeds: int
    seed: int
    validation_share: float
    drop_copies: bool
    train: str
    generate: str
    classify: str

    def flags(self) -> dict:
        """As JSON holds them."""
        return asdict(self) | {name: list(getattr(self, name)) for name in ("sizes", "ratios", "experiments")}


@dataclass(frozen=True)
class Place:
    """One fold at one size: where its steps write."""
    fold: int
    size: int | None
    folder: Path

    @property
    def name(self) -> str:
        """For titles."""
        return f"fold {self.fold}, {size_name(self.size)} real malignant training tiles"


def parse(argv: list[str]):
    """The flags; see --help."""
    parser = cli.Parser(prog="lesion crossfit", description=__doc__.split("\n\n")[0].split(": ", 1)[1])
    parser.add_argument("data", type=Path, help="prepared data set; its tiles are dealt anew to folds, whole patients")
    parser.add_argument("--out", type=Path, required=True, help="folder of the whole experiment; called again, it goes on")
    group = parser.add_argument_group("experiment")
    group.add_argument("--folds", type=cli.number(int, low=2), default=5, help="each tile is tested in one of them")
    group.add_argument("--sizes", type=_size, nargs="+", default=[None], metavar="N",
                       help="real malignant training tiles a fold, or `all`; each is an experiment of its own, LoRA included")
    group.add_argument("--ratios", type=cli.number(float, above=0), nargs="+", default=[1.0], metavar="R",
                       help="synthetic (in O1: repeated real) tiles per real malignant training tile")
    group.add_argument("--experiments", nargs="+", choices=list(arms.ARMS), default=["A1", "O1", "S2"], metavar="ARM", help="arms")
    group.add_argument("--seeds", type=cli.number(int, low=1), default=3, help="classifiers an arm, fold, size and ratio")
    group.add_argument("--seed", type=cli.number(int, low=0), default=0, help="of the folds, and the first of the rest")
    group.add_argument("--validation-share", type=cli.number(float, low=0.05, high=0.5), default=0.2,
                       help="of the tiles that are not tested, held back to choose by")
    group = parser.add_argument_group("steps")
    group.add_argument("--base", default=str(folders.MINI), help="base model of the LoRA")
    group.add_argument("--keep-copies", action="store_true",
                       help="leave the search for copies out (it needs some 200 held-out tiles a fold to set its limit)")
    group.add_argument("--train", default="", metavar="FLAGS", help="further flags of train_lora.py, both phases, in quotes")
    group.add_argument("--generate", default="", metavar="FLAGS", help="further flags of generate.py")
    group.add_argument("--classify", default="", metavar="FLAGS", help="further flags of classify.py")
    group.add_argument("--only-fold", type=cli.number(int, low=0), nargs="+", metavar="F",
                       help="do the steps of these folds only: several machines can share a RUN")
    return parser.parse_args(argv)


def _size(text: str) -> int | None:
    return None if text == "all" else cli.number(int, low=2)(text)


def main(argv: list[str]) -> None:
    """Every step that is not done yet; then the answer, as far as all folds have one."""
    args = parse(argv)
    rows = files.read_manifest(args.data)
    arms.check_rows(rows)
    sums.require(args.data, [files.MANIFEST, files.DATASET, *(row["file_name"] for row in rows)])
    for row in rows:
        row["sha256"] = row.get("sha256") or files.sha256_file(args.data / row["file_name"])
    keys = ("file_name", "label", "split", "patient_id", "sha256", "text")
    identity = files.sha256_json([[row.get(key) for key in keys] for row in rows])
    ratios = args.ratios if set(args.experiments) - set(arms.RATIO_FREE) else args.ratios[:1]  # the others would be the same
    plan = Plan(str(args.data), identity, args.base, args.folds, tuple(dict.fromkeys(args.sizes)), tuple(dict.fromkeys(ratios)),
                tuple(name for name in arms.ARMS if name in args.experiments), args.seeds, args.seed, args.validation_share,
                not args.keep_copies, args.train, args.generate, args.classify)
    chosen = range(args.folds) if args.only_fold is None else [fold for fold in args.only_fold if fold < args.folds]
    with lock.owner(args.out, shared=True):
        sums.require(args.out, ["args.json", "folds.json"])
        folders.open_run(args.out, plan.flags(), resume=True, free=("seeds", "sizes", "ratios"))
        sums.begin(args.out)
        places = prepare(plan, rows, args.out)
        for place in places:
            if place.fold in chosen:
                run_place(plan, place)
        if answer(plan, places, args.out):
            seal(args.out)


def seal(out: Path) -> None:
    """SHA256SUMS of all in OUT that lies in no folder with SHA256SUMS of its own."""
    own = {path.parent for path in out.rglob(f"*/{sums.NAME}")}
    sums.write(out, but=tuple(name for name in sums.artefacts(out) if not own.isdisjoint((out / name).parents)))


def prepare(plan: Plan, rows: list[dict], out: Path) -> list[Place]:
    """Write the data set of every fold and size; where they are. The folds are kept in OUT/folds.json: seconds to read again."""
    from lesion.classify import folds
    path = out / "folds.json"
    if path.is_file():
        units, parts = read_folds(path, len(rows), plan.folds)
    else:
        units = folds.units_of(Path(plan.data), rows, cli.progress)
        parts = folds.split(rows, units, plan.folds, plan.validation_share, plan.seed)
        files.write_json(path, {"units": units, "parts": parts})
    places = []
    for fold, part in enumerate(parts):
        for size in plan.sizes:
            place = Place(fold, size, out / f"fold{fold}" / size_name(size))
            if not is_sealed(place.folder / "data"):
                folds.write(Path(plan.data), rows, units, folds.limit(rows, part, size, plan.seed), place.folder / "data")
                sums.write(place.folder / "data")
                sums.update(place.folder / "data", *(row["file_name"] for row in files.read_manifest(place.folder / "data")))
            sums.require(place.folder / "data")
            places.append(place)
    return places


def read_folds(path: Path, tiles: int, folds: int) -> tuple[list[str], list[list[str]]]:
    """(units, parts) of folds.json; ValueError if it does not deal so many tiles to so many folds."""
    known = files.read_json(path)
    units, parts = known.get("units"), known.get("parts")
    lists = [units, *parts] if isinstance(parts, list) and len(parts) == folds else [None]
    if not all(isinstance(one, list) and len(one) == tiles and all(isinstance(name, str) for name in one) for one in lists) or \
            not {name for part in parts for name in part} <= {"train", "val", "test"}:
        raise ValueError(f"{path} is damaged: it does not deal {tiles} tiles to {folds} folds; delete it, and the same deal is made anew")
    return units, parts


def is_sealed(data: Path) -> bool:
    """Whether a fold's data set has all its hashes, those of the tiles that it links to among them."""
    if not all((data / name).is_file() for name in (sums.NAME, files.MANIFEST)):
        return False
    listed = sums.read(data)
    return all(row["file_name"] in listed for row in files.read_manifest(data))


def size_name(size: int | None) -> str:
    """`all`, or the number: what folders and titles say."""
    return "all" if size is None else str(size)


# --------------------------------------------------------------------------------------------------------------- steps

def steps_of(plan: Plan, place: Place, malignant: int) -> list[tuple[Path, list[str]]]:
    """(folder that is written, script and flags) of each step of a fold at a size, in order."""
    folder, data = place.folder, place.folder / "data"
    seed = ["--seed", str(plan.seed)]
    count = math.ceil(SPARE * max(plan.ratios) * malignant)
    common = ["--data", str(data), "--base", plan.base, *seed, *shlex.split(plan.train)]
    first, second, drawn = (folder / name for name in ("phase1", "phase2", "drawn"))
    kept = tiles_of(plan, place)
    steps = []
    if any(arms.ARMS[name].extra == "synthetic" for name in plan.experiments):
        steps = [(first, ["train_lora.py", "--phase", "1", "--init-lora", "none", "--out", str(first), *common]),
                 (second, ["train_lora.py", "--phase", "2", "--init-lora", str(first / "lora.safetensors"), "--out", str(second), *common]),
                 (drawn, ["generate.py", "--base", plan.base, "--lora", str(second / "lora.safetensors"), "--prompts-from", str(data),
                          "--label", "malignant", "--count", str(count), "--out", str(drawn), *seed, *shlex.split(plan.generate)])]
    if steps and plan.drop_copies:
        steps.append((kept, ["evaluate.py", "--synthetic", str(drawn), "--data", str(data), "--out", str(folder / "pictures"),
                             "--drop-copies", str(kept.parent)]))
    for number, ratio in enumerate(plan.ratios):
        names = [name for name in plan.experiments if number == 0 or name not in arms.RATIO_FREE]
        synthetic = ["--synthetic", str(kept)] if any(arms.ARMS[name].extra == "synthetic" for name in names) else []
        if names:
            out = folder / arms.ratio_name(ratio)
            steps.append((out, ["classify.py", "--data", str(data), *synthetic, "--ratio", f"{ratio:g}", "--experiments", *names,
                                "--seeds", str(plan.seeds), *seed, "--out", str(out), "--save-weights", "none",
                                *shlex.split(plan.classify)]))
    return steps


def tiles_of(plan: Plan, place: Place) -> Path:
    """Where the synthetic tiles lie that the classifiers learn from."""
    return place.folder / "kept" / "drawn" if plan.drop_copies else place.folder / "drawn"


def run_place(plan: Plan, place: Place) -> None:
    """The steps of one fold at one size that are not done; the leak check before any classifier learns from the pictures."""
    rows = files.read_manifest(place.folder / "data")
    malignant = sum(row["split"] == "train" and row["label"] == "malignant" for row in rows)
    for folder, command in steps_of(plan, place, malignant):
        if command[0] == "classify.py" and "--synthetic" in command:
            check_leaks(place, rows, tiles_of(plan, place))
        run_step(place, folder, command)


def run_step(place: Place, folder: Path, command: list[str]) -> None:
    """Run a script unless `folder` is its finished work: SHA256SUMS is there, holds, and the command and its inputs were the same.

    What it took is appended to seconds.jsonl. ValueError if a file is not as it was written, the script fails, or arms would go on
    that learned from other tiles (a larger ratio draws more).
    """
    record = folder.parent / f".{folder.name}.command.json"
    work = {"command": shlex.join(["python", *command]), "inputs": inputs_of(command)}
    if (folder / sums.NAME).is_file() and record.is_file():
        before = files.read_json(record)
        if {key: before.get(key) for key in work} == work:
            sums.require(folder)
            print(f"{place.name}: {folder.name} is done", flush=True)
            return
        if command[0] == "classify.py" and before.get("inputs", work["inputs"]) != work["inputs"]:
            raise ValueError(f"{place.name}: the arms in {folder} learned from other tiles than they would now (a larger ratio draws "
                             "more): remove that folder, and they are trained anew")
    print(f"\n{place.name}\n$ {work['command']}", flush=True)
    resume = ["--resume"] if command[0] == "train_lora.py" and (folder / "args.json").is_file() else []
    began = time.monotonic()
    code = execute([*command, *resume])
    if code:
        raise ValueError(f"{place.name}: {command[0]} ended with exit code {code}; the same command goes on from here")
    if not (folder / sums.NAME).is_file():
        sums.write(folder)
    files.write_json(record, work)
    files.append_jsonl(place.folder / "seconds.jsonl", {"step": folder.name, "script": command[0],
                                                        "seconds": round(time.monotonic() - began, 1), "resumed": bool(resume)})


def inputs_of(command: list[str]) -> dict[str, str | None]:
    """{flag: SHA-256 of the SHA256SUMS of the folder that it names, or of a named file's folder}; None where there is none."""
    named = {flag: Path(value) for flag, value in zip(command, command[1:]) if flag in INPUTS}
    lists = {flag: (path if path.is_dir() else path.parent) / sums.NAME for flag, path in named.items()}
    return {flag: files.sha256_file(path) if path.is_file() else None for flag, path in lists.items()}


def execute(command: list[str]) -> int:
    """Run a script of this project; its exit code."""
    return subprocess.run([sys.executable, str(folders.ROOT / command[0]), *command[1:]], check=False).returncode


def check_leaks(place: Place, rows: list[dict], tiles: Path) -> None:
    """ValueError if the fold's generator has seen a tile that is tested or chosen by, its patient or a near copy of it."""
    from lesion.classify import folds
    for lora in seen.read_provenance(tiles / "provenance.json")["loras"]:
        if not lora["train_files"]:
            raise ValueError(f"{place.name}: nothing says what the LoRA {lora.get('file')} has seen")
        if found := folds.leaks(lora["train_files"], rows):
            raise ValueError(f"{place.name}: the LoRA {lora.get('file')} has seen {len(found)} held-out tiles (first: {found[0]})")


# -------------------------------------------------------------------------------------------------------------- answer

def answer(plan: Plan, places: list[Place], out: Path) -> bool:
    """Join the folds of every size and ratio that all folds have done, and write OUT/curve.json and OUT/curve.png; whether that is
    all of them."""
    from lesion.classify import curve
    points, whole = [], True
    for size in plan.sizes:
        for ratio in plan.ratios:
            mine = [place for place in places if place.size == size]
            folder = out / "answer" / f"{size_name(size)}-{arms.ratio_name(ratio)}"
            missing = join(plan, mine, ratio, folder)
            if missing:
                whole = False
                print(f"{folder.name}: not all folds are done yet (first missing: {missing[0]})", flush=True)
            else:
                counts = files.read_json(folder / "args.json")["counts"]
                real = sum(count["train"]["malignant"] for count in counts) / len(counts)
                points.append(curve.point(size, ratio, real, [runs_of(plan, place, ratio) for place in mine]))
    if points:
        found = curve.summary(points)
        files.write_json(out / "curve.json", found)
        curve.draw(found, out / "curve.png")
        print(*curve.lines(found), sep="\n")
        most = size_name(None if None in plan.sizes else max(plan.sizes))  # the primary contrast's
        first = out / "answer" / f"{most}-{arms.ratio_name(plan.ratios[0])}"
        print(f"next: {shlex.join(['python', 'evaluate.py', '--classify', str(first), '--data', plan.data])}")
    return whole


def runs_of(plan: Plan, place: Place, ratio: float) -> dict[str, list]:
    """arm -> the runs of a fold (predictions.Run), one a seed."""
    from lesion.classify import predictions
    found = [(at, predictions.read_runs(place.folder / arms.ratio_name(at))) for at in (plan.ratios[0], ratio)]
    runs = {name: seeds for at, some in found for name, seeds in some.items() if at == ratio or name in arms.RATIO_FREE}
    return {name: [runs[name][seed] for seed in range(plan.seeds)] for name in plan.experiments}


def join(plan: Plan, places: list[Place], ratio: float, folder: Path) -> list[Path]:
    """Write `folder` as a run of classify.py whose test part is every tile; or give the predictions that are not there yet."""
    from lesion.classify import predictions
    missing, tables, notes, counts, checked = [], {}, [], [], []
    for place in places:
        for name in plan.experiments:
            run = place.folder / arms.ratio_name(plan.ratios[0] if name in arms.RATIO_FREE else ratio)
            for seed in range(plan.seeds):
                path = run / name / f"seed{seed}" / "predictions.csv"
                if path.is_file():
                    tables.setdefault(f"{name}/seed{seed}", []).append(path)
                else:
                    missing.append(path)
    if missing:
        return missing
    for place in places:
        path = place.folder / arms.ratio_name(ratio) / "args.json"
        args = predictions.read_args(path.parent)
        if not {"notes", "counts", "checked"} <= args.keys():
            raise ValueError(f"{path} is missing or damaged: it does not say how the run was made; restore it")
        notes, counts, checked = notes + args["notes"], counts + args["counts"], checked + (args["checked"] or [])
    sums.begin(folder)
    for name, paths in tables.items():
        predictions.join(paths, folder / name / "predictions.csv")
    unknown = [row for row in files.read_manifest(Path(plan.data)) if not row.get("patient_id")]
    if unknown:
        notes.append(f"the patients of {len(unknown)} tiles are unknown: the unit of a fold is then the tile with its near copies, and two "
                     "tiles of one patient can be in different folds")
    if folders.recipe_for(plan.base) is folders.MINI_RECIPE:
        notes.append("the built-in base was taught with benign tiles of ISIC 2024 (lesion/assets/mini/README.md): where they are tested "
                     "here, the generator has seen them")
    files.write_json(folder / "args.json", args | {
        "data": plan.data, "data_sha256": plan.data_sha256, "folds": plan.folds, "experiments": list(plan.experiments), "ratio": ratio,
        "counts": counts, "checked": checked, "notes": list(dict.fromkeys(notes)), "crossfit": plan.flags()})
    sums.write(folder)
    return []
