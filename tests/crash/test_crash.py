"""A short slice of the attacks of harness.py on every command (CI), and all of them behind the marker `long`:

    python -m pytest tests/crash -m long        or, with counts as it goes, python tests/crash/harness.py
"""
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import harness  # noqa: E402

COMMANDS = ("prepare", "overwrite", "train", "generate", "classify", "evaluate", "study", "label", "pretrain")
FLIPPED = ("train", "generate", "classify", "study", "pretrain")


@pytest.fixture(scope="session")
def world(shared, tmp_path_factory):
    """The inputs of all commands, made once; runs are forks of this process."""
    if not hasattr(harness.os, "fork"):
        pytest.skip("runs are forks: needs a POSIX system")
    return harness.World(tmp_path_factory.mktemp("crash") / "world")


def attack(world, name, kind, count):
    done, failures = harness.attack(world, name, kind, count, say=lambda text: None)
    assert not failures, "\n".join(failures)
    assert done


@pytest.mark.parametrize(("name", "kind"), [("train", "renames"), ("generate", "kills"), ("study", "renames"), ("label", "kills"),
                                            ("overwrite", "renames"), ("label", "two"), ("study", "two")])
def test_a_slice(world, name, kind):
    """Killed at a random moment or rename, started twice at once: started again, the bytes of an undisturbed run."""
    attack(world, name, kind, 1)


@pytest.mark.parametrize("name", ["train", "generate"])
def test_a_flipped_bit(world, name):
    """One bit of each saved state: refused in one line, healed, or without effect; never another result with exit code 0."""
    attack(world, name, "flips", 1)


def test_a_full_disk(world):
    """A disk too small by a random share: one line, earlier files whole; with room the run ends as undisturbed."""
    if not harness.may_mount():
        pytest.skip("needs the right to mount a tmpfs")
    attack(world, "generate", "full", 1)


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", harness.ATTACKS)
def test_all(world, name, kind):
    """Twenty attacks of each kind on each command, and every rename."""
    if kind == "full" and not harness.may_mount():
        pytest.skip("needs the right to mount a tmpfs")
    if kind == "flips" and name not in FLIPPED:
        pytest.skip(f"{name} keeps no state between runs")
    attack(world, name, kind, 20)


def test_the_harness_sees_a_wrong_byte(world, monkeypatch):
    """Were a command to resume from whatever is there, the harness would say so: with the state's hash not compared, one of a few flipped
    bits of a training state gives another LoRA with exit code 0."""
    from lesion.run import state
    real = state._sha256_state
    monkeypatch.setattr(state, "_sha256_state", lambda tensors, text: "0" * 64)
    command = harness.Command(**{**vars(world.every["train"]), "states": ("checkpoint.safetensors",)})
    found = [wrong for _, wrong in harness.flips(world, command, 4, random.Random(3))]
    monkeypatch.setattr(state, "_sha256_state", real)
    assert any("differs in" in wrong for wrong in found)
