"""Plant each known mistake in a copy of the code and see its test fail.

    python tests/mutants/run.py [--only WORD] [--part 1/2]

tests/mutants/*.toml hold the mistakes, at least one for every row of docs/AUDIT.md: `row`, `mistake` (what someone could
get wrong), `file`, `old` (text that occurs there once), `new`, `test` (the tests of which one must fail). A mistake that
its test does not see is a survivor: exit code 1.
"""
import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("lesion", "tests", "docs", "train_lora.py", "generate.py", "classify.py", "evaluate.py", "pyproject.toml", "README.md",
          "requirements.txt", "requirements-dev.txt")


def load() -> list[dict]:
    """Every mistake of every file, in order."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.toml")):
        found += tomllib.loads(path.read_text(encoding="utf8"))["mutant"]
    return found


def planted(text: str, mutant: dict) -> str:
    """The file's text with the mistake. ValueError unless `old` occurs exactly once and changes."""
    if text.count(mutant["old"]) != 1 or mutant["old"] == mutant["new"]:
        raise ValueError(f"{mutant['mistake']!r}: its text occurs {text.count(mutant['old'])} times in {mutant['file']}")
    return text.replace(mutant["old"], mutant["new"])


def copy_of_the_code(folder: Path) -> None:
    """The files that tests need, without caches; `shared` beside them as beside the checkout."""
    for name in COPIED:
        source, target = ROOT / name, folder / "copy" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(ROOT.parent / "shared")


def caught(mutant: dict, copy: Path) -> bool:
    """Whether the test fails with the mistake planted: pytest's exit code 1, not an error of collection or a skipped test."""
    path = copy / mutant["file"]
    text = path.read_text(encoding="utf8")
    path.write_text(planted(text, mutant), encoding="utf8")
    try:
        command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *mutant["test"].split()]
        done = subprocess.run(command, cwd=copy, capture_output=True, encoding="utf-8", timeout=600)
        return done.returncode == 1 and "FAILED" in done.stdout
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(text, encoding="utf8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="mistakes whose row, words, file or test hold this")
    parser.add_argument("--part", default="1/1", help="K/N: every N-th, beginning with the K-th")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    wanted = [one for one in load() if args.only in " ".join(one.values())][part - 1::parts]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy_of_the_code(Path(folder))
        for number, mutant in enumerate(wanted, 1):
            seen = caught(mutant, Path(folder) / "copy")
            print(f"{number}/{len(wanted)} {'caught' if seen else 'SURVIVED'}: {mutant['mistake']} ({mutant['test']})", flush=True)
            if not seen:
                survivors.append(mutant["mistake"])
    print(f"{len(wanted) - len(survivors)} of {len(wanted)} mistakes caught")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
