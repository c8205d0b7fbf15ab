"""Saved state: tensors and JSON as one safetensors file that carries its own hash and keeps its predecessor; hashes of weights; origin.

Proven by tests/run/test_state.py.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lesion import __version__
from lesion.run import files

STATE = "lesion_state"  # the one entry of a state's metadata: "<SHA-256> <JSON>"

def save_state(path: Path, tensors: dict[str, Tensor], meta: dict, keep_last: bool = False) -> None:
    """Write tensors and a JSON-able `meta` as one safetensors file, atomically, with the SHA-256 of its content in it.

    keep_last: the state that stands at `path` stays as its predecessor (`previous_of`). OSError if the disk is full: what
    stood before stands still. Equal content gives equal bytes.
    """
    path, text = Path(path), json.dumps(meta)
    tensors = {key: value.detach().to("cpu").contiguous().clone() for key, value in tensors.items()}
    with files.atomic_path(path) as temporary:
        write_tensors(temporary, tensors, {STATE: f"{_sha256_state(tensors, text)} {text}"})
        if keep_last and path.is_file():
            _keep(path, previous_of(path))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """safetensors' `save_file`, its errors of the disk as OSError. Of several entries of `metadata` the order is random: see
    `in_order`."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        full = "code: 28" in str(error) or "StorageFull" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, os.strerror(errno.ENOSPC) if full else str(error), str(path)) from None


def in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library's order is random, and equal runs shall give equal bytes."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size:]


def previous_of(path: Path) -> Path:
    """Where the predecessor of the state at `path` is kept: checkpoint.safetensors -> checkpoint.previous.safetensors."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _keep(path: Path, older: Path) -> None:
    """Give the state at `path` the name `older` too, so that at every moment one whole state is there."""
    spare = path.with_name(f".{path.name}.previous.tmp")  # a name that the next owner of the folder sweeps
    try:
        spare.unlink(missing_ok=True)
        os.link(path, spare)
        os.replace(spare, older)
        spare.unlink(missing_ok=True)  # still there where `older` was this very file already: then rename(2) does nothing
    except OSError:
        os.replace(path, older)  # a file system without hard links


def load_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, meta) of `save_state`. ValueError for a foreign file, a damaged one, or one whose content is not what was saved."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {key: file.get_tensor(key).clone() for key in names}  # a mapped file is not replaced on Windows
        if "meta" in metadata:
            raise ValueError("written by a version that kept no hash of it")
        digest, text = metadata[STATE].split(" ", 1)
        if digest != _sha256_state(tensors, text):
            raise ValueError("its content is not what was saved: the SHA-256 differs")
        meta = files.parse_json(text)
        if not isinstance(meta, dict):
            raise ValueError(f"its JSON is no object, but {type(meta).__name__}")
        return tensors, meta
    except Exception as error:  # safetensors raises its own, torch's and Python's, by what is wrong with the file
        raise ValueError(f"{path} is damaged or not a saved state ({error})") from None


def load_newest(path: Path) -> tuple[dict[str, Tensor], dict, list[str]] | None:
    """(tensors, meta, notes) of the newest whole state: that at `path`, else its predecessor; None where there is neither.

    The notes say what was wrong with the newest, which is then put aside as <stem>.damaged<suffix>. ValueError if nothing
    whole is left of what there is.
    """
    path, notes = Path(path), []
    older = previous_of(path)
    if not path.is_file() and older.is_file():
        notes.append(f"{path} is missing")
    for candidate in (path, older):
        if candidate.is_file():
            try:
                tensors, meta = load_state(candidate)
            except ValueError as error:
                notes.append(str(error))
                continue
            if notes:
                with contextlib.suppress(OSError):
                    os.replace(path, path.with_name(f"{path.stem}.damaged{path.suffix}"))
                notes = [f"{notes[0]}; going on from the state before it, {candidate.name}"]
            return tensors, meta, notes
    if notes:
        raise ValueError(f"{' and '.join(notes)}: no whole state is left; remove these files to begin again")
    return None


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Within it a state of `path` is put back: a missing, renamed or other-shaped entry is a ValueError that names it."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path} does not fit this run: it has no {error.args[0]!r}") from None
    except (RuntimeError, TypeError, AttributeError, IndexError, AssertionError, ValueError) as error:
        raise ValueError(f"{path} does not fit this run: {' '.join(str(error).split())[:300]}") from None


def _sha256_state(tensors: dict[str, Tensor], text: str) -> str:
    """Hex SHA-256 over the JSON text and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for key, value in sorted(tensors.items()):
        digest.update(f"\0{key}\0{value.dtype}\0{list(value.shape)}\0".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def grouped(**groups: dict[str, Tensor]) -> dict[str, Tensor]:
    """{"<group>.<key>": tensor} of several dicts of tensors, as one file holds them."""
    return {f"{name}.{key}": value for name, tensors in groups.items() for key, value in tensors.items()}


def of_group(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """One of the groups of `grouped`, by its own keys."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def weights_sha256(*networks: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all parameters: equal only if nothing changed."""
    digest = hashlib.sha256()
    for network in networks:
        for key, value in sorted(network.state_dict().items()):
            digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def files_sha256(paths: list[Path]) -> str:
    """Identity of a checkpoint: a single file's SHA-256; for a folder, the SHA-256 of its weight files' SHA-256s in order."""
    hashes = [files.sha256_file(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def provenance() -> dict:
    """Versions, platform and git commit (with `+changes` if the tree is dirty): what a run folder records of its origin."""
    return {"lesion": __version__, "git_commit": _git_commit(), "python": platform.python_version(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine(),
            "command": " ".join(sys.argv)}


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, encoding="utf-8", check=True).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, encoding="utf-8", check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if dirty.strip() else "")
