"""SHA256SUMS: the hashes of everything a command has written, which the next command checks and `lesion verify` recomputes.

The format is that of coreutils: `cd FOLDER && sha256sum -c SHA256SUMS` checks a folder without us. Hidden files (locks, caches,
temporaries) are not artefacts. Standard library only. Proven by tests/run/test_sums.py.
"""
import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from lesion.run import files

NAME = "SHA256SUMS"


def begin(folder: Path) -> None:
    """A command starts to change `folder`: the hashes of before are void until `write`."""
    (Path(folder) / NAME).unlink(missing_ok=True)


def artefacts(folder: Path) -> list[str]:
    """Names, relative and with slashes, of the files in `folder` and below it that are not hidden; links are not followed."""
    found = []
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if name[0] != ".")
        found += [Path(place, name).relative_to(folder).as_posix() for name in names if name[0] != "." and name != NAME]
    return sorted(found)


def write(folder: Path, but: tuple[str, ...] = ()) -> None:
    """Write `folder`/SHA256SUMS over all its artefacts but those named, atomically."""
    _write(folder, {name: files.sha256_file(Path(folder) / name) for name in artefacts(folder) if name not in but})


def update(folder: Path, *names: str) -> None:
    """Take over the hashes of files that a later command has rightly changed; nothing where there is no SHA256SUMS."""
    take_over(folder, {name: files.sha256_file(Path(folder) / name) for name in names})


def take_over(folder: Path, hashes: dict[str, str]) -> None:
    """`update` with hashes {name: SHA-256} that are known: of a file that is about to stand there."""
    if (Path(folder) / NAME).is_file():
        _write(folder, read(folder) | hashes)


def _write(folder: Path, hashes: dict[str, str]) -> None:
    files.write_bytes(Path(folder) / NAME, "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items())).encode())


def read(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of `folder`/SHA256SUMS. ValueError, with the line's number, for what is no such table, or a name that leads
    out of the folder."""
    path, hashes = Path(folder) / NAME, {}
    for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").split("\n"), 1):
        digest, gap, name = line[:64], line[64:66], line[66:]
        if not line:
            continue
        if gap not in ("  ", " *") or set(digest) - set("0123456789abcdef") or name.startswith("/") or ".." in Path(name).parts:
            raise ValueError(f"{path}, line {number}: expected `<SHA-256>  <name>`")
        hashes[name] = digest
    return hashes


def problems(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """One line for each listed file (of `names`, where given) that is missing or changed."""
    hashes = read(folder)
    chosen = hashes if names is None else [name for name in names if name in hashes]
    return [found for name in chosen if (found := problem_of(Path(folder) / name, hashes[name]))]


def problem_of(path: Path, digest: str) -> str:
    """What is wrong with a file whose SHA-256 was `digest`, or ""."""
    try:
        return "" if files.sha256_file(path) == digest else f"{path} is not what was written: its SHA-256 differs from {NAME}"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def require(folder: Path, names: Iterable[str] | None = None) -> None:
    """ValueError if a file of `folder` that the next command is about to use is not as the last one wrote it. A folder without
    SHA256SUMS (still being written, or not ours) passes."""
    if (Path(folder) / NAME).is_file() and (found := problems(folder, names)):
        more = f" (and {len(found) - 1} more: python -m lesion verify {folder})" if len(found) > 1 else ""
        raise ValueError(f"{found[0]}{more}; restore it, or write the folder anew; if the change is yours, remove "
                         f"{Path(folder) / NAME}")


def require_file(path: Path) -> None:
    """`require` for one file, by the hashes of its folder or of the one above it (a run's checkpoints/)."""
    path = Path(path).absolute()
    for folder in (path.parent, path.parent.parent):
        if (folder / NAME).is_file():
            require(folder, [path.relative_to(folder).as_posix()])


def require_unless_gone(folder: Path, but: tuple[str, ...] = ()) -> None:
    """`require` for all listed files that are still there, less those named: for a command that adds to a folder from which people
    remove old files."""
    if (Path(folder) / NAME).is_file():
        require(folder, [name for name in read(folder) if (Path(folder) / name).exists() and name not in but])


@contextlib.contextmanager
def over(folder: Path, wanted: bool = True):
    """The hashes of `folder` are checked, then void while the block changes it, and written when it ends well. They come back if
    it fails before it has changed anything."""
    if not wanted:
        yield
        return
    require(folder)
    path = Path(folder) / NAME
    before = path.read_bytes() if path.is_file() else None
    begin(folder)
    try:
        yield
    except BaseException:
        if before is not None:
            files.write_bytes(path, before)
            if sorted(read(folder)) != artefacts(folder) or problems(folder):
                begin(folder)
        raise
    write(folder)
