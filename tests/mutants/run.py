"""Plant each known mistake in a copy of the code and see its test fail.

    python tests/mutants/run.py [--only WORD] [--part 1/2] [--jobs 2]

tests/mutants/*.toml hold the mistakes, at least one for every row of docs/AUDIT.md: `row`, `mistake` (what someone could
get wrong), `file`, `old` (text that occurs there once), `new`, `test` (the tests of which one must fail). A mistake that
its test does not see is a survivor: exit code 1. Each test runs in a fork of one process that has imported what the tests
import but nothing of ours; every job has a copy of its own.
"""
import argparse
import multiprocessing
import os
import queue
import shutil
import sys
import tempfile
import threading
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("lesion", "tests", "docs", "train_lora.py", "generate.py", "classify.py", "evaluate.py", "pyproject.toml", "README.md",
          "requirements.txt", "requirements-dev.txt")
PRELOADED = ["pytest", "torch", "torchvision", "scipy.stats", "sklearn.metrics", "skimage.measure", "matplotlib.figure", "transformers",
             "diffusers", "peft"]
FORKS = multiprocessing.get_context("forkserver")
LONGEST = 600  # seconds a test may take: a mistake that makes it hang is seen


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


def run_tests(copy: Path, log: Path, names: list[str]) -> None:
    """In a process of its own: pytest in the copy; what it prints goes to `log`, its exit code is the process's."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(copy)
    sys.path[:] = [place for place in sys.path if not place.startswith(str(ROOT / "tests")) and place != str(ROOT)]
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    import pytest
    code = pytest.main(["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--rootdir", str(copy), *names])
    sys.stdout.flush()
    os._exit(int(code))


def caught(mutant: dict, copy: Path) -> bool:
    """Whether the test fails with the mistake planted: pytest's exit code 1, not an error of collection or a skipped test."""
    path, log = copy / mutant["file"], copy.parent / "log.txt"
    text = path.read_text(encoding="utf8")
    path.write_text(planted(text, mutant), encoding="utf8")
    try:
        process = FORKS.Process(target=run_tests, args=(copy, log, mutant["test"].split()))
        process.start()
        process.join(LONGEST)
        if process.is_alive():
            process.kill()
            process.join()
            return True
        return process.exitcode == 1 and "FAILED" in log.read_text(encoding="utf8", errors="replace")
    finally:
        path.write_text(text, encoding="utf8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="mistakes whose row, words, file or test hold this")
    parser.add_argument("--part", default="1/1", help="K/N: every N-th, beginning with the K-th")
    parser.add_argument("--jobs", type=int, default=2, help="tests at once")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    wanted = [one for one in load() if args.only in " ".join(one.values())][part - 1::parts]
    waiting, survivors, done = queue.SimpleQueue(), [], 0
    for mutant in wanted:
        waiting.put(mutant)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    FORKS.set_forkserver_preload(PRELOADED)

    def work() -> None:
        """Plant and test in a copy of this worker's own, until none is waiting."""
        nonlocal done
        with tempfile.TemporaryDirectory() as folder:
            copy_of_the_code(Path(folder))
            while True:
                try:
                    mutant = waiting.get_nowait()
                except queue.Empty:
                    return
                seen = caught(mutant, Path(folder) / "copy")
                done += 1
                print(f"{done}/{len(wanted)} {'caught' if seen else 'SURVIVED'}: {mutant['mistake']} ({mutant['test']})", flush=True)
                if not seen:
                    survivors.append(mutant["mistake"])
    workers = [threading.Thread(target=work, daemon=True) for _ in range(args.jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(f"{done - len(survivors)} of {len(wanted)} mistakes caught")
    sys.exit(bool(survivors) or done < len(wanted))


if __name__ == "__main__":
    main()
