"""docs/AUDIT.md names functions and tests that exist."""
import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROWS = [line for line in (ROOT / "docs" / "AUDIT.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| step")]


def test_there_are_rows():
    """The file is there and has rows: a check over nothing would pass."""
    assert len(ROWS) > 25


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_row(row):
    """Four cells; the function imports; the test is defined in its file."""
    step, paper, functions, tests = (cell.strip() for cell in row.strip("|").split("|"))
    assert step
    assert paper
    names = re.findall(r"`(lesion\.[\w.]+)`", functions)
    assert names, functions
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
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"
