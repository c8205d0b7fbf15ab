"""Run folders: `args.json` (resolved flags, hashes, versions), append-only `metrics.jsonl`, and where defaults come from.

Standard library only. Proven by tests/run/test_folders.py.
"""
import json
from pathlib import Path

from lesion.run import files

ROOT = Path(__file__).resolve().parents[2]
MINI = Path(__file__).resolve().parents[1] / "assets" / "mini"  # the built-in base
DEMO, ISIC = Path("data/demo"), Path("data/isic2024")
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
RECIPE = {"steps": 1400, "lr": 3e-5, "guidance_scale": 7.5}        # the study's, for SD 1.5
MINI_RECIPE = {"steps": 600, "lr": 5e-4, "guidance_scale": 2.0}    # 150 times smaller: fewer, larger steps; guidance by its card


def default_inputs(data: Path | None, base: str | None) -> tuple[Path, str, str]:
    """(data, base, a line that says which and why): ISIC and SD 1.5 where prepared, else the demo set and the built-in base."""
    if data is None:
        data = ISIC if (ISIC / files.MANIFEST).is_file() else DEMO
    demo = Path(data).resolve() == DEMO.resolve()
    if base is None:
        base = str(MINI) if demo else SD15
    if base == str(MINI) and not (MINI / "unet").is_dir():
        raise ValueError("no data and no base model: give --data (see `python -m lesion prepare --help`) and --base "
                         f"(a folder, a .safetensors file or a hub id such as {SD15})")
    what = "the demo set of procedural tiles" if demo else f"the tiles of {data}"
    model = "the built-in base model `mini`" if base == str(MINI) else f"the base model {base}"
    hint = f" (the real thing: --data {ISIC} --base {SD15}; README, section \"The real recipe\")" if base == str(MINI) else ""
    return Path(data), base, f"{what}, {model}{hint}"


def recipe_for(base: str) -> dict:
    """Defaults that depend on the base model: steps, lr and guidance_scale."""
    return MINI_RECIPE if Path(base).resolve() == MINI.resolve() else RECIPE


def fill_recipe(args) -> None:
    """Put the base's defaults where a flag was not given."""
    for name, value in recipe_for(args.base).items():
        if getattr(args, name, 0) is None:
            setattr(args, name, value)


def next_folder(name: str) -> Path:
    """runs/<name>, or runs/<name>-2, -3 ... : the first that does not exist."""
    folder = Path("runs") / name
    number = 2
    while folder.exists():
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


def finished(pattern: str, holding: str = "lora.safetensors") -> list[Path]:
    """Folders of runs/ that match and hold that file, the newest first."""
    found = [folder for folder in Path("runs").glob(pattern) if (folder / holding).is_file()]
    return sorted(found, key=lambda folder: (folder / holding).stat().st_mtime_ns, reverse=True)


def newest(pattern: str, holding: str = "lora.safetensors") -> Path | None:
    """The newest of `finished`, if there is one."""
    return next(iter(finished(pattern, holding)), None)


def open_run(folder: Path, recipe: dict, resume: bool, free: tuple[str, ...] = ()) -> bool:
    """Make the run folder, or reopen it with `resume`; True if it was there. Writes `args.json`.

    ValueError if the folder holds another run, or if the resumed run's recipe differs beyond the `free` flags.
    """
    path = Path(folder) / "args.json"
    if not path.is_file():
        if Path(folder).exists() and any(entry.name[0] != "." for entry in Path(folder).iterdir()):
            raise ValueError(f"{folder} exists and is not a run folder: give another --out")
        files.write_json(path, recipe)
        return False
    if not resume:
        raise ValueError(f"{folder} holds a run already: give --resume to go on with it, or another --out")
    old = files.read_json(path)
    ignored = {*free, "provenance"}
    changed = [key for key in recipe if key not in ignored and old.get(key) != json.loads(json.dumps(recipe[key]))]
    if changed:
        raise ValueError(f"{folder} cannot be resumed with another recipe: " + ", ".join(
            f"{key} was {old.get(key)!r}, now {recipe[key]!r}" for key in changed))
    files.write_json(path, recipe)
    return True


def cut_metrics(path: Path, last_step: int) -> None:
    """Drop the rows after `last_step`: a resumed run writes them again."""
    if Path(path).is_file():
        files.write_jsonl(path, [row for row in files.read_jsonl(path) if row["step"] <= last_step])
