"""One owner a folder: the second is told who holds it, a killed owner's lock is free, what it left is swept."""
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from lesion.run import files, lock

ENV = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])}
HOLD = """
import sys, time
from lesion.run import lock
sys.argv[0] = "/somewhere/train_lora.py"
with lock.owner(sys.argv[1], **eval(sys.argv[2])):
    print("mine", flush=True)
    time.sleep(60)
"""


def hold(folder, **how):
    """A process that owns `folder`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), repr(how)], env=ENV, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout.readline() == "mine\n"
    return process


@pytest.fixture
def holder(tmp_path):
    process = hold(tmp_path / "run")
    yield process
    process.kill()
    process.wait()


def test_the_second_says_who_holds_it(tmp_path, holder):
    """One line: which folder, which command, its process and since when."""
    with pytest.raises(ValueError, match=rf"run is in use by train_lora\.py \(process {holder.pid} on .*, since 20\d\d-"), \
            lock.owner(tmp_path / "run"):
        pass
    (tmp_path / "other").symlink_to(tmp_path / "run")  # the same folder under another name
    with pytest.raises(ValueError, match="is in use by train_lora.py"), lock.owner(tmp_path / "other"):
        pass


def test_a_killed_owners_lock_is_free(tmp_path, holder):
    """kill -9 of the holder: the next owner gets the folder at once, though `.lock` still stands there."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".lock").is_file()
    with lock.owner(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text(encoding="utf-8"))["pid"] == os.getpid()
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_thread_of_the_same_process_counts_as_another(tmp_path):
    """Two notebook threads on one folder: the second is refused."""
    refusals = []

    def second():
        try:
            with lock.owner(tmp_path / "run"):
                pass
        except ValueError as error:
            refusals.append(str(error))
    with lock.owner(tmp_path / "run"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refusals) == 1
    with lock.owner(tmp_path / "run"):
        pass  # given back


