"""`python -m lesion verify PATH...`: is everything in these folders still what the commands wrote, and does every number follow?

Of each folder: the SHA-256 of every artefact that SHA256SUMS (a report: manifest.json, a study: study.json) lists, and that there are no
others; the hash that each saved state carries; every tile against its row in metadata.jsonl; a study's answers.csv against its journals; a
report's results.json, report.md and report.html against a report computed anew from predictions.csv, answers and pictures. What differs is
named, file by file and number by number; then the exit code is 1. Proven by tests/report/test_verify.py.
"""
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from lesion.run import cli, files, sums

UNHASHED = re.compile(r"(.*/)?timing\.jsonl|labels/.*")  # times, which differ from run to run; answers of people, who go on
SEALS = (sums.NAME, "manifest.json", "study.json")
TOLERANCE = 1e-9  # relative: the last digits of a float64 mean depend on the machine's vector unit


def parse(argv: list[str]):
    """The flags; see --help."""
    parser = cli.Parser(prog="lesion verify", description="Recompute every hash and every number of folders that our commands wrote.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="PATH", help="data set, run, synthetic folder, study, report")
    parser.add_argument("--hashes-only", action="store_true", help="do not compute a report anew")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args, wrong = parse(argv), 0
    for folder in args.folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; give what a command wrote")
        checked, found = 0, []
        for what, problem in verify(folder, not args.hashes_only, cli.progress):
            checked += 1
            if problem:
                found.append(problem)
                print(f"{what}: {problem}", flush=True)
        print(f"{folder}: {checked} checks, {f'{len(found)} WRONG' if found else 'all as written'}", flush=True)
        wrong += bool(found)
    if wrong:
        sys.exit(1)


def verify(folder: Path, recompute: bool = True, progress: Callable | None = None) -> Iterator[tuple[str, str]]:
    """(what was checked, what is wrong with it or "") of everything in a folder; at least one."""
    folder = Path(folder)
    known = False
    for place in sorted({folder, *(path.parent for path in folder.rglob(sums.NAME))}):
        if (place / sums.NAME).is_file():
            known = True
            yield from _hashes(place)
    for check in (_states, _tiles, _study, _report_hashes, *([_report_numbers] if recompute else [])):
        for result in check(folder, progress):
            known = True
            yield result
    if not known:
        yield str(folder), f"has no {sums.NAME}: its command has not ended yet, or it is not ours"


def _hashes(place: Path) -> Iterator[tuple[str, str]]:
    try:
        listed = sums.read(place)
    except ValueError as error:
        yield str(place / sums.NAME), str(error)
        return
    if not listed:
        yield str(place / sums.NAME), "lists no file"
    for name, digest in listed.items():
        problem = sums.problem_of(place / name, digest)
        yield str(place / name), problem.partition(": ")[2] or problem
    inner = {path.parent for name in SEALS for path in place.rglob(f"*/{name}")}
    for name in sums.artefacts(place):
        if name not in listed and not UNHASHED.fullmatch(name) and inner.isdisjoint((place / name).parents):
            yield str(place / name), f"is not listed in {sums.NAME}: added by somebody, or its line was taken out"


def _states(folder, progress):
    """Every saved state, by the hash that it carries."""
    from lesion.run import state
    for path in sorted(folder.rglob("*.safetensors")):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts) and ".damaged" not in path.name and _is_state(path):
            try:
                state.load_state(path)
                yield str(path), ""
            except ValueError as error:
                yield str(path), str(error)


def _is_state(path: Path) -> bool:
    """Whether a file's first bytes, or its name, call it a saved state."""
    from lesion.run.state import STATE
    with open(path, "rb") as file:
        return STATE.encode() in file.read(4096) or path.name in ("checkpoint.safetensors", "checkpoint.previous.safetensors",
                                                                  "state.safetensors", "state.previous.safetensors")


def _tiles(folder, progress):
    """Every picture by its row's SHA-256, and a synthetic one by the row inside it too; of all sets in the folder."""
    for path in sorted(folder.rglob(files.MANIFEST)):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield from _rows(path.parent)


def _rows(folder):
    try:
        rows = files.read_manifest(folder)
    except ValueError as error:
        yield str(folder / files.MANIFEST), str(error)
        return
    for row in rows:
        path = folder / row["file_name"]
        if not path.is_file():
            yield str(path), "is missing"
        elif row.get("sha256"):
            same = files.sha256_file(path) == row["sha256"]
            yield str(path), _inside(path, row) if same else f"is not the picture of its row in {files.MANIFEST} (SHA-256 differs)"


def _inside(path: Path, row: dict) -> str:
    from PIL import Image
    if path.suffix != ".png" or row.get("source") != "synthetic":
        return ""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            text = picture.text.get("lesion")
        drawn = None if text is None else files.parse_json(text)
    except Exception as error:  # what Pillow raises on damaged bytes has no list
        return f"cannot be read ({cli.one_line(error)})"
    if text is None:
        return ""
    if not isinstance(drawn, dict):
        return "says of itself what is no row"
    changed = sorted(key for key in drawn if row.get(key) != drawn[key])
    return f"was drawn with another {', '.join(changed)} than its row says" if changed else ""


