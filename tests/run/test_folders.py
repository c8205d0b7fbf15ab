"""Run folders: defaults that say which and why, names, resuming only what is the same, a log cut to its checkpoint."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lesion.run import files, folders


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mini(tmp_path, monkeypatch):
    """A built-in base that is there."""
    folder = tmp_path / "assets" / "mini"
    (folder / "unet").mkdir(parents=True)
    monkeypatch.setattr(folders, "MINI", folder)
    return folder


# --- defaults --------------------------------------------------------------------------------------------------------


def test_defaults_without_data(here, mini):
    """Nothing prepared: the demo set and the built-in base, and the line says how to get the real thing."""
    data, base, what = folders.default_inputs(None, None)
    assert (data, base) == (folders.DEMO, str(mini))
    assert "demo set" in what
    assert f"--data {folders.ISIC} --base {folders.SD15}" in what


def test_defaults_with_isic(here, mini):
    """A prepared ISIC set is taken with SD 1.5; what is given is not overruled."""
    files.write_manifest(folders.ISIC, [{"file_name": "a"}])
    assert folders.default_inputs(None, None)[:2] == (folders.ISIC, folders.SD15)
    assert folders.default_inputs(None, "base.safetensors")[:2] == (folders.ISIC, "base.safetensors")
    assert folders.default_inputs(here / "mine", None)[:2] == (here / "mine", folders.SD15)
    assert folders.default_inputs(here / "data" / "demo", None)[1] == str(mini)  # the demo set under another spelling


def test_defaults_without_the_built_in_base(here, monkeypatch):
    """Without data and without the built-in base, one line says what to give."""
    monkeypatch.setattr(folders, "MINI", here / "absent")
    with pytest.raises(ValueError, match="give --data .* and --base"):
        folders.default_inputs(None, None)


def test_mini_is_a_name(here):
    """The built-in base by its name, unless a folder is called so; other names stand."""
    assert folders.named("mini") == folders.default_inputs(None, "mini")[1] == str(folders.MINI)
    assert (folders.named(None), folders.named("a/b")) == (None, "a/b")
    (here / "mini").mkdir()
    assert folders.named("mini") == "mini"


def test_recipe_depends_on_the_base(here, mini):
    """The built-in base has its own steps, rate and guidance; what is given on the command line stays."""
    from types import SimpleNamespace
    for base, expected in ((str(mini), folders.MINI_RECIPE), (folders.SD15, {"steps": 1400, "lr": 3e-5, "guidance_scale": 7.5})):
        args = SimpleNamespace(base=base, steps=None, lr=1.0, guidance_scale=None)
        folders.fill_recipe(args)
        assert vars(args) == {"base": base, "steps": expected["steps"], "lr": 1.0, "guidance_scale": expected["guidance_scale"]}
        drawing = SimpleNamespace(base=base, steps=50, guidance_scale=None)
        folders.fill_recipe(drawing)
        assert vars(drawing) == {"base": base, "steps": 50, "guidance_scale": expected["guidance_scale"]}


# --- names -----------------------------------------------------------------------------------------------------------


def test_next_folder(here):
    """The first name that is free."""
    assert folders.next_folder("x").as_posix() == "runs/x"
    (here / "runs" / "x").mkdir(parents=True)
    assert folders.next_folder("x").as_posix() == "runs/x-2"
    (here / "runs" / "x-2").mkdir()
    assert folders.next_folder("x").as_posix() == "runs/x-3"


def test_newest(here):
    """Finished runs, the newest first by when their LoRA was written; unfinished ones are not counted."""
    assert folders.newest("*") is None
    for name, seconds in (("malignant-phase1", 300), ("malignant-phase1-2", 100), ("malignant-phase2", 200)):
        files.write_bytes(here / "runs" / name / "lora.safetensors", b"")
        os.utime(here / "runs" / name / "lora.safetensors", (seconds, seconds))
    (here / "runs" / "malignant-phase1-3").mkdir()
    assert [folder.name for folder in folders.finished("malignant-phase1*")] == ["malignant-phase1", "malignant-phase1-2"]
    assert folders.newest("*").name == "malignant-phase1"
    assert folders.newest("*", "checkpoint.safetensors") is None


# --- opening and resuming --------------------------------------------------------------------------------------------

RECIPE = {"lr": 3e-5, "steps": 100, "rank": 16, "betas": (0.9, 0.999), "provenance": {"git_commit": "a"}}


def test_open_and_resume(tmp_path):
    """A new folder is made; --resume reopens it with the same recipe, in which only free flags may have changed."""
    run = tmp_path / "run"
    assert folders.open_run(run, RECIPE, resume=False) is False
    assert json.loads((run / "args.json").read_text(encoding="utf-8"))["lr"] == 3e-5
    assert folders.open_run(run, {**RECIPE, "provenance": {"git_commit": "b"}}, resume=True) is True
    assert folders.open_run(run, {**RECIPE, "steps": 200}, resume=True, free=("steps",)) is True
    assert json.loads((run / "args.json").read_text(encoding="utf-8"))["steps"] == 200


def test_another_recipe_is_refused(tmp_path):
    """A changed recipe is named, old value and new, and the record stays; a flag that is new counts as changed."""
    folders.open_run(tmp_path / "run", RECIPE, resume=False)
    with pytest.raises(ValueError, match="lr was 3e-05, now 0.0001, rank was 16, now 4") as error:
        folders.open_run(tmp_path / "run", {**RECIPE, "lr": 1e-4, "rank": 4}, resume=True)
    assert str(tmp_path / "run") in str(error.value)
    with pytest.raises(ValueError, match="steps was 100, now 5"):
        folders.open_run(tmp_path / "run", {**RECIPE, "steps": 5}, resume=True)
    with pytest.raises(ValueError, match="min_snr was None, now 5"):
        folders.open_run(tmp_path / "run", {**RECIPE, "min_snr": 5}, resume=True)
    assert json.loads((tmp_path / "run" / "args.json").read_text(encoding="utf-8"))["lr"] == 3e-5


def test_foreign_folders_are_refused(tmp_path):
    """A run is not overwritten without --resume, a folder of something else never; an empty one is taken."""
    folders.open_run(tmp_path / "run", RECIPE, resume=False)
    with pytest.raises(ValueError, match="holds a run already: give --resume"):
        folders.open_run(tmp_path / "run", RECIPE, resume=False)
    (tmp_path / "thesis").mkdir()
    assert folders.open_run(tmp_path / "thesis", RECIPE, resume=True) is False
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    for resume in (False, True):
        with pytest.raises(ValueError, match="is not a run folder: give another --out"):
            folders.open_run(tmp_path / "photos", RECIPE, resume=resume)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_a_kill_before_the_first_file_does_not_lock_the_folder(tmp_path):
    """The orphaned temporary of a kill in mid-write does not make the folder somebody else's."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".args.json.abc.tmp").write_text('{"lr"', encoding="utf-8")
    assert folders.open_run(tmp_path / "run", RECIPE, resume=False) is False


def test_a_damaged_record_is_named(tmp_path):
    """args.json that is no JSON object is named."""
    for text in ('{"lr": ', "[1, 2]"):
        (tmp_path / "args.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="args.json"):
            folders.open_run(tmp_path, RECIPE, resume=True)


def test_cut_metrics(tmp_path):
    """Rows after the checkpoint's step go, a torn one with them; the bytes of the rest stay; no file is no error."""
    path = tmp_path / "metrics.jsonl"
    folders.cut_metrics(path, 5)
    assert not path.exists()
    files.append_jsonl(path, *[{"step": step, "loss": 1 / step} for step in (1, 2, 3, 4)])
    kept = path.read_bytes().split(b'{"step": 3')[0]
    with open(path, "ab") as file:
        file.write(b'{"step": 5, "lo')
    folders.cut_metrics(path, 2)
    assert path.read_bytes() == kept


KILLED = """
import os, signal, sys
from pathlib import Path
from lesion.run import files, folders
left = int(sys.argv[2])
def die(event, args):
    global left
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "ctypes.dlsym", "os.listdir", "os.scandir"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
with folders.replaced(Path(sys.argv[1])) as new:
    files.write_bytes(new / "a.txt", sys.argv[3].encode())
    files.write_bytes(new / "deep" / "b.txt", sys.argv[3].encode())
print("done")
"""


@pytest.mark.parametrize("exchange", [True, False])
def test_replaced_at_every_moment_is_old_or_new(tmp_path, exchange):
    """Killed before each of its calls to the system: the folder is the old one whole or the new one whole (without an exchange
    of names it may stand beside for a moment, and the next call puts it back); the next call ends well and sweeps."""
    def contents(folder):
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.txt"))}

    def call(number, word):
        program = KILLED if exchange else KILLED.replace("left = int", "folders._exchange = lambda *_: False\nleft = int")
        return subprocess.run([sys.executable, "-c", program, str(tmp_path / "r"), str(number), word],
                              capture_output=True, encoding="utf-8",
                              env={**os.environ, "PYTHONPATH": str(folders.ROOT)})
    assert call(10**9, "old").stdout == "done\n"
    killed = 0
    for number in range(0, 400, 1 if exchange else 3):
        done = call(number, "new")
        held = tmp_path / "r" if (tmp_path / "r").exists() or exchange else tmp_path / ".r.old"
        assert contents(held) in ({"a.txt": "old", "b.txt": "old"}, {"a.txt": "new", "b.txt": "new"})
        if done.stdout == "done\n":
            break
        assert done.returncode == -signal.SIGKILL
        killed += 1
        if contents(held)["a.txt"] == "new":
            assert call(10**9, "old").stdout == "done\n"
    assert killed > (20 if exchange else 8)
    assert contents(tmp_path / "r") == {"a.txt": "new", "b.txt": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_replaced_keeps_the_old_folder_when_it_fails(tmp_path):
    """An error inside leaves the folder as it was and nothing beside it; a link to a folder stays a link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    def replace(word):
        with folders.replaced(tmp_path / "link") as new:
            (new / "x").write_text(word, encoding="utf-8")
            if word == "y":
                raise ZeroDivisionError
    replace("x")
    with pytest.raises(ZeroDivisionError):
        replace("y")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "x").read_text(encoding="utf-8") == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_replaced_within_another(tmp_path):
    """A folder replaced while another, whose name begins alike, is being filled by the same process: neither sweeps the other's
    work; what a dead process of our number left is swept."""
    (tmp_path / f".r.dead.{os.getpid()}.partial").mkdir()
    with folders.replaced(tmp_path / "r.more") as outer:
        files.write_bytes(outer / "x", b"outer")
        with folders.replaced(tmp_path / "r") as inner:
            files.write_bytes(inner / "x", b"inner")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r", "r.more"]
    assert [(tmp_path / name / "x").read_bytes() for name in ("r.more", "r")] == [b"outer", b"inner"]


def test_newest_file_is_by_time_of_change(tmp_path, monkeypatch):
    """Among all patterns the file changed last, not the last by name; nothing where nothing matches."""
    monkeypatch.chdir(tmp_path)
    for place, name in enumerate(("b/x.json", "a/x.json", "c/y.json")):
        files.write_bytes(tmp_path / name, b"")
        os.utime(tmp_path / name, (100 - place, 100 - place))
    assert folders.newest_file("*/x.json", "*/y.json") == Path("b/x.json")
    assert folders.newest_file("*/z.json") is None
