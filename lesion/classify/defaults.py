"""What classify.py takes where a flag was not given: the newest run's data and tiles, and a recipe that fits the base.

Standard library only. Proven by tests/classify/test_defaults.py.
"""
from pathlib import Path

from lesion.run import files, folders
from lesion.tiles import seen

STUDY = {"arch": "resnet50", "weights": "imagenet", "image_size": 128, "epochs": 12, "seeds": 5}  # for SD 1.5
SMALL = {"arch": "resnet18", "weights": "none", "image_size": 64, "epochs": 4, "seeds": 1}        # for mini: minutes on a CPU


def fill(args) -> list[str]:
    """Put a value where a flag was not given; the lines that say which and why.

    data: of the newest LoRA run, else the default set. synthetic: the newest folder whose LoRA learnt from that data. Recipe: the
    study's, or on mini's tiles and the demo set a small one; there a ratio under 1 is taken where only so few tiles are drawn.
    """
    lines, run = [], folders.newest("*")
    known = folders.read_args(run) if run else {}
    if args.data is None:
        args.data, _, _ = folders.default_inputs(Path(known["data"]) if known.get("data") else None, str(folders.MINI))
        lines.append(f"data: {args.data}" + (f", which {run} learnt from" if known.get("data") else ""))
    if args.synthetic is None and any(name.startswith("S2") for name in args.experiments) and (found := newest_tiles(args.data)):
        args.synthetic = [found]
        lines.append(f"synthetic tiles: {found}")
    base = base_of(args.synthetic[0]) if args.synthetic else None
    small = _same(args.data, folders.DEMO) or (base is not None and _same(base, folders.MINI))
    recipe = SMALL if small else STUDY
    taken = {name: value for name, value in recipe.items() if getattr(args, name) is None}
    for name, value in taken.items():
        setattr(args, name, value)
    if small and taken:
        lines.append("a small recipe, for the built-in base or the demo set: "
                     + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in taken.items()))
    if args.ratio is None:
        args.ratio = ratio_for(args) if small and args.synthetic else 1.0
        if args.ratio < 1:
            lines.append(f"only so many synthetic tiles are there: --ratio {args.ratio:g}")
    return lines


def newest_tiles(data: Path) -> Path | None:
    """The newest folder of samples/ or runs/ with malignant tiles of a LoRA that learnt from `data`, if there is one."""
    found = [path for pattern in ("samples/*/provenance.json", "runs/*/provenance.json") for path in Path().glob(pattern)]
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if any(_same(Path(run["data"]), data) and run.get("label") == "malignant" for run in _runs_of(path) if run.get("data")):
            return path.parent
    return None


def base_of(folder: Path) -> Path | None:
    """The base model that a folder of generate.py was drawn with, as it was named; None if it does not say."""
    path = Path(folder) / "provenance.json"
    base = seen.read_provenance(path).get("base") if path.is_file() else None
    return Path(base) if base else None


def _runs_of(provenance: Path) -> list[dict]:
    """args.json of the runs whose LoRA files the folder was drawn with."""
    loras = seen.read_provenance(provenance)["loras"]
    return [folders.read_args(Path(lora.get("file") or "").parent) for lora in loras]


def ratio_for(args) -> float:
    """1, or as many hundredths as there are synthetic tiles for; 0.01 at least (too few are then refused by name)."""
    real = sum(row.get("label") == "malignant" and row.get("split", "train") == "train" for row in files.read_manifest(args.data))
    there = min(sum(row.get("label") == "malignant" for row in files.read_manifest(folder)) for folder in args.synthetic)
    return min(1.0, max(1, there * 100 // max(1, real)) / 100)


def _same(one: Path, other: Path) -> bool:
    return Path(one).resolve() == Path(other).resolve()
