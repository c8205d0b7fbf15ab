"""The kept mistakes fit the code, cover every row of docs/AUDIT.md, and a few are planted here: their tests see them.

All of them: `python tests/mutants/run.py`.
"""
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import run as mutants  # noqa: E402

ALL = mutants.load()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in
        (mutants.ROOT / "docs" / "AUDIT.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith(("| step", "| file", "| `"))]
QUICK = ["betas linear, not scaled linear", "first order throughout", "weights forgotten", "alpha not written"]


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant["mistake"])
def test_it_fits_the_code(mutant):
    """Its text occurs once in its file, its tests exist, its row is one of the audit's."""
    mutants.planted((mutants.ROOT / mutant["file"]).read_text(encoding="utf-8"), mutant)
    assert all((mutants.ROOT / name.partition("::")[0]).exists() for name in mutant["test"].split())
    assert mutant["row"] in {row[0] for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_row_names_the_mistake_its_test_sees(row):
    """The last column of the audit is a kept mistake of that row."""
    assert row[-1] in {mutant["mistake"] for mutant in ALL if mutant["row"] == row[0]}


def test_names_are_unique():
    """A mistake is called by its words."""
    names = [mutant["mistake"] for mutant in ALL]
    assert len(set(names)) == len(names)
    assert set(QUICK) <= set(names)
    assert all(re.search(r"\w", name) for name in names)


@pytest.mark.parametrize("name", QUICK)
def test_planted_and_seen(name, tmp_path):
    """The named test fails with the mistake."""
    mutant = next(one for one in ALL if one["mistake"] == name)
    mutants.copy_of_the_code(tmp_path)
    assert mutants.caught(mutant, tmp_path / "copy")
