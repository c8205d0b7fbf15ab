"""docs/AUDIT.md names functions and tests that exist."""
import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "AUDIT.md").read_text(encoding="utf8")
READING = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", TEXT, re.MULTILINE)
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith(("| step", "| file", "| `"))]
CODE = [*sorted((ROOT / "lesion").rglob("*.py")), *(ROOT / f"{name}.py" for name in ("train_lora", "generate", "classify", "evaluate"))]


def test_there_are_rows():
    """The file is there and has rows: a check over nothing would pass."""
    assert len(ROWS) > 25


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_row(row):
    """Five cells; the function imports; the test is defined in its file (the mistake: tests/mutants/test_mutants.py)."""
    step, paper, functions, tests, mistake = (cell.strip() for cell in row.strip("|").split("|"))
    assert mistake
    assert step
    assert paper
    names, anchors = re.findall(r"`(lesion\.[\w.]+)`", functions), re.findall(r"`(\w+\.py)#([\w ]+)`", functions)
    assert names or anchors, functions
    for script, anchor in anchors:
        assert f"# [{anchor}]" in (ROOT / script).read_text(encoding="utf8"), f"{script} has no comment # [{anchor}]"
    for name in names:
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:cut]))
                break
            except ModuleNotFoundError:
                continue
        for part in parts[cut:]:
            found = getattr(found, part)
        assert cut < len(parts), f"{name} is a module, not a function"
    references = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
    assert references, tests
    for path, name in references:
        tree = ast.parse((ROOT / path).read_text(encoding="utf8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"


def test_the_reading_order():
    """Ten files that exist; the line counts are right to a tenth, so that an evening stays one."""
    assert len(READING) == 10
    for path, lines in READING:
        counted = len((ROOT / path).read_text(encoding="utf8").splitlines())
        assert abs(counted - int(lines)) <= max(5, 0.1 * counted), f"{path} has {counted} lines now"


def test_the_path_of_training_is_short():
    """Script, loop, LoRA and Stable Diffusion together are under 2,500 lines: what an audit of the training reads. Apart from
    them: the faster twin of the networks, drawing from Python, and the readers and writers of files that other programs know."""
    apart = {"fast.py", "drawing.py", "convert.py", "configs.py", "hub.py", "ldm_yaml.py", "names.py", "vocabulary.py", "weights.py",
             "formats.py", "lycoris.py", "naming.py", "strength.py"}
    paths = [path for path in CODE if path.name == "train_lora.py" or path.parent.name in ("train", "lora", "sd")]
    assert sum(len(path.read_text(encoding="utf8").splitlines()) for path in paths if path.name not in apart) < 2500


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_headers_name_tests_that_exist(path):
    """"Proven by tests/..." leads somewhere."""
    for named in re.findall(r"tests/[\w/]+\.py", path.read_text(encoding="utf8")):
        assert (ROOT / named).is_file(), named
