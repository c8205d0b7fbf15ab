"""Windows, simulated: train, generate, classify and label need no module and no call that only POSIX systems have."""
import ast
import ntpath
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from windows import ABSENT, CALLS

from lesion.mini.phantoms import write_demo
from lesion.run import files
from lesion.tiles import names
from lesion.web import label_folder

ROOT = Path(__file__).resolve().parents[2]
OURS = sorted((ROOT / "lesion").rglob("*.py")) + [ROOT / f"{name}.py" for name in ("train_lora", "generate", "classify", "evaluate")]
SIZES = "--batch-size 2 --rank 2 --checkpoint-every 1 --sample-count 1 --sample-steps 1 --val-tiles 2"
CLASSIFIER = "--image-size 32 --epochs 1 --seeds 1 --batch-size 8"


def run(*arguments, cwd):
    """A command of ours in the simulated system (tests/windows.py), on a terminal of Windows' western code page."""
    return subprocess.run(
        [sys.executable, ROOT / "tests" / "windows.py", *arguments], cwd=cwd, capture_output=True, encoding="cp1252",
        timeout=300, env={**os.environ, "PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"})


def unguarded(path: Path) -> list[str]:
    """POSIX-only imports outside a try, and POSIX-only names of os and signal that are neither asked for by hasattr or getattr nor
    behind a test of the system."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        call = isinstance(node, ast.Attribute) and node.attr in CALLS and ast.unparse(node.value) in ("os", "signal")
        if not call and not {name.split(".")[0] for name in names} & ABSENT:
            continue
        above, guarded = node, False
        while above in parents:
            above = parents[above]
            text = ast.unparse(above.test) if isinstance(above, ast.If | ast.IfExp) else ""
            guarded = guarded or (isinstance(above, ast.Try) and not call) or "hasattr" in text or "os.name" in text or "platform" in text
        if not guarded:
            found.append((node.lineno, ast.unparse(node)))
    return [f"line {number}: {text}" for number, text in sorted(found)]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_unguarded_posix(path):
    """A POSIX-only module is imported in a try, a POSIX-only call stands behind a question."""
    assert unguarded(path) == []


def test_the_walk_sees_them(tmp_path):
    """What the test above forbids is found, what it allows is not."""
    (tmp_path / "x.py").write_text("import resource\nos.fork()\ntry:\n    import fcntl\nexcept ImportError:\n    fcntl = None\n"
                                   "if hasattr(os, 'sync'):\n    os.sync()\ndef f():\n    import pwd\n", encoding="utf-8")
    assert [line.split(":")[0] for line in unguarded(tmp_path / "x.py")] == ["line 1", "line 2", "line 10"]


@pytest.mark.parametrize(("code", "says"), [
    ("import fcntl", "No module named"), ("import resource", "No module named"),
    ("import os; os.fork()", "no attribute 'fork'"), ("import signal; signal.SIGPIPE", "no attribute 'SIGPIPE'"),
    ("import os; os.open('.', 0)", "a folder cannot be opened"), ("open('a:b', 'w')", "not a file name"),
    ("import os; f = open('a', 'w'); os.remove('a')", "in use"), ("import os; os.symlink('a', 'b')", "privilege"),
    ("import os; f = open('a', 'w'); open('b', 'w').close(); os.replace('b', 'a')", "in use"),
    ("import os; os.mkdir('d'); f = open('d/a', 'w'); os.rename('d', 'e')", "in use"),
    ("import numpy, os; numpy.save('a', [1]); x = numpy.load('a.npy', mmap_mode='r'); os.remove('a.npy')", "in use"),
    ("import sys, os; sys.exit(os.name + sys.platform)", "ntwin32"),
    ("import sys; from pathlib import Path; sys.exit(str(Path('a/b/c').relative_to('a')))", "b\\c"),
    ("import msvcrt, os; [msvcrt.locking(os.open('a', os.O_RDWR | os.O_CREAT), 2, 1) for _ in 'ab']", "denied")])
def test_the_simulation_is_one(tmp_path, code, says):
    """It would be no proof otherwise: what Windows refuses to a file of ours is refused, and said in so many words."""
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode
    assert says in done.stderr


def test_the_simulation_refuses_no_more(tmp_path):
    """Other modules find what they are used to; a closed file is renamed, replaced and removed, a folder too."""
    code = """import subprocess, tempfile, os, shutil