def _study(folder, progress):
    """A study's seal and tiles, and answers.csv from the journals."""
    if not (folder / "study.json").is_file():
        return
    from lesion.web import study_folder
    try:
        study_folder.load(folder)
        yield str(folder / "study.json"), ""
        text = study_folder.answers_csv(folder)
    except ValueError as error:
        yield str(folder / "study.json"), str(error)
        return
    path = folder / "answers.csv"
    if path.is_file():
        wrong = _lines(path.read_bytes().decode("utf-8", "replace"), text)
        yield str(path), wrong and f"does not follow from the readers' journals: {wrong}"


# ---------------------------------------------------------------------------------------------------- reports

def _manifest(folder: Path) -> dict | None:
    """manifest.json of a report; None if this is none."""
    if not ((folder / "manifest.json").is_file() or (folder / "results.json").is_file()):
        return None
    if not (folder / "manifest.json").is_file():
        raise ValueError("is missing: nothing says what the report was made from")
    manifest = files.read_json(folder / "manifest.json")
    if not all(isinstance(manifest.get(name), dict) for name in ("request", "written", "read")):
        raise ValueError("is damaged: it names neither what was read nor what was written")
    return manifest


def _report_hashes(folder, progress):
    """What a report consists of, and what it was made from, by the hashes in its manifest; that it lists all of both."""
    from lesion.report.request import Request
    try:
        manifest = _manifest(folder)
    except ValueError as error:
        yield str(folder / "manifest.json"), str(error)
        return
    if manifest is None:
        return
    for name, digest in manifest["written"].items():
        path = folder / name
        yield str(path), "is missing" if not path.is_file() else "" if files.sha256_file(path) == digest else "is not what was written"
    for name in sums.artefacts(folder):
        if name not in manifest["written"] and name != "manifest.json":
            yield str(folder / name), "is not listed in manifest.json: added by somebody, or its line was taken out"
    for name, digest in manifest["read"].items():
        path = Path(name)
        yield name, f"of which {folder} was made, is not there; call verify where evaluate.py was called" if not path.is_file() else \
            "" if files.sha256_file(path) == digest else f"is not the file of which {folder} was made"
    try:
        for path in Request.from_json(manifest["request"]).files_read():
            if path.as_posix() not in manifest["read"]:
                yield str(path), f"is what {folder} rests on, but its manifest.json does not list it"
    except (ValueError, OSError) as error:
        yield str(folder / "manifest.json"), f"asks for what cannot be read: {error}"


def _report_numbers(folder, progress):
    """The report computed anew from its request, compared number by number and line by line."""
    try:
        manifest = _manifest(folder)
    except ValueError:
        return  # said by _report_hashes
    if manifest is None:
        return
    from lesion.report import whole
    from lesion.report.request import Request
    try:
        request, drop = Request.from_json(manifest["request"]), manifest.get("drop_copies")
        report = whole.compute(request, drop and Path(drop), [tuple(row) for row in manifest.get("about", [])], progress)
        with tempfile.TemporaryDirectory() as place:
            whole.write(report, Path(place) / "report", manifest["title"], {}, None)
            for name in ("results.json", "report.md", "report.html"):
                anew = (Path(place) / "report" / name).read_bytes().decode()
                try:
                    stands = (folder / name).read_bytes().decode("utf-8", "replace")
                    wrong = differences(files.parse_json(stands), json.loads(anew)) if name == "results.json" else [_lines(stands, anew)]
                except (OSError, ValueError) as error:
                    wrong = [f"cannot be read ({error})"]
                yield f"{folder / name} computed anew", ""
                for text in filter(None, wrong):
                    yield str(folder / name), text
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        yield f"{folder}, computed anew", f"cannot be: {error}"


def differences(stands: object, anew: object, place: str = "") -> list[str]:
    """One line for every entry of two JSON values that differs: its place, what stands there and what follows from the files."""
    if isinstance(stands, dict) and isinstance(anew, dict):
        return [line for key in [*anew, *(key for key in stands if key not in anew)]
                for line in differences(stands.get(key, "nothing"), anew.get(key, "nothing"), f"{place}.{key}".lstrip("."))]
    if isinstance(stands, list) and isinstance(anew, list) and len(stands) == len(anew):
        return [line for number, pair in enumerate(zip(stands, anew)) for line in differences(*pair, f"{place}[{number}]")]
    if stands == anew or _close(stands, anew):
        return []
    return [f"{place} is {json.dumps(stands)[:80]}, computed anew it is {json.dumps(anew)[:80]}"]


def _close(one, other) -> bool:
    return type(one) is type(other) is float and abs(one - other) <= TOLERANCE * max(abs(one), abs(other), 1e-3)


def _lines(stands: str, anew: str) -> str:
    """The first line that differs, in words; pictures inside a page (their bytes depend on fonts) are left to its hash."""
    one, other = (re.sub(r'data:image/[^"]*', "", text).split("\n") for text in (stands, anew))
    for number, (here, there) in enumerate(zip([*one, *[""] * len(other)], [*other, *[""] * len(one)]), 1):
        if here != there:
            start = next((i for i, (a, b) in enumerate(zip(here, there)) if a != b), min(len(here), len(there)))
            here, there = (line[max(0, start - 40):start + 60] for line in (here, there))
            return f"line {number} says {here!r}, computed anew it says {there!r}"
    return ""
