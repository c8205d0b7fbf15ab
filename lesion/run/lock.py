"""One owner a folder: an operating system's lock that dies with its process, and says who holds it.

    with lock.owner(out):            # ValueError: `out` is in use by train_lora.py (process 123 on host, since ...)
        ...

The lock is flock(2) on `.lock` in the folder, or beside it for a command that replaces the folder as a whole; on Windows
a byte of that file is locked (msvcrt). A killed owner's lock is free at once: the file stays behind, its lock does not.
Where the file system has no locks (some network mounts) or Python neither module, folders are not guarded: that is no
reason to refuse work. Standard library only. Proven by tests/run/test_lock.py and tests/crash.
"""
import contextlib
import errno
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lesion.run import files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # everywhere else
    msvcrt = None

NAME = ".lock"
FAR = 1 << 30  # the byte that Windows locks: far behind the text, which others read
NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}
_open: set[int] = set()  # descriptors of held locks: a forked child closes its copies, or it would hold the lock for us


def _forget() -> None:
    for descriptor in _open:
        os.close(descriptor)
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def owner(folder: Path, *, beside: bool = False, shared: bool = False, wanted: bool = True) -> Iterator[None]:
    """Own `folder`, which is made if need be, until the block ends. ValueError, naming who, if another process does.

    beside: the lock is `.<name>.lock` in the folder's parent, for a command that replaces the folder. shared: any number of
    such owners, but none that is not. wanted: false does nothing, for processes that write no file. What killed owners left
    behind is swept (files.sweep; below the folder only by an owner that is not shared). A folder made here that is still empty at
    the end is removed again.
    """
    if not wanted:
        yield
        return
    folder = Path(folder).resolve()
    place = folder.parent if beside else folder
    new = [above for above in (place, *place.parents) if not above.exists()]
    path = place / (f".{folder.name}{NAME}" if beside else NAME)
    if shared and not (place.is_dir() and os.access(place, os.W_OK)):  # who only reads needs no lock to say what is wrong
        yield
        return
    descriptor = _acquire(path, folder, shared)
    _open.add(descriptor)
    try:
        if not shared:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(_who()).encode())
        if not beside:
            files.sweep(folder, deep=not shared)
        yield
    finally:
        with contextlib.suppress(OSError):  # another still shares it; Windows keeps an open file
            if shared:
                _lock(descriptor, shared=False)
            path.unlink()
        _open.discard(descriptor)
        os.close(descriptor)
        if os.name != "posix":
            with contextlib.suppress(OSError):  # another has it open
                path.unlink()
        with contextlib.suppress(OSError):  # not empty: good
            for above in new:
                above.rmdir()


def _acquire(path: Path, folder: Path, shared: bool) -> int:
    """The descriptor of the locked file, in a folder that is made if need be: again, where an owner that ends takes one away."""
    taken = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | files.NO_LINKS, 0o666)
        except (FileNotFoundError, FileExistsError):
            taken += 1
            if taken == 1000:
                raise  # nobody else's doing: a place where nothing can be made
            continue
        try:
            _lock(descriptor, shared)
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                return descriptor
        except FileNotFoundError:
            pass  # its owner removed the file between our open and our lock: try the next one
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise ValueError(f"{folder} is in use by {holder(path)}: wait for it, or give another folder") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, shared: bool) -> None:
    try:
        if fcntl:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        elif msvcrt:
            os.lseek(descriptor, FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _who() -> dict:
    command = Path(sys.argv[0])
    words = [f"lesion {sys.argv[1]}" if command.name == "__main__.py" and len(sys.argv) > 1 else command.name or "python"]
    return {"pid": os.getpid(), "host": platform.node(), "command": words[0], "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def holder(path: Path) -> str:
    """Who wrote the lock file `path`, in words."""
    try:
        who = json.loads(path.read_bytes())
        return f"{who['command']} (process {who['pid']} on {who['host']}, since {who['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it is just starting, or several share the folder
