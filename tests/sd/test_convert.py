"""`python -m lesion convert`: the four usual kinds of pickles become safetensors with every tensor; what could act
never runs."""
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lesion.sd import convert, weights


class ModelCheckpoint:
    """A trainer's callback, which no other process knows."""


class Callbacks(list):
    """A list's class, pickled by its items."""


TENSORS = {"model.a": torch.arange(6.0).reshape(2, 3), "model.b": torch.ones(4, dtype=torch.float16)}


def lightning(path):
    hyper = {"path": Path("x"), "classes": Callbacks([ModelCheckpoint()]), "set": {1, 2}}
    torch.save(
        {
            "state_dict": TENSORS,
            "global_step": 5,
            "callbacks": {ModelCheckpoint: {"best": 1}},
            "hyper_parameters": hyper,
        },
        path,
    )


def shared(path):
    torch.save(
        {"state_dict": {**TENSORS, "model_ema.a": TENSORS["model.a"], "model.part": TENSORS["model.a"][1]}}, path
    )


KINDS = {
    "lightning": lightning, "bare": lambda path: torch.save(TENSORS, path), "shared": shared,
    "step": lambda path: torch.save({"state_dict": {**TENSORS, "global_step": 5}}, path),
    "legacy": lambda path: torch.save({"state_dict": TENSORS}, path, _use_new_zipfile_serialization=False),
    "parameters": lambda path: torch.save({key: torch.nn.Parameter(value, False) for key, value in TENSORS.items()}, path),
    "module": lambda path: torch.save({"module": TENSORS, "epoch": 3}, path),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_arrives(tmp_path, kind):
    """Lightning's file (callbacks of unknown classes), a bare dict, shared memory, a step count among the tensors,
    torch's format before 1.6, parameters, another trainer's `module`: values and dtypes are equal, and the result is a
    plain safetensors file."""
    KINDS[kind](tmp_path / "a.ckpt")
    said = convert.convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    got = load_file(tmp_path / "a.safetensors")
    assert TENSORS.keys() <= got.keys()
    assert all(torch.equal(got[key], value) and got[key].dtype == value.dtype for key, value in TENSORS.items())
    assert ("global_step" in said) == (kind in ("lightning", "step"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "a.safetensors"]
    if kind == "shared":
        assert torch.equal(got["model_ema.a"], TENSORS["model.a"])
        assert torch.equal(got["model.part"], TENSORS["model.a"][1])


class Act:
    """What an attacker's pickle is: opening it runs a command."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("act", [Act(os.system, "touch ran"), Act(eval, "open('ran', 'w')"), Act(exec, "open('ran', 'w')"),
                                 Act(subprocess.call, ["touch", "ran"])], ids=["system", "eval", "exec", "subprocess"])  # fmt: skip
def test_nothing_is_run(tmp_path, monkeypatch, act):
    """A pickle that names a command is refused by name, and the command has not run (plain torch.load would run it)."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": TENSORS, "callbacks": act}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="which could act when opened and has no place among weights") as error:
        convert.convert(Path("evil.ckpt"), Path("evil.safetensors"))
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["evil.ckpt"]
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert "ran" in os.listdir(tmp_path)  # the file is what it is taken for


def test_a_class_with_side_effects_is_only_stood_in_for(tmp_path):
    """A name that torch does not know becomes an empty class: importing the real module, or calling it, would be
    seen."""
    (tmp_path / "sidemodule.py").write_text("open('imported', 'w')\ndef call(*_): open('called', 'w')\n", encoding="utf-8")
    code = ("import sys, torch; sys.path.insert(0, '.'); import sidemodule\n"
            "class Act:\n    def __reduce__(self): return sidemodule.call, (1,)\n"
            "torch.save({'state_dict': {'a': torch.ones(2)}, 'x': Act()}, 'a.ckpt')")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    (tmp_path / "imported").unlink()
    convert.convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]
    assert not {"imported", "called"} & set(os.listdir(tmp_path))


@pytest.mark.parametrize(("content", "says"), [
    (b"", "damaged"), (b"\x80\x04cos\nsystem\n", "damaged|could act"), (pickle.dumps({"a": 1}), "no tensors|damaged"),
    (b"PK\x03\x04 cut", "damaged")])  # fmt: skip
def test_damaged_files_are_one_line(tmp_path, content, says):
    """An empty, foreign or cut file ends in one line and leaves nothing behind."""
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        convert.convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_refusals(tmp_path):
    """Not there, not a pickle, a result that exists or has another ending: named, and nothing is written."""
    (tmp_path / "a.safetensors").write_bytes(b"precious")
    torch.save(TENSORS, tmp_path / "a.ckpt")
    for file, out, says in (
        ("none.ckpt", "n.safetensors", "not found"),
        ("a.safetensors", "b.safetensors", "is no pickled"),
        ("a.ckpt", "a.safetensors", "exists already"),
        ("a.ckpt", "a.bin", "must end in .safetensors"),
    ):
        with pytest.raises(ValueError, match=says):
            convert.convert(tmp_path / file, tmp_path / out)
    assert (tmp_path / "a.safetensors").read_bytes() == b"precious"
    torch.save({"epoch": 3}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="it holds no tensors: its entries are epoch"):
        convert.convert(tmp_path / "b.ckpt", tmp_path / "b.safetensors")


def test_the_printed_advice_works(tmp_path, run_script):
    """The command in the refusal of a pickle, taken word for word (its path has a space), converts it."""
    import shlex
    (tmp_path / "my model").mkdir()
    torch.save({"state_dict": TENSORS}, tmp_path / "my model" / "pytorch_model.bin")
    advice = str(weights.pickled(tmp_path / "my model" / "pytorch_model.bin")).partition("with: python ")[2]
    words = shlex.split(advice)
    assert words[:3] == ["-m", "lesion", "convert"]
    done = run_script("-m lesion", *words[2:])
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "my model" / "model.safetensors").keys() == TENSORS.keys()  # as transformers names it
    done = run_script("-m lesion", "convert", tmp_path / "none.ckpt")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
