"""`python -m lesion tour`: every step is a script and its own flags; the whole chain at its smallest, in an empty folder."""
import sys

import pytest

from lesion.mini import tour
from lesion.run import folders


def test_steps_are_commands_that_exist():
    """The scripts stand where the tour runs them, and take the flags it gives (quick ones too)."""
    import importlib
    sys.path.insert(0, str(folders.ROOT))
    try:
        for quick in (False, True):
            for (script, *flags), text in tour.commands(quick):
                assert text
                parse = importlib.import_module(script.removesuffix(".py")).parse
                parse(flags)
    finally:
        sys.path.remove(str(folders.ROOT))


@pytest.mark.long
def test_the_whole_chain(tmp_path, run_script):
    """Demo tiles, LoRA, tiles, arms, report: in an empty folder, without a flag but --quick; each command is printed as typed."""
    done = run_script("-m lesion", "tour", "--quick", "--no-browser", cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "$ python train_lora.py --phase 2" in done.stdout
    assert (tmp_path / "report" / "report.html").is_file()
    assert (tmp_path / "report" / "results.json").is_file()
