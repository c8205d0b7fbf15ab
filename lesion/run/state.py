"""Saved state: tensors and a JSON header as one safetensors file, hashes of weights, where a run came from.

Proven by tests/run/test_state.py.
"""

import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lesion import __version__
from lesion.run import files


def save_state(path: Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """Write tensors and a JSON-able `meta` as one safetensors file, atomically."""
    tensors = {key: value.detach().to("cpu").contiguous().clone() for key, value in tensors.items()}
    with files.atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"meta": json.dumps(meta)})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, meta) of `save_state`. ValueError for a damaged or foreign file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["meta"])  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a saved state ({error})") from None


def in_order(data: bytes) -> bytes:
    """The same safetensors file with its metadata sorted: the library's order is random, and equal runs shall give equal bytes."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size:]


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
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if dirty.strip() else "")
