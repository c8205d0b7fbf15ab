"""Every boundary reader, given hostile content, returns or refuses in one line: no other exception, no hang, no memory
beyond 1 GiB, no file outside its folder.

Here a few cases a reader, the same ones every time. The long run, by one command, with that many random cases a reader
(LESION_FUZZ_SEED repeats one; -k takes some readers):

    LESION_FUZZ=10000 python -m pytest -n0 tests/fuzz
"""

import contextlib
import faulthandler
import io
import mmap
import os
import pickle
import resource
import select
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
from fuzz import boundaries
from fuzz.reader import Reader
from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis import strategies as st

from lesion.run import cli

COUNT, SEED = int(os.environ.get("LESION_FUZZ", 0)), os.environ.get("LESION_FUZZ_SEED")
FEW = 12
LIMIT_S, KILLED_S = 10, 40  # an alarm that Python hears; the end of a process that does not come back from C
MEMORY = 1 << 30
ELSEWHERE = Path("/lesion-fuzz")  # where absolute names of the cases lead
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="alarms, forks and measures of memory are POSIX's")


class Hang(BaseException):
    """Raised by the alarm: no reader catches it by a broad `except`."""


def _alarm(*_):
    raise Hang


@contextlib.contextmanager
def deadline():
    """A block over LIMIT_S fails; one that never comes back ends the process, and says where."""
    before = signal.signal(signal.SIGALRM, _alarm)
    faulthandler.dump_traceback_later(KILLED_S, exit=True, file=sys.__stderr__)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    except Hang:
        raise AssertionError(f"no answer within {LIMIT_S} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def peak() -> int:
    """Bytes of this process' largest resident set, on Linux since `reset_peak`."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak() -> int:
    """Let the peak begin anew where the system can; the peak then."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")
    return peak()


def tree(folder, but=()):
    """{name: (size, time)} of everything below `folder`, the folders `but` apart."""
    found = {}
    for place, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if Path(place, name) not in but]
        for path in (Path(place, name) for name in (*inner, *names)):
            status = path.lstat()
            found[str(path)] = status.st_size, status.st_mtime_ns
    return found


@contextlib.contextmanager
def written(place, case):
    """The files of a case, in their places; afterwards what stood there before."""
    before = {}
    for name, data in case.items() if isinstance(case, dict) else ():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        before[path] = path.read_bytes() if path.is_file() else None
        path.unlink(missing_ok=True)
        path.write_bytes(data)
    try:
        yield
    finally:
        for path, data in before.items():
            path.unlink(missing_ok=True)
            if data is not None:
                path.write_bytes(data)


