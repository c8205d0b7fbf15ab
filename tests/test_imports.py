"""The arrows of the design run one way, no reference package is needed at run time, and --help answers at once."""

import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lesion.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [ROOT / name for name in ("train_lora.py", "generate.py", "classify.py", "evaluate.py")]
RUNTIME = sorted((ROOT / "lesion").rglob("*.py")) + [path for path in SCRIPTS if path.is_file()]
REFERENCES = {"diffusers", "peft", "accelerate"}  # what the tests compare with
HEAVY = {"torch", "torchvision", "transformers", "scipy", "sklearn", "skimage", "matplotlib", "pandas"}
BENCH = ROOT / "lesion" / "bench" / "measure.py"  # --peer runs diffusers and peft beside us, in a process of their own


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, in functions too: `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module", "__import__",
        ):  # fmt: skip
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return found


def test_the_walk_sees_every_kind_of_import(tmp_path):
    """Nested, aliased and dynamic imports are all found: otherwise the tests below would prove nothing."""
    file = tmp_path / "x.py"
    file.write_text(
        "import a.b as c\ndef f():\n    from d import e, f\n    __import__('g')\n    importlib.import_module('h.i')\n", encoding="utf-8"
    )
    assert imports(file) == {"a.b", "d", "d.e", "d.f", "g", "h.i"}


@pytest.mark.parametrize("path", RUNTIME, ids=module_of)
def test_no_reference_package_at_run_time(path):
    """diffusers, peft and accelerate are what the tests compare with; nothing that users run imports them."""
    used = {name.split(".")[0] for name in imports(path)} & REFERENCES
    assert not used or path == BENCH


def test_the_bench_needs_its_peers_only_when_asked():
    """The one exception imports them inside functions."""
    top = [node for node in ast.parse(BENCH.read_text(encoding="utf-8")).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in top for alias in node.names} | {getattr(node, "module", None) for node in top}
    assert not {str(name).split(".")[0] for name in names} & REFERENCES


LEVELS = [{"run", "sd"}, {"tiles", "stats", "lora"}, {"train", "classify", "describe"}, {"bench", "web", "prepare"},
          {"mini", "report"}, {"__main__"}]  # a room imports only rooms of the levels before its own
ANNEX = {"web", "mini", "bench"}
ALONE = {"sd", "stats"}  # import nothing else of ours
PACKAGE = [path for path in RUNTIME if "lesion" in path.relative_to(ROOT).parts[:1] and path != ROOT / "lesion" / "__init__.py"]
CORE = [path for path in PACKAGE if path.relative_to(ROOT).parts[1] in {"sd", "lora", "train", "tiles", "describe", "classify", "stats"}]


def room_of(name: str) -> str:
    """The room of a module: lesion.run.files -> run."""
    return name.split(".")[1]


def rooms_used(path: Path) -> set[str]:
    """The rooms that a file imports from, its own left out; `lesion` itself, the version, is no room."""
    names = {name for name in imports(path) if name.startswith("lesion.")} - {"lesion.__version__"}
    return {room_of(name) for name in names} - {room_of(module_of(path))}


def test_every_room_has_its_level():
    """A new folder or loose module under lesion/ needs a place in LEVELS; fourteen rooms at most, two loose modules."""
    rooms = {room_of(module_of(path)) for path in PACKAGE}
    assert rooms == set().union(*LEVELS)
    assert {path.stem for path in PACKAGE if path.parent.name == "lesion"} == {"prepare", "__main__"}
    assert len([path for path in (ROOT / "lesion").iterdir() if path.is_dir() and path.name != "__pycache__"]) <= 14


@pytest.mark.parametrize("path", PACKAGE, ids=module_of)
def test_arrows_run_one_way(path):
    """Rooms import only rooms of lower levels, so there is no circle between rooms; nobody imports a script."""
    own = room_of(module_of(path))
    level = next(number for number, rooms in enumerate(LEVELS) if own in rooms)
    below = set().union(*LEVELS[:level]) - (set() if own not in ALONE else {"run", "sd"})
    if own in {"mini", "bench"}:
        below |= {"prepare"}
    assert rooms_used(path) <= below
    assert not {name.split(".")[0] for name in imports(path)} & {script.stem for script in SCRIPTS}


@pytest.mark.parametrize("path", CORE, ids=module_of)
def test_the_core_never_imports_an_annex(path):
    """Teaching, drawing and classifying need neither the web pages nor the built-in base's making nor the bench."""
    assert not rooms_used(path) & ANNEX


def test_no_circle_between_modules():
    """The modules can be put in an order in which each imports only earlier ones."""
    graph = {module_of(path): {name for name in imports(path) if name.startswith("lesion.")} for path in PACKAGE}
    graph = {name: {used for used in uses if used in graph and used != name} for name, uses in graph.items()}
    while graph:
        free = [name for name, uses in graph.items() if not uses & graph.keys()]
        assert free, f"circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_samplers_never_see_a_network_or_a_tokenizer():
    """They take a callable: their only import of the project is the schedule."""
    used = {name for name in imports(ROOT / "lesion" / "sd" / "samplers.py") if name.startswith("lesion")}
    assert {name for name in used if not name.startswith("lesion.sd.schedule")} == set()


@pytest.mark.parametrize("path", [path for path in RUNTIME if "lesion" in path.parts], ids=module_of)
def test_the_package_prints_nothing(path):
    """Scripts and commands, which have a `main`, print; library code does not."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    command = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"]
    assert not calls or command or path.name == "cli.py", [node.lineno for node in calls]


# --- --help ----------------------------------------------------------------------------------------------------------

LINES = (
    [[path.name] for path in SCRIPTS if path.is_file()]
    + [["-m", "lesion"]]
    + [["-m", "lesion", name] for name in COMMANDS]
)


def help_of(line: list[str]) -> tuple[int, str, str, float]:
    """(exit code, output, the modules imported, CPU seconds of the child) of `--help`."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        process = subprocess.Popen(
            [sys.executable, "-X", "importtime", *line, "--help"], cwd=ROOT, stdout=out, stderr=err
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        return process.returncode, out.read(), err.read(), usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_help_answers_at_once(line):
    """Under half a second of CPU time (the best of three: the machine may be busy), with no heavy library imported."""
    seconds = []
    while not seconds or (min(seconds) >= 0.5 and len(seconds) < 3):
        code, out, err, used = help_of(line)
        seconds.append(used)
    assert code == 0, err
    assert "usage: " in out
    names = {row.rpartition("|")[2].strip().split(".")[0] for row in err.splitlines() if row.startswith("import time:")}
    assert "argparse" in names or line == ["-m", "lesion"]
    assert not names & HEAVY
    assert min(seconds) < 0.5
