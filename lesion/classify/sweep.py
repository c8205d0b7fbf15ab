"""The sweep that classify.py runs: its recipe, its tiles, one training run, its table.

Everything that can be wrong with the input is found by `read_inputs`, before anything is written.
Proven by tests/classify/test_classify_script.py and tests/classify/test_sweep.py.
"""
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lesion.classify import arms, network, predictions
from lesion.run import cli, files, sums
from lesion.run.state import previous_of, provenance
from lesion.stats import classification
from lesion.tiles import seen
from lesion.tiles.decode import load_tiles, recorded_norm
from lesion.tiles.seen import Parts

UNRECORDED = ("out", "resume", "save_weights", "synthetic")
STATE = "state.safetensors"  # of a run that is still being trained
LEAST_TESTED = 2  # tiles of each class in the test part: with one, no interval of any score can be computed


@dataclass(frozen=True)
class Sweep:
    """Everything that a sweep was told: the flags of classify.py (units and ranges in its --help), resolved."""
    data: Path
    synthetic: tuple[Path, ...]
    ratio: float
    max_benign: int
    image_size: int
    validation_share: float
    accept_overlap: bool
    accept_unknown_synthetic: bool
    experiments: tuple[str, ...]
    seeds: int
    seed: int
    folds: int | None
    arch: str
    weights: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    weight_power: float
    augmentation: str
    precision: str
    device: str
    out: Path
    resume: bool
    save_weights: str

    @classmethod
    def of_flags(cls, flags: dict, where: torch.device) -> "Sweep":
        """The sweep of parsed flags: where one was not given, the weights' default (lr) or the device's (precision)."""
        known = {field.name: flags[field.name] for field in fields(cls)}
        if known["precision"] == "auto":
            known["precision"] = "fp16" if where.type == "cuda" else "fp32"
        known["lr"] = known["lr"] or (1e-3 if known["weights"] == "none" else 1e-4)
        return cls(**known | {"synthetic": tuple(known["synthetic"] or ()), "experiments": tuple(known["experiments"])})

    def flags(self) -> dict:
        """The flags that args.json records, as JSON can hold them."""
        return {key: value for key, value in vars(self).items() if key not in UNRECORDED} | {
            "data": str(self.data), "experiments": list(self.experiments)}


@dataclass(frozen=True)
class Inputs:
    """The tiles of a sweep, checked: per fold (one without --folds) its parts, the number of malignant tiles that arms add, the
    rows of its synthetic tiles; `identity`: SHA-256 of all that decides the parts; `checked`: the leak check's record or None;
    images(fold) gives images_u8 [N,R,R,3] and labels [N] of train + synthetic + val + test."""
    folds: list[Parts]
    extra: list[int]
    synthetic: list[list[dict]]
    identity: str
    checked: list[dict] | None
    images: Callable[[int], tuple[Tensor, Tensor]]


# -------------------------------------------------------------------------------------------------------------- inputs

def read_inputs(sweep: Sweep) -> Inputs:
    """All tiles, read once and checked against SHA256SUMS where there is one. ValueError for whatever is wrong with them."""
    folds, identity = read_parts(sweep)
    extra = [arms.extra_count(sweep.ratio, parts.train) for parts in folds]
    synthetic, checked = read_synthetic(sweep, folds, extra)
    network.build(sweep.arch, sweep.weights, sweep.seed)  # weights that cannot be had are found here
    used = {row["file_name"] for parts in folds for part in (parts.train, parts.val, parts.test) for row in part}
    sums.require(sweep.data, {files.MANIFEST, files.DATASET, *used})
    for folder in {row["folder"]: None for chosen in synthetic for row in chosen}:
        sums.require(folder, {row["file_name"] for chosen in synthetic for row in chosen if row["folder"] == folder})
    stack, place = read_images(sweep, folds, synthetic)

    def images(fold: int) -> tuple[Tensor, Tensor]:
        parts = folds[fold]
        used = [*parts.train, *synthetic[fold], *parts.val, *parts.test]
        index = torch.tensor([place[row.get("folder"), row["file_name"]] for row in used])
        return stack[index], torch.tensor([int(row["label"] == "malignant") for row in used])

    return Inputs(folds, extra, synthetic, identity, checked, images)


