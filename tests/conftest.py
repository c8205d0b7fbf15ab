"""Fixtures every test may use: the shared reference material (skipped, saying so, where it is absent) and the repo root."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores: spinning threads would only be in each other's way
ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("LESION_SHARED", ROOT.parent / "shared"))


def pytest_configure(config):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts us in the background has it ignored
    if os.environ.get("CI") and not SHARED.is_dir():
        raise pytest.UsageError(f"CI needs the reference material at {SHARED}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference material: real tiles, CLIP vocabulary, checkpoint writer."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference material at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def tiny(shared, tmp_path_factory) -> Path:
    """A tiny SD-1.5-shaped checkpoint: folder/, single.safetensors, reference.safetensors."""
    out = tmp_path_factory.mktemp("tiny")
    subprocess.run([sys.executable, shared / "tools" / "make_sd15.py", "--size", "tiny", "--out", out], check=True,
                   capture_output=True)
    return out


@pytest.fixture(scope="session")
def run_script():
    """Run a script of the repo (`run_script("generate.py", "--count", 3)`) and return the completed process."""
    def run(*command, env=None, cwd=ROOT, timeout=300):
        arguments = [sys.executable, *(["-m", *command[0].split()[1:]] if command[0].startswith("-m ") else
                                       [str(ROOT / command[0])]), *map(str, command[1:])]
        return subprocess.run(arguments, cwd=cwd, timeout=timeout, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}, encoding="utf-8")
    return run
