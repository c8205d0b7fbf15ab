"""Threads by what is free: by hand on made-up samples, and beside processes that never rest."""
import os
import subprocess
import sys

import pytest

from lesion.run import cores


def test_free_by_hand(monkeypatch):
    """Four cores for 10 s: others took 10 s of them, this process 20: three are left; half a core rounds away; never under 1."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    begun = (100.0, 50.0, 5.0)
    assert cores.free(4, begun, (140.0, 80.0, 25.0)) == 3
    assert cores.free(4, begun, (140.0, 54.0, 5.0)) == 4
    assert cores.free(2, begun, (140.0, 60.0, 5.0)) == 2  # no more than it was given
    assert cores.free(4, begun, (140.0, 90.0, 5.0)) == 1
    assert cores.free(4, None, None) == 4
    assert cores.free(4, begun, begun) == 4


ASK = "import time; from lesion.run import cores; import torch; time.sleep({}); print(cores.use_free({}))"


def ask(seconds, before=None, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", ASK.format(seconds, before)]
    done = subprocess.run(command, capture_output=True, encoding="utf8", env=clean | environment)
    return int(done.stdout)


@pytest.mark.skipif(not cores.STAT.is_file(), reason="reads Linux' /proc/stat")
def test_a_busy_machine_leaves_one_thread():
    """Beside as many busy processes as there are cores: one thread; OMP_NUM_THREADS, or what a run had before, stands."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        assert ask(2) == 1
        assert ask(0, before=2) == 2
        assert ask(0, OMP_NUM_THREADS="2") == 2
    finally:
        for other in others:
            other.kill()
            other.wait()