def judged(reader, kept, place, case) -> str:
    """ "read" or "refused"; AssertionError, or what the reader raised, for all that is not allowed."""
    said, code = io.StringIO(), 2
    try:
        with deadline(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            reader.read(kept, place, case)
        return "read"
    except (ValueError, OSError) as error:
        line = cli.one_line(error)
    except SystemExit as error:  # a command line's own refusal
        code = error.code
        line = said.getvalue().removesuffix("\n")
    assert code == 2
    assert line.strip(), "refused without a word"
    assert line.isprintable(), f"not one line of text: {line[:300]!r}"
    return "refused"


def judged_apart(reader, kept, place, case) -> str:
    """`judged` in a fork: what kills it, or never comes back, is a failure and not the end of the tests."""
    back, there = os.pipe()
    child = os.fork()
    if not child:
        try:
            begun = reset_peak()
            result = judged(reader, kept, place, case), peak() - begun
        except BaseException:
            result = traceback.format_exc(), 0
        os.write(there, pickle.dumps(result)[:60_000])
        os._exit(0)
    os.close(there)
    ready = select.select([back], [], [], LIMIT_S + 5)[0]
    data = os.read(back, 65_536) if ready else b""
    os.close(back)
    if not ready:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert ready, f"no answer within {LIMIT_S} s"
    assert data, f"the process died: {signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else status}"
    result, grown = pickle.loads(data)
    assert result in ("read", "refused"), result
    assert grown < MEMORY, f"{grown >> 20} MiB more memory"
    return result


def run(reader, place) -> str:
    """All cases of a reader; a line of figures. AssertionError, or what was raised, with the smallest case found."""
    inside, out, beside = place / "in", place / "out", place / "beside"
    for folder in (inside, out, beside):
        folder.mkdir()
    (beside / "x").write_bytes(b"untouched")
    kept = reader.start(inside)
    seen, slowest = {"read": 0, "refused": 0}, [0.0]
    before, begun = tree(place, (inside, out)), reset_peak()

    @settings(
        max_examples=COUNT or FEW,
        derandomize=not COUNT,
        database=None,
        deadline=None,
        print_blob=False,
        phases=[Phase.explicit, Phase.generate, *([] if COUNT else [Phase.shrink])],
        suppress_health_check=list(HealthCheck),
    )
    @given(reader.cases(kept))
    def test(case):
        start = time.perf_counter()
        with written(inside, case):
            result = (judged_apart if reader.apart else judged)(reader, kept, inside, case)
        seen[result] += 1
        slowest[0] = max(slowest[0], time.perf_counter() - start)
        assert tree(place, (inside, out)) == before, "a file outside its folder"
        assert not ELSEWHERE.exists()

    for case in boundaries.EXAMPLES.get(reader.name, ()):
        test = example(case)(test)
    (seed(int(SEED))(test) if SEED else test)()
    grown = peak() - begun
    assert grown < MEMORY, f"{grown >> 20} MiB more memory"
    return (
        f"{reader.name}: {sum(seen.values())} cases, {seen['refused']} refused, slowest {slowest[0]:.2f} s, "
        f"{grown >> 20} MiB more memory"
    )


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory of our own, and no waiting for a disk: what a killed process loses is tests/crash's."""
    (tmp_path / "fuzz" / "work").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "fuzz" / "work")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(os, "sync", lambda: None)
    return tmp_path / "fuzz"


@pytest.mark.parametrize("reader", boundaries.READERS, ids=lambda reader: reader.name)
def test_a_reader_returns_or_refuses(reader, place, capsys):
    """Each case within the time, the memory and the folder that it is allowed."""
    line = run(reader, place)
    if COUNT:
        with capsys.disabled():
            print(f"\n{line}", flush=True)


def _raise(error):
    raise error


def _take_memory():
    """256 MiB from the system: the allocator may have as much in hand."""
    with mmap.mmap(-1, 1 << 28) as memory:
        for _ in range(256):
            memory.write(b"x" * (1 << 20))


FAULTS = {
    "TypeError": lambda kept, place, case: _raise(TypeError("x")),
    "refused without a word": lambda kept, place, case: _raise(SystemExit(2)),
    "no answer within": lambda kept, place, case: time.sleep(5),
    "the process died": lambda kept, place, case: os.kill(os.getpid(), signal.SIGKILL),
    "MiB more memory": lambda kept, place, case: _take_memory(),
    "a file outside its folder": lambda kept, place, case: (place.parent / "beside" / "y").write_bytes(b""),
}


@pytest.mark.parametrize("says", FAULTS)
@pytest.mark.parametrize("apart", [False, True])
def test_a_fault_is_found(says, apart, place, monkeypatch):
    """Otherwise the test above would prove nothing."""
    if says == "the process died" and not apart:
        pytest.skip("would be the end of this process")
    monkeypatch.setattr(sys.modules[__name__], "LIMIT_S", 1.0)
    monkeypatch.setattr(sys.modules[__name__], "MEMORY", 1 << 27)
    reader = Reader("x", lambda kept: st.just({"x": b""}), FAULTS[says], apart=apart)
    with pytest.raises((AssertionError, TypeError)) as error:
        run(reader, place)
    assert says in f"{type(error.value).__name__}: {error.value}"
