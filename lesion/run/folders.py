"""Run folders: `args.json` (resolved flags, hashes, versions), append-only `metrics.jsonl`, and where defaults come from.

Standard library only. Proven by tests/run/test_folders.py.
"""
import contextlib
import ctypes
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lesion.run import files

ROOT = Path(__file__).resolve().parents[2]
MINI = Path(__file__).resolve().parents[1] / "assets" / "mini"  # the built-in base
DEMO, ISIC = Path("data/demo"), Path("data/isic2024")
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
RECIPE = {"steps": 1400, "lr": 3e-5, "guidance_scale": 7.5, "precision": None}  # the study's, for SD 1.5
# `mini` is 150 times smaller: fewer, larger steps; guidance by its card; too narrow for bf16 to pay
MINI_RECIPE = {"steps": 300, "lr": 5e-4, "guidance_scale": 2.0, "precision": "fp32"}

_FILLED: set[Path] = set()  # folders that `replaced` has given out in this process


def default_inputs(data: Path | None, base: str | None) -> tuple[Path, str, str]:
    """(data, base, a line that says which and why): ISIC and SD 1.5 where prepared, else the demo set and the built-in base."""
    if data is None:
        data = ISIC if (ISIC / files.MANIFEST).is_file() else DEMO
    demo = Path(data).resolve() == DEMO.resolve()
    base = named(base) or (str(MINI) if demo else SD15)
    if base == str(MINI) and not (MINI / "unet").is_dir():
        raise ValueError("no data and no base model: give --data (see `python -m lesion prepare --help`) and --base "
                         f"(a folder, a .safetensors file or a hub id such as {SD15})")
    what = "the demo set of procedural tiles" if demo else f"the tiles of {data}"
    model = "the built-in base model `mini`" if base == str(MINI) else f"the base model {base}"
    hint = f" (the real thing: --data {ISIC} --base {SD15}; README, section \"The real recipe\")" if base == str(MINI) else ""
    return Path(data), base, f"{what}, {model}{hint}"


def named(base: str | None) -> str | None:
    """`mini` is the built-in base, unless a folder is called so; every other name stands."""
    return str(MINI) if base == MINI.name and not Path(base).exists() else base


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


def newest_file(*patterns: str) -> Path | None:
    """The file changed last among those that match a pattern, relative to the working directory; None if there is none."""
    found = {path for pattern in patterns for path in Path().glob(pattern) if path.is_file()}
    return max(found, key=lambda path: (path.stat().st_mtime_ns, str(path)), default=None)


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; on success it takes the place of `folder`, on failure it goes and `folder` stays as it was.

    One rename where there was nothing, else an exchange of the two names in one step (renameat2(2)): killed at any moment,
    the old folder stands there whole or the new one does. Where a system has no exchange, two renames, and the old folder
    is `.NAME.old` between them; the next call puts it back. What killed runs left beside it is swept.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    old = folder.parent / f".{folder.name}.old"
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    for left in folder.parent.iterdir():
        if left == old or (left.name.startswith(f".{folder.name}.") and left.suffix == ".partial" and not _alive(left)):
            shutil.rmtree(left, ignore_errors=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=f".{os.getpid()}.partial"))
    _FILLED.add(new)
    try:
        yield new
        os.chmod(new, 0o777 & ~files._umask())
        for path in sorted(new.rglob("*"), reverse=True):
            _fsync(path)
        _fsync(new)
        if not folder.exists():
            os.rename(new, folder)
        elif not _exchange(new, folder):
            os.rename(folder, old)
            os.rename(new, folder)
            shutil.rmtree(old)
        _fsync(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        _FILLED.discard(new)


def _alive(left: Path) -> bool:
    """Whether the process whose number stands before `.partial` still runs: its folder is not swept. Of our own number are the
    folders that we are filling, and those of a dead process that had the number before us."""
    number = left.stem.rpartition(".")[2]
    if left in _FILLED:
        return True
    if os.name != "posix" or not number.isdigit() or int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names atomically; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def _fsync(path: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_run(folder: Path, recipe: dict, resume: bool, free: tuple[str, ...] = ()) -> bool:
    """Make the run folder, or reopen it with `resume`; True if it was there. Writes `args.json`. ValueError as `check_run`."""
    was_there = check_run(folder, recipe, resume, free)
    files.write_json(Path(folder) / "args.json", recipe)
    return was_there


def check_run(folder: Path, recipe: dict, resume: bool, free: tuple[str, ...] = ()) -> bool:
    """Whether the run folder is there. ValueError if it holds another run, or if the resumed run's recipe differs beyond the `free`
    flags."""
    path = Path(folder) / "args.json"
    if not path.is_file():
        if Path(folder).exists() and any(entry.name[0] != "." for entry in Path(folder).iterdir()):
            raise ValueError(f"{folder} exists and is not a run folder: give another --out")
        return False
    if not resume:
        raise ValueError(f"{folder} holds a run already: give --resume to go on with it, or another --out")
    old = files.read_json(path)
    ignored = {*free, "provenance"}
    changed = [key for key in recipe if key not in ignored and old.get(key) != json.loads(json.dumps(recipe[key]))]
    if changed:
        raise ValueError(f"{folder} cannot be resumed with another recipe: " + ", ".join(
            f"{key} was {old.get(key)!r}, now {recipe[key]!r}" for key in changed))
    return True


def read_metrics(path: Path) -> list[dict]:
    """Rows of a run's log, in order. ValueError, naming the row, without a `step`, or with a value that is no finite
    number; null is "not measured", which a loss never is."""
    rows = files.read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if type(row.get("step")) is not int or not 0 <= row["step"] < 2 ** 53:
            raise ValueError(f"{path}, row {number}: it has no step, a whole number")
        for name, value in row.items():
            known = value is None and name not in ("loss", "val_loss")
            if not known and (type(value) not in (int, float) or not abs(value) < float("inf")):
                raise ValueError(f"{path}, row {number}: {name[:40]!r} is {str(value)[:40]!r}, "
                                 "expected a finite number")
    return rows


def read_args(folder: Path) -> dict:
    """args.json of a run folder, {} where there is none. ValueError where what others take from it is no text."""
    path = Path(folder) / "args.json"
    known = files.read_json(path) if path.is_file() else {}
    for key in ("base", "tokenizer", "vae", "data", "label"):
        if not isinstance(known.get(key), str | None):
            raise ValueError(f"{path} is damaged: {key} is {known[key]!r}, expected text")
    return known


def cut_metrics(path: Path, last_step: int) -> None:
    """Drop the rows after `last_step`: a resumed run writes them again."""
    if Path(path).is_file():
        files.write_jsonl(path, [row for row in read_metrics(path) if row["step"] <= last_step])