os.mkdir("d")
open("d/a", "w").close()
os.replace("d/a", "d/b")
os.rename("d", "e")
shutil.rmtree("e")
assert os.path.relpath("x/y/z", "x").replace(os.sep, "/") == "y/z" and os.listdir() == []"""
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def follow(commands, folder):
    """Run each of the commands in `folder`: all end well and leave no lock, and no manifest and no list of hashes names
    a file with a backslash."""
    for command in commands:
        done = run(*command.split(), cwd=folder)
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
        assert "left out" not in done.stdout  # a picture that the manifest names is no stranger
        assert not list(folder.rglob(".*lock"))
    for path in (path for ending in ("SHA256SUMS", "metadata.jsonl") for path in folder.rglob(ending)):
        assert "\\" not in path.read_text(encoding="utf-8").replace('\\"', ""), path


def test_train_generate_classify_label(tmp_path):
    """The four commands of the first hour by their defaults but for sizes: all end well, and the manifest follows the
    journal."""
    demo = tmp_path / "data" / "demo"
    tile = write_demo(demo, benign=24, malignant=24)[0]["file_name"]
    files.append_jsonl(demo / "labels" / "first.jsonl", {
        "event": "answer", "id": "answer-00001", "time": label_folder.now(), "tile": tile,
        "answers": {"skin_tone": "brown"}, "was": {"skin_tone": "given"}})
    follow([f"train_lora.py --phase 1 --steps 1 {SIZES}", "generate.py --count 2 --steps 1",
            f"classify.py --experiments B0 S2 {CLASSIFIER}", "lesion.web.label data/demo --no-serve"], tmp_path)
    assert (tmp_path / "runs" / "malignant-phase1" / "lora.safetensors").is_file()
    assert len(list((tmp_path / "samples").rglob("malignant-*.png"))) == 2
    assert len(list((tmp_path / "runs" / "classify").rglob("predictions.csv"))) == 2
    assert files.read_manifest(demo)[0]["attributes"]["skin_tone"] == "brown"


@pytest.mark.long
def test_every_command(tmp_path):
    """The README's real recipe to its end: both phases and going on, every arm, a report and its replacement, a data
    set and its replacement, labelling, a study, and all of it verified.
    `python -m pytest -n0 -m long tests/run/test_windows.py`"""
    write_demo(tmp_path / "data" / "demo", benign=60, malignant=100)
    prepare, draw = "lesion.prepare --source data/demo --out data/again", "generate.py --count 12 --steps 1"
    follow([f"train_lora.py --phase 1 --steps 1 {SIZES}", f"train_lora.py --steps 1 {SIZES}",
            f"train_lora.py --steps 2 {SIZES} --resume", draw, draw, f"classify.py {CLASSIFIER}", "evaluate.py",
            "evaluate.py", prepare, f"{prepare} --prompts fixed --overwrite", "lesion.web.label data/again --no-serve",
            "lesion.web.study s --real data/demo --synthetic samples/malignant-phase2 --count 4 --no-serve",
            "lesion.web.study s --no-serve", "lesion.report.verify runs samples data/again report s"], tmp_path)


def names_a_file_with_backslashes(path: Path) -> list[str]:
    """Relative paths that become text with the system's own separator: `relative_to` without as_posix or parts right
    after it, relpath without a replace, and commonpath, which gives backslashes whatever it was given."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            around = parents[node]
            while isinstance(around, ast.IfExp):
                around = parents[around]
            after = around.attr if isinstance(around, ast.Attribute) else ""
            if node.func.attr == "relative_to" and after not in ("as_posix", "parts") \
                    or node.func.attr == "relpath" and after != "replace" \
                    or node.func.attr == "commonpath" and ast.unparse(node.func.value) != "posixpath":
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


# the path is for a person's eyes, or goes on as a path
FOR_PEOPLE = {"lesion/report/whole.py": 1, "lesion/bench/measure.py": 1}


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_have_forward_slashes(path):
    """No name that is stored or compared is made of a relative path with the system's separator."""
    found = names_a_file_with_backslashes(path)
    assert len(found) == FOR_PEOPLE.get(path.relative_to(ROOT).as_posix(), 0), found


def test_names_are_the_same_there(monkeypatch):
    """Class folders below two others whose file names repeat: Windows' os.path gives them the ids that ours gives."""
    tiles = [f"my/set/{part}/{label}/a.jpg" for part in ("train", "test") for label in ("benign", "malignant")]

    def ids():
        found = SimpleNamespace(notes=[])
        classes = {name.rpartition("/")[0]: name.split("/")[3] for name in tiles}
        return dict(names._identified(tiles, classes, found, lambda a, b: False)), found.notes
    here = ids()
    assert "train_benign_a" in here[0]
    monkeypatch.setattr(names, "os", SimpleNamespace(path=ntpath, sep="\\"))
    assert ids() == here