def read_parts(sweep: Sweep) -> tuple[list[Parts], str]:
    """The parts of each fold (one without --folds), checked, and the SHA-256 of all that decides them."""
    rows = files.read_manifest(sweep.data)
    for row in rows:
        path = sweep.data / row["file_name"]
        row["sha256"] = row.get("sha256") or (files.sha256_file(path) if path.is_file() else None)
    if sweep.folds:
        folds = arms.split_folds(rows, sweep.folds, sweep.validation_share, sweep.seed)
    else:
        folds = [arms.split_parts(rows, sweep.validation_share, sweep.seed)]
    for parts in folds:
        arms.check_parts(parts, sweep.accept_overlap)
        check_tested(parts)
        parts.train = arms.limit_benign(parts.train, sweep.max_benign, sweep.seed)
    keys = ("file_name", "label", "split", "patient_id", "sha256")
    return folds, files.sha256_json([recorded_norm(sweep.data), *([row.get(key) for key in keys] for row in rows)])


def check_tested(parts: Parts) -> None:
    """ValueError if the test part has fewer than LEAST_TESTED tiles of a class: hours of training would end without a figure."""
    for label in arms.LABELS:
        if (count := sum(row["label"] == label for row in parts.test)) < LEAST_TESTED:
            raise ValueError(f"the test part has {count} {label} tile: at least {LEAST_TESTED} are needed for any interval; prepare "
                             "the data with a larger test part, or cross-fit with --folds")


def read_synthetic(sweep: Sweep, folds: list[Parts], extra: list[int]) -> tuple[list[list[dict]], list[dict] | None]:
    """Rows of synthetic tiles of each fold, and the record of the leak check; empty without an arm that needs them."""
    if not any(arms.ARMS[name].extra == "synthetic" for name in sweep.experiments):
        return [[] for _ in folds], None
    if not sweep.synthetic:
        raise ValueError("S2 and S2w need synthetic tiles: give --synthetic DIR (made by generate.py), or leave them "
                         "out with --experiments B0 A1 W1 O1")
    if len(sweep.synthetic) not in (1, len(folds)):
        raise ValueError(f"--synthetic names {len(sweep.synthetic)} folders for {len(folds)} folds: give one, or one a "
                         "fold")
    folders = sweep.synthetic * len(folds) if len(sweep.synthetic) == 1 else sweep.synthetic
    for folder, count, parts in zip(folders, extra, folds):
        check_count(folder, count, parts)
    rows = [arms.choose_synthetic(folder, count, sweep.seed) for folder, count in zip(folders, extra)]
    checked = [seen.check_synthetic(folder, chosen, parts, sweep.accept_unknown_synthetic, sweep.accept_overlap)
               for folder, chosen, parts in zip(folders, rows, folds)]
    for folder, chosen in zip(folders, rows):
        for row in chosen:
            row["folder"] = folder
    return rows, checked


def check_count(folder: Path, count: int, parts: Parts) -> None:
    """ValueError if a synthetic folder holds fewer than `count` malignant tiles, with the --ratio that fits what is there."""
    if not (Path(folder) / files.MANIFEST).is_file():
        return  # arms.choose_synthetic says what is wrong with it
    there = malignant_tiles(folder)
    fits = largest_ratio(there, sum(row["label"] == "malignant" for row in parts.train))
    if there < count:
        raise ValueError(f"{folder} holds {there} synthetic malignant tiles and {count} are needed: draw more with "
                         f"`python generate.py --count {count}`" + (f", or take --ratio {fits:g}" if fits else ""))


def malignant_tiles(folder: Path) -> int:
    """How many malignant tiles a folder's manifest lists."""
    return sum(row.get("label") == "malignant" for row in files.read_manifest(folder))


def largest_ratio(synthetic: int, real: int) -> float:
    """The largest --ratio, in hundredths, for which so many synthetic tiles suffice; 0 where not one in a hundred."""
    return synthetic * 100 // real / 100


