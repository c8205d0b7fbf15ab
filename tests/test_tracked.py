"""What git keeps is what a fresh machine gets: no links, nothing that .gitignore names."""
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def git(*words: str) -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, encoding="utf8", check=True).stdout.splitlines()


def test_no_symbolic_link_is_tracked():
    """A tracked link points at a place of one machine: `.venv` did, and a fresh clone could not make its environment."""
    assert [line for line in git("ls-files", "--stage") if line.startswith("120000")] == []


def test_nothing_ignored_is_tracked():
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard") == []