def test_a_forked_child_does_not_hold_it(tmp_path):
    """A worker that outlives its killed parent (a pool's) leaves the folder free."""
    code = textwrap.dedent("""
        import os, sys, time
        from lesion.run import lock
        with lock.owner(sys.argv[1]):
            if os.fork() == 0:
                print(os.getpid(), flush=True)  # from the child: the fork is over, and what it inherited is closed
            time.sleep(60)
    """)
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], env=ENV, stdout=subprocess.PIPE, encoding="utf-8")
    child = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait()
        os.kill(child, 0)  # it lives
        with lock.owner(tmp_path / "run"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_shared_and_alone(tmp_path):
    """Several labellers share a data set; nobody replaces it meanwhile."""
    (tmp_path / "data").mkdir()
    process = hold(tmp_path / "data", shared=True)
    try:
        with lock.owner(tmp_path / "data", shared=True):
            pass
        with pytest.raises(ValueError, match="is in use by"), lock.owner(tmp_path / "data"):
            pass
    finally:
        process.kill()
        process.wait()
    with lock.owner(tmp_path / "data", shared=True):
        pass
    assert not list((tmp_path / "data").iterdir())


def test_beside(tmp_path):
    """A command that replaces its folder locks beside it: the folder may come and go."""
    with lock.owner(tmp_path / "set", beside=True):
        assert not (tmp_path / "set").exists()
        assert [path.name for path in tmp_path.iterdir()] == [".set.lock"]
        with pytest.raises(ValueError, match="set is in use by"), lock.owner(tmp_path / "set", beside=True):
            pass
    assert not list(tmp_path.iterdir())


def test_a_refused_command_leaves_no_folder(tmp_path):
    """A command that fails before it writes anything leaves neither folder nor lock; one that wrote leaves only its work."""
    with pytest.raises(RuntimeError), lock.owner(tmp_path / "a" / "run"):
        raise RuntimeError
    assert not (tmp_path / "a").exists()
    with lock.owner(tmp_path / "b"):
        files.write_bytes(tmp_path / "b" / "x", b"1")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["x"]


def test_not_wanted(tmp_path):
    """The processes of a run that write nothing do nothing here."""
    with lock.owner(tmp_path / "run", wanted=False):
        assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Where flock is not supported the folder is used without a guard."""
    def refuse(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with lock.owner(tmp_path / "run"):
        files.write_bytes(tmp_path / "run" / "x", b"1")
    assert (tmp_path / "run" / "x").read_bytes() == b"1"


def test_a_folder_taken_away(tmp_path, monkeypatch):
    """The owner before ends, and takes its empty folder with it, at the worst moment: between our making it and our lock."""
    real, taken = os.open, []

    def unlucky(path, *rest):
        if len(taken) < 3 and str(path).endswith(".lock"):
            os.rmdir(tmp_path / "a" / "run")
            taken.append(os.rmdir(tmp_path / "a"))
        return real(path, *rest)
    monkeypatch.setattr(lock.os, "open", unlucky)
    with lock.owner(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run" / ".lock").is_file()
    assert len(taken) == 3
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OSError), lock.owner(tmp_path / "file"):  # no folder will ever be there: an error, not a wait
        pass


def test_a_link_is_no_lock(tmp_path):
    """A folder that came with `.lock` as a link: the file it leads to is not written over."""
    (tmp_path / "precious").write_text("mine", encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError), lock.owner(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "mine"


def test_twenty_at_once(tmp_path):
    """Twenty processes that start together: at every moment one owner, and whoever is refused is told by whom."""
    code = textwrap.dedent("""
        import os, sys, time
        from lesion.run import lock
        until = time.time() + 1.5
        while time.time() < until:
            try:
                with lock.owner(sys.argv[1]):
                    mark = os.open(sys.argv[1] + "/mark", os.O_CREAT | os.O_EXCL)  # fails if anybody else is inside
                    time.sleep(0.002)
                    os.unlink(sys.argv[1] + "/mark")
                    os.close(mark)
                    print("in")
            except ValueError as error:
                assert "is in use by" in str(error)
    """)
    every = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], env=ENV, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, encoding="utf-8") for _ in range(20)]
    results = [process.communicate(timeout=60) for process in every]
    assert [process.returncode for process in every] == [0] * 20, [err[-500:] for _, err in results if err]
    assert sum(out.count("in") for out, _ in results) > 20


# --- what killed writers left ------------------------------------------------------------------------------------------


def test_the_next_owner_sweeps(tmp_path):
    """Temporary files of the dead go, at any depth; those of a living writer and everything else stay."""
    run = tmp_path / "run"
    for name in (".args.json.abcd1234.tmp", "samples/.step.png.x_9zzzzz.tmp", "keep.tmp", ".hidden", "samples/step.png"):
        files.write_bytes(run / name, b"1")
    with files.atomic_path(run / "alive.bin") as temporary:
        temporary.write_bytes(b"2")
        with lock.owner(run):
            left = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert left == {"keep.tmp", ".hidden", "samples/step.png", temporary.name, ".lock"}
    assert (run / "alive.bin").read_bytes() == b"2"


def test_a_kill_in_mid_write_is_swept(tmp_path):
    """The orphan of a writer killed by SIGKILL is gone when the next owner starts."""
    code = ("import os, signal, sys\nfrom lesion.run import files\n"
            "with files.atomic_path(sys.argv[1]) as t:\n t.write_bytes(b'half')\n os.kill(os.getpid(), signal.SIGKILL)")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run" / "x.bin")], env=ENV)
    assert len(list((tmp_path / "run").iterdir())) == 1
    with lock.owner(tmp_path / "run"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_sweep_follows_no_link(tmp_path):
    """A link to another folder is not walked, nor a linked file removed at its end."""
    files.write_bytes(tmp_path / "else" / ".a.bin.abcd1234.tmp", b"1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path / "else")
    assert files.sweep(tmp_path / "run") == []
    assert (tmp_path / "else" / ".a.bin.abcd1234.tmp").is_file()


def test_time_in_words():
    """The holder's time is the local time of its start."""
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", lock._who()["since"])
    assert abs(time.mktime(time.strptime(lock._who()["since"], "%Y-%m-%d %H:%M:%S")) - time.time()) < 5