def read_images(sweep: Sweep, folds: list[Parts], synthetic: list[list[dict]]) -> tuple[Tensor, dict[tuple, int]]:
    """All tiles, uint8 [N,R,R,3], and where each lies: {(synthetic folder or None, file name): row}.

    Unreadable ones leave their part, with a note, and are refused among the synthetic.
    """
    rows = {row["file_name"]: row for parts in folds for part in (parts.train, parts.val, parts.test) for row in part}
    tiles = load_tiles(sweep.data, list(rows.values()), sweep.image_size, cli.progress)
    images, place = [np.asarray(tiles.images_u8)], {(None, row["file_name"]): i for i, row in enumerate(tiles.rows)}
    for parts in folds:
        for name in ("train", "val", "test"):
            readable = [row for row in getattr(parts, name) if (None, row["file_name"]) in place]
            if lost := len(getattr(parts, name)) - len(readable):
                parts.notes.append(f"{lost} tiles of {name} cannot be read and are left out, as {tiles.unreadable[0]}")
            setattr(parts, name, readable)
        arms.check_parts(parts, sweep.accept_overlap)
        check_tested(parts)
    for folder in {row["folder"]: None for chosen in synthetic for row in chosen}:
        chosen = list({row["file_name"]: row for part in synthetic for row in part if row["folder"] == folder}.values())
        drawn = load_tiles(folder, chosen, sweep.image_size)
        if drawn.unreadable:
            raise ValueError(f"{len(drawn.unreadable)} synthetic tiles of {folder} cannot be read (first: "
                             f"{drawn.unreadable[0]}): draw them again")
        start = sum(map(len, images))
        place |= {(folder, row["file_name"]): start + i for i, row in enumerate(drawn.rows)}
        images.append(np.asarray(drawn.images_u8))
    return torch.from_numpy(np.concatenate(images)), place


def describe(sweep: Sweep, inputs: Inputs) -> dict:
    """args.json: what the runs in the folder share, which --resume compares, and what was found when it was made.

    ValueError if the folder holds runs with other synthetic tiles.
    """
    old = predictions.read_args(sweep.out)
    tiles = [[row["folder"] / row["file_name"] for row in chosen] for chosen in inputs.synthetic]
    sha = files.sha256_json([[files.sha256_file(tile) for tile in chosen] for chosen in tiles]) if inputs.checked else None
    known = old.get("synthetic_sha256")
    if sha and known and sha != known:
        raise ValueError(f"{sweep.out} holds runs with other synthetic tiles: give another --out")
    counts = [{name: {label: sum(row["label"] == label for row in getattr(parts, name)) for label in arms.LABELS}
               for name in ("train", "val", "test")} | {"added": count} for parts, count in zip(inputs.folds, inputs.extra)]
    return {**sweep.flags(), "data_sha256": inputs.identity, "synthetic_sha256": sha or known,
            "weights_sha256": files.sha256_file(Path(sweep.weights)) if Path(sweep.weights).is_file() else None,
            "experiments": [name for name in arms.ARMS if name in sweep.experiments or name in old.get("experiments", [])],
            "seeds": max(sweep.seeds, old.get("seeds", 0)), "counts": counts, "checked": inputs.checked or old.get("checked"),
            "notes": list(dict.fromkeys(notes_of(inputs) + old.get("notes", []))), "provenance": provenance()}


def notes_of(inputs: Inputs) -> list[str]:
    """What a reader of the figures must know about the parts and the generators."""
    notes = list(dict.fromkeys(note for parts in inputs.folds for note in parts.notes))
    for record in inputs.checked or []:
        if record["accepted_unknown"]:
            notes.append(f"nothing shows what the generator of {record['folder']} has seen (--accept-unknown-synthetic)")
        if record["held_back_seen"]:
            notes.append(f"the generator of {record['folder']} saw {record['held_back_seen']} of the tiles held back "
                         "as validation: thresholds and checkpoints of S2 and S2w are chosen on tiles it knew; test "
                         "tiles it never saw")
    return notes


# ------------------------------------------------------------------------------------------------------------ training

@dataclass(frozen=True)
class Task:
    """One training run of a sweep: an arm with a seed on a fold, and where its files go."""
    seed: int
    fold: int
    arm: str
    place: Path
    title: str


