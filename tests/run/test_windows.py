"""Windows, simulated: train, generate, classify and label need no module and no call that only POSIX systems have."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = sorted((ROOT / "lesion").rglob("*.py")) + [ROOT / f"{name}.py" for name in ("train_lora", "generate", "classify", "evaluate")]
ABSENT = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "readline"}
CALLS = {"fork", "getuid", "geteuid", "getgid", "wait4", "mkfifo", "chown", "lchown", "setsid", "killpg", "sync", "nice", "getloadavg",
         "register_at_fork", "sched_getaffinity", "SIGKILL", "SIGPIPE", "SIGHUP", "SIGUSR1", "SIGALRM", "alarm", "setitimer", "pause",
         "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "fchmod", "fchown", "statvfs", "uname", "openpty"}

# Runs a command with the POSIX-only modules and calls hidden from every file of ours, and from nobody else.
SIMULATED = """
import builtins, os, runpy, signal, sys
root, absent, calls = sys.argv.pop(1), set(sys.argv.pop(1).split(",")), set(sys.argv.pop(1).split(","))
real = builtins.__import__
def ours(depth):
    name = sys._getframe(depth).f_globals.get("__file__") or ""
    return name.startswith(root) and "/.venv/" not in name
def hide(name, *rest, **more):
    if name.split(".")[0] in absent and ours(2):
        raise ImportError(f"No module named {name!r} (simulated Windows)")
    return real(name, *rest, **more)
builtins.__import__ = hide
class Windows(type(os)):
    def __getattribute__(self, name):
        if name in calls and ours(2):
            raise AttributeError(f"module has no attribute {name!r} (simulated Windows)")
        return super().__getattribute__(name)
for module in (os, signal):
    module.__class__ = Windows
name = sys.argv[1]
if name.startswith("lesion."):
    sys.argv = ["lesion", *sys.argv[2:]]
    import importlib
    importlib.import_module(name).main(sys.argv[1:])
else:
    sys.argv = sys.argv[1:]
    runpy.run_path(name, run_name="__main__")
"""


def run(*arguments, cwd):
    """A command of ours in the simulated system."""
    return subprocess.run([sys.executable, "-c", SIMULATED, str(ROOT), ",".join(ABSENT), ",".join(CALLS), *map(str, arguments)], cwd=cwd,
                          capture_output=True, text=True, encoding="utf-8", timeout=300,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


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


def test_the_simulation_hides_them(tmp_path):
    """It would be no proof otherwise: a file of ours that imports fcntl or forks fails in it, others do not."""
    code = SIMULATED.split("name = sys.argv[1]")[0] + "\nexec(compile(sys.argv[1], root + '/x.py', 'exec'), {'__file__': root + '/x.py'})"
    line = [sys.executable, "-c", code, str(ROOT), ",".join(ABSENT), ",".join(CALLS)]
    for text in ("import fcntl", "import resource", "import os; os.fork()", "import signal; signal.SIGPIPE"):
        assert "simulated Windows" in subprocess.run([*line, text], capture_output=True, encoding="utf-8").stderr
    done = subprocess.run([*line, "import subprocess, tempfile, os; os.getcwd()"], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_train_generate_classify_label(tiny, tmp_path):
    """The four commands of the first hour end well there, locks and memory figures included."""
    from tiny_tiles import write_set, write_synthetic

    from lesion.run import files
    rows = write_set(tmp_path / "data", {"train": (10, 6), "val": (4, 4), "test": (4, 4)})
    files.write_manifest(tmp_path / "data", [{**row, "text": "a lesion"} for row in rows])
    write_synthetic(tmp_path / "synthetic", 6, [row for row in rows if row["split"] == "train"])
    base = ["--base", tiny / "folder", "--resolution", 64]
    for command in (
            [ROOT / "train_lora.py", *base, "--phase", 1, "--data", tmp_path / "data", "--steps", 2, "--rank", 2, "--batch-size", 2,
             "--sample-count", 1, "--sample-steps", 1, "--val-tiles", 2, "--out", tmp_path / "run"],
            [ROOT / "generate.py", *base, "--lora", tmp_path / "run" / "lora.safetensors", "--prompt", "x", "--count", 2, "--steps", 1,
             "--out", tmp_path / "drawn"],
            [ROOT / "classify.py", "--data", tmp_path / "data", "--synthetic", tmp_path / "synthetic", "--experiments", "B0", "--seeds", 1,
             "--arch", "resnet18", "--weights", "none", "--image-size", 32, "--epochs", 1, "--batch-size", 8, "--out", tmp_path / "arms"],
            ["lesion.web.label", tmp_path / "data", "--no-serve"]):
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 0, f"{command[0]}: {done.stderr[-2000:]}"
    assert (tmp_path / "run" / "lora.safetensors").is_file()
    assert (tmp_path / "arms" / "B0" / "seed0" / "predictions.csv").is_file()
