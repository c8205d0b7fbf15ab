"""Runs a command of ours as on Windows: `python tests/windows.py train_lora.py --steps 2`, or a module.

For our own files only: no POSIX-only module, no POSIX-only call of os and signal, os.name "nt", sys.platform "win32", a
msvcrt whose lock is a real one, and relative paths with backslashes. For everything at or below the working directory,
whoever asks: an open file is neither renamed, replaced nor removed (a mapped one is not replaced or removed), no folder
is opened, or moved with an open file in it, no symbolic link is made, no name holds <>:"|?* or ends in a dot or space.
"""
import builtins
import importlib
import os
import pathlib
import posixpath
import runpy
import shutil
import signal
import subprocess  # noqa: F401 - before msvcrt is there: it would take this for Windows
import sys
import types

ROOT = pathlib.Path(__file__).resolve().parents[1]
ABSENT = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "readline"}
CALLS = {"fork", "getuid", "geteuid", "getgid", "wait4", "mkfifo", "chown", "lchown", "setsid", "killpg", "sync",
         "nice", "getloadavg", "register_at_fork", "sched_getaffinity", "SIGKILL", "SIGPIPE", "SIGHUP", "SIGUSR1",
         "SIGALRM", "alarm", "setitimer", "pause", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "fchmod", "fchown",
         "statvfs",
         "uname", "openpty"}
HERE = {"name": "nt", "sep": "\\", "platform": "win32"}
_frame, _import = sys._getframe, builtins.__import__
_relative_to, _relpath = pathlib.PurePath.relative_to, posixpath.relpath


def ours(depth: int) -> bool:
    """Whether the caller's caller, `depth` frames up, is a file of ours."""
    name = _frame(depth + 1).f_globals.get("__file__") or ""
    return name.startswith(str(ROOT)) and not name.startswith((str(ROOT / ".venv"), str(ROOT / "tests")))


class Windows(types.ModuleType):
    """os, signal and sys as our files see them; modules imported later have sys's class too, and stay as they are."""

    def __getattribute__(self, name):
        if (name in CALLS or name in HERE) and (self is os or self is signal or self is sys) and ours(1):
            if name in HERE:
                return HERE[name]
            raise AttributeError(f"module has no attribute {name!r} (simulated Windows)")
        return super().__getattribute__(name)


def hide(name, *rest, **more):
    """`import`, without what Windows lacks and with what only it has."""
    if name.split(".")[0] in ABSENT and ours(1):
        raise ImportError(f"No module named {name!r} (simulated Windows)")
    return MSVCRT if name == "msvcrt" and ours(1) else _import(name, *rest, **more)


def locking(descriptor, mode, count):
    """msvcrt.locking of a byte, as a lock of the whole file."""
    import fcntl
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(13, "Permission denied (simulated Windows)") from None


MSVCRT = types.SimpleNamespace(locking=locking, LK_NBLCK=2, LK_LOCK=1, LK_UNLCK=0)


def relative_to(self, *other, **more):
    found = _relative_to(self, *other, **more)
    if ours(1):
        found._str = str(found).replace("/", "\\")
    return found


def relpath(*paths):
    return _relpath(*paths).replace("/", "\\") if ours(1) else _relpath(*paths)


class Files:
    """An audit hook with Windows' rules about names and open files, for what lies in one folder."""

    def __init__(self, folder: str):
        self.folder, self.asking = folder, False

    def __call__(self, event, arguments):
        rule = {"open": self.open, "os.rename": self.rename, "os.remove": self.remove, "os.rmdir": self.remove,
                "os.mkdir": self.name, "os.symlink": self.link}.get(event)
        if rule is None or self.asking:
            return
        self.asking = True
        try:
            rule(*arguments)
        finally:
            self.asking = False

    def inside(self, path) -> str | None:
        if isinstance(path, int) or path is None:
            return None
        path = os.path.abspath(os.fsdecode(path))
        return path if path == self.folder or path.startswith(self.folder + "/") else None

    @staticmethod
    def refuse(path, what):
        raise PermissionError(13, f"{what} (simulated Windows)", path)

    def held(self, path: str, mapped: bool) -> bool:
        """Whether this process has `path`, or a file in it, open; or mapped, if that counts."""
        names = []
        for number in os.listdir("/proc/self/fd"):
            try:
                names.append(os.readlink(f"/proc/self/fd/{number}"))
            except OSError:
                continue
        if mapped:
            with open("/proc/self/maps", encoding="utf-8") as file:
                names += [line[line.index("/"):].rstrip("\n") for line in file if "/" in line]
        return any(name == path or name.startswith(path + "/") for name in names)

    def open(self, path, mode, flags):
        if path := self.inside(path):
            if os.path.isdir(path):
                self.refuse(path, "a folder cannot be opened")
            self.name(path)

    def name(self, path, *_):
        if path := self.inside(path):
            name = os.path.basename(path)
            if set('<>:"|?*') & set(name) or name.endswith((".", " ")):
                self.refuse(path, "not a file name")

    def rename(self, source, target, *_):
        for path, mapped in ((self.inside(source), False), (self.inside(target), True)):
            if path and self.held(path, mapped):
                self.refuse(path, "the file is in use")
        self.name(target)

    def remove(self, path, *_):
        path = self.inside(path)
        if path and self.held(path, True):
            self.refuse(path, "the file is in use")

    def link(self, source, target, *_):
        if path := self.inside(target):
            self.refuse(path, "a privilege is missing")


def simulate(folder: str) -> None:
    """From now on this process is on Windows, as far as that goes; `folder`: where the rules about files hold."""
    builtins.__import__ = hide
    for module in (os, signal, sys):
        module.__class__ = Windows
    pathlib.PurePath.relative_to = relative_to
    pathlib.PurePath.as_posix = lambda self: str(self).replace("\\", "/")
    posixpath.relpath = relpath
    shutil._use_fd_functions = False  # rmtree by names, as there
    sys.addaudithook(Files(os.path.realpath(folder)))


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    simulate(os.getcwd())
    command, *sys.argv[1:] = sys.argv[1:]
    if command == "-c":
        exec(compile(sys.argv[1], str(ROOT / "x.py"), "exec"), {"__file__": str(ROOT / "x.py")})
    elif command.endswith(".py"):
        sys.argv[0] = str(ROOT / command)
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        sys.argv[0] = "lesion"
        importlib.import_module(command).main(sys.argv[1:])