def tasks_of(sweep: Sweep) -> list[Task]:
    """Every run of the sweep, seed by seed."""
    tasks = []
    for seed in range(sweep.seeds):
        for fold in range(sweep.folds or 1):
            for name in sweep.experiments:
                folder = sweep.out / name / f"seed{seed}"
                place = folder / f"fold{fold}" if sweep.folds else folder
                tasks.append(Task(seed, fold, name, place, f"{name} seed {seed}{f' fold {fold}' if sweep.folds else ''}"))
    return tasks


def problems_of(task: Task) -> list[str] | None:
    """None if a run's predictions are not there yet; else what of it is not as it was written (nothing: it is done)."""
    if not (task.place / "predictions.csv").is_file() or (task.place / STATE).is_file():
        return None  # killed before its hashes were written: they are made again from the last state
    return sums.problems(task.place) if (task.place / sums.NAME).is_file() else []


def recipe_of(sweep: Sweep, arm: arms.Arm, real: int) -> network.Recipe:
    """How an arm trains where DS1 holds `real` tiles: every arm takes the same number of steps."""
    per_epoch = -(-real // sweep.batch_size)
    return network.Recipe(
        steps=sweep.epochs * per_epoch, steps_per_epoch=per_epoch, batch_size=sweep.batch_size, lr=sweep.lr,
        weight_decay=sweep.weight_decay, weight_power=sweep.weight_power, precision=sweep.precision,
        augmentation=sweep.augmentation if arm.augmented else "none")


def train_one(sweep: Sweep, inputs: Inputs, task: Task, where: torch.device) -> None:
    """Train one arm with one seed, from its saved state if there is one; write metrics.jsonl and predictions.csv."""
    arm, parts, seed = arms.ARMS[task.arm], inputs.folds[task.fold], sweep.seed + task.seed
    images, labels = (tensor.to(where) for tensor in inputs.images(task.fold))
    real, synthetic, held = len(parts.train), len(inputs.synthetic[task.fold]), len(parts.val)
    malignant = [i for i, row in enumerate(parts.train) if row["label"] == "malignant"]
    order = torch.tensor(arms.order_of(arm, real, malignant, synthetic, inputs.extra[task.fold]))
    index = torch.arange(len(images))
    val, test = index[real + synthetic:real + synthetic + held], index[real + synthetic + held:]
    recipe, state = recipe_of(sweep, arm, real), task.place / STATE
    model = network.build(sweep.arch, sweep.weights, seed).to(where)
    with cli.progress(total=recipe.steps, desc=task.title, unit="step") as bar:
        def on_epoch(row: dict) -> None:
            bar.update(row["step"] - bar.n)
            bar.set_postfix_str(f"loss {row['loss']:.3f} val AUPRC {row['val_auprc']:.3f}")
        rows = network.fit(model, network.Pool(images, labels, order), network.Pool(images, labels, val), recipe, seed, arm.weighted,
                           state, on_epoch, bar.write)
    scores = [network.predict(model, images, part, sweep.precision) for part in (val, test)]
    if sweep.save_weights == "all" or (sweep.save_weights == "first" and task.seed == 0):
        network.save(task.place / "model.safetensors", model, sweep.arch, sweep.image_size)
    files.write_jsonl(task.place / "metrics.jsonl", rows)
    predictions.write(task.place / "predictions.csv", parts, *scores, fold=task.fold if sweep.folds else None)
    sums.write(task.place, but=(STATE, previous_of(state).name))
    for path in (state, previous_of(state)):
        path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------- table

def table(out: Path) -> list[str]:
    """Lines: means over seeds of each arm of a run folder."""
    runs = predictions.read_runs(out)
    first = next(iter(next(iter(runs.values())).values()))
    lines = [f"tested on {len(first.labels)} tiles, {first.labels.sum()} malignant; thresholds chosen on validation",
             f"{'arm':5}{'seeds':>6}{'recall':>9}{'AUROC':>9}{'AUPRC':>9}   (means; AUPRC by chance {first.labels.mean():.3f})"]
    for name, seeds in runs.items():
        values = [classification.evaluate(run.labels, run.scores, run.thresholds) for run in seeds.values()]
        means = [np.mean([value[key] for value in values]) for key in ("recall_chosen", "auroc", "auprc")]
        lines.append(f"{name:5}{len(seeds):6}" + "".join(f"{mean:9.3f}" for mean in means) + f"   {arms.ARMS[name].meaning}")
    return lines
